"""The README's section on the layer: its code blocks run, in order, as one program."""

import re

import pytest
import torch

from pipeline import paths


def blocks() -> list[str]:
    text = (paths.CODE / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n## Using the layer\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


def test_the_code_of_using_the_layer_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    try:
        for number, block in enumerate(blocks(), 1):
            try:
                exec(compile(block, f"README.md, block {number} of Using the layer", "exec"), names)
            except Exception as error:
                pytest.fail(f"block {number} of the README: {error!r}\n{block}")
    finally:
        torch.set_num_threads(threads)
        torch.compiler.reset()
    assert len(blocks()) >= 7
    assert (tmp_path / "layer.safetensors").is_file()
