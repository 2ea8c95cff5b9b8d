"""The machine under a trial: what is freed stays with the process; which sources it runs."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from pipeline import machine, paths
from pipeline.errors import UserError

FAULTS = """
import resource, sys, threading
import torch
from pipeline import machine

def faults():
    assert machine.select("cpu", 1, keep_memory="keep" in sys.argv).memory_kept == ("kept" in sys.argv)
    for _ in range(12 if COUNT == 1 else 4):  # until holes are large enough for an aligned block of the same size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.zeros(SIZE, dtype=torch.uint8).fill_(1) for _ in range(COUNT)]
        del blocks
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

SIZE, COUNT = 80 << 20, int(sys.argv[1])
thread = threading.Thread(target=faults)
if "thread" in sys.argv:
    thread.start()
else:
    faults()
"""
PAGES = (80 << 20) // 4096  # of a block that no heap of another thread takes

PEAKS = """
import torch
from pipeline import machine

cpu = machine.select("cpu", 1).device
def trial(count):
    machine.reset_peak(cpu)
    blocks = [torch.ones(16 << 20, dtype=torch.uint8) for _ in range(count)]
    return machine.peak_bytes(cpu)
print(trial(64) - trial(0))
"""

RELIEF = """
import sys
import torch
from pipeline import machine

used = machine.select("cpu", 1)
machine.memory_bytes = lambda: int(sys.argv[1])
block, above = torch.ones(1 << 30, dtype=torch.uint8), torch.ones(1 << 18)
del block
used.relieve()
print(machine._resident_bytes() >> 20)
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")


def printed(source: str, *arguments: str, **environment: str) -> int:
    done = subprocess.run([sys.executable, "-c", source, *arguments], env=os.environ | environment,
                          capture_output=True, text=True, check=True)  # fmt: skip
    return int(done.stdout)


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (("1", "keep", "kept"), {}),
        (("30", "keep", "kept"), {}),  # more than 2 GiB lie free at once
        (("1", "keep", "kept", "thread"), {"MALLOC_ARENA_MAX": "1"}),
    ],
    ids=["one", "many", "thread"],
)
def test_kept_memory_is_not_faulted_in_again(arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    assert printed(FAULTS, *arguments, **environment) < PAGES // 100


@pytest.mark.parametrize("arguments", [("1",), ("1", "keep", "thread")], ids=["as it is", "thread"])
def test_memory_that_is_not_kept_is_not_said_to_be(arguments: tuple[str, ...]) -> None:
    assert printed(FAULTS, *arguments) > PAGES // 600  # by huge pages of 2 MiB at the least


def test_a_trial_counts_no_memory_that_an_earlier_one_freed() -> None:
    assert printed(PEAKS) > 60 << 24


def test_the_commit_is_gits_or_a_bundles_or_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CODE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.revision() == {"commit": None, "dirty": None}  # and not "clean"
    packed = {"commit": "c0ffee", "dirty": True}
    (tmp_path / machine.REVISION).write_text(json.dumps(packed))
    assert machine.revision() == packed
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert machine.revision() == {"commit": commit, "dirty": False}


def test_memory_beyond_a_trials_share_is_given_back() -> None:
    """Kept where there is plenty, given back where a quarter of it is less than the process has."""
    plenty, little = printed(RELIEF, str(1 << 50)), printed(RELIEF, str(1 << 20))
    assert little < plenty - 1000


def test_the_machines_memory_is_known() -> None:
    assert 1 << 28 < machine.memory_bytes() < 1 << 50


def test_a_device_without_kernels_is_refused_and_the_obstacle_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "obstacle", lambda backend: f"{backend} finds no libnvvm")
    said = "device: expected pooling kernels for the CUDA device, got none: numba_cuda finds no libnvvm; or use cpu"
    try:
        with pytest.raises(UserError, match=said):
            machine.select("auto", torch.get_num_threads())
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ["cpu family\t: 25", "model\t\t: 17", "model name\t: AMD EPYC", "", "model\t: 1"],
            "AMD EPYC (family 25, model 17)",
        ),
        (["cpu family\t: 6", "model\t\t: 143", "model name\t: Intel(R) Xeon(R) 8481C"], "Intel(R) Xeon(R) 8481C"),
        (["CPU implementer\t: 0x41"], platform.processor() or platform.machine()),
    ],
    ids=["virtual", "named", "no-name"],
)
def test_a_processors_name_says_which_it_is(tmp_path, lines, expected):
    (tmp_path / "cpuinfo").write_text("\n".join(lines))
    assert machine.cpu_name(tmp_path / "cpuinfo") == expected


def test_a_system_that_tells_no_name_has_its_architectures(tmp_path):
    assert machine.cpu_name(tmp_path / "missing") == (platform.processor() or platform.machine())
