"""Weights in files: safetensors with the constructor's arguments inside, and conversion from another layout.

No pickle is read or written here. Axes: n input size, m hidden size, k filter width.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

FORMAT = "qrnn.QRNN/1"
"""The file's `format` entry: the class that reads it, and the version of the layout of its tensors."""


def save(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> None:
    """Writes tensors and, as JSON in the header, the constructor's arguments; replaces `path` at once or not at all."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = to_bytes(held, metadata={"format": FORMAT, "arguments": json.dumps(arguments, sort_keys=True)})
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid4().hex}")  # tempfile's would be its owner's alone
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the constructor's arguments, tensors on the CPU) of a file that `save` wrote.

    Raises:
        ValueError: no such file's content; the message names path, expected and got.
        OSError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)}: expected a safetensors file, got: {error}") from None
    if metadata.get("format") != FORMAT:
        found = metadata.get("format", "none")
        raise ValueError(f"{os.fspath(path)}: expected a file of format {FORMAT!r}, got format {found!r}")
    return json.loads(metadata["arguments"]), tensors


def put(module: nn.Module, tensors: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Makes `tensors` the module's parameters, in their own dtype.

    Raises:
        ValueError: names or shapes that are not the module's; the message names each of them.
    """
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{os.fspath(source)}: expected the tensors of its arguments, got: {error}") from None


def from_salesforce(
    state_dict: Mapping[str, Tensor], input_size: int, hidden_size: int, *, current_first: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of salesforce/pytorch-qrnn (torchqrnn.QRNN) in this library's layout.

    There each layer is one nn.Linear, `layers.l.linear`, over the current input (window 1), or over the current
    input followed by the previous one (window 2: `torch.cat([X, Xm1], 2)`). Its rows are z, f and, with an
    output gate, o. Its sigmoid gate weighs the new candidate, c_t = f z_t + (1 - f) c_{t-1}, so the f of eq. 3
    is one minus theirs, which is the sigmoid of the negated pre-activation.

    Their zoneout scales the gate by one minus its probability in evaluation, which no weights can express: the
    stack needs the checkpoint's zoneout with zoneout_evaluation="scaled" to give the same output.

    Args:
        state_dict: of their QRNN, names `layers.l.linear.weight` and `.bias`.
        input_size, hidden_size: n and m of the checkpoint; windows and output gate follow from the shapes.
        current_first: the order of the two inputs of window 2; false for a variant that reads (previous, current).

    Returns:
        (tensors, options): state_dict and keyword arguments of `qrnn.QRNN`.

    Raises:
        ValueError: names or shapes of another layout; the message names the tensor, expected and got.
    """
    named = {name: re.fullmatch(r"layers\.(\d+)\.linear\.(weight|bias)", name) for name in state_dict}
    strange = [name for name, match in named.items() if match is None]
    count = len(state_dict) // 2
    wanted = {f"layers.{layer}.linear.{part}" for layer in range(count) for part in ("weight", "bias")}
    if strange or not count or set(state_dict) != wanted:
        raise ValueError(
            "state_dict: expected layers.0.linear.weight, layers.0.linear.bias and so on for each layer,"
            f" got {', '.join(sorted(state_dict)) or 'nothing'}"
        )
    tensors: dict[str, Tensor] = {}
    widths, poolings = [], []
    for layer in range(count):
        name = f"layers.{layer}.linear"
        inputs = input_size if layer == 0 else hidden_size
        weight, bias, k = _linear(name, state_dict[f"{name}.weight"], state_dict[f"{name}.bias"], inputs, hidden_size)
        weight = weight.flip(0).contiguous() if current_first else weight  # ours begins with the oldest step
        tensors |= {f"layers.{layer}.weight": weight, f"layers.{layer}.bias": bias}
        widths.append(k)
        poolings.append("fo" if bias.shape[0] == 3 * hidden_size else "f")
    if len(set(poolings)) > 1:
        raise ValueError(f"state_dict: expected an output gate in all layers or in none, got {', '.join(poolings)}")
    return tensors, {"num_layers": count, "kernel_size": widths, "pooling": poolings[0]}


def _linear(name: str, weight: Tensor, bias: Tensor, inputs: int, hidden: int) -> tuple[Tensor, Tensor, int]:
    """(weight (k, n, G m) in their order of steps, bias (G m,), k) of one linear layer, the forget gate turned over."""
    shapes = [(rows * hidden, k * inputs) for rows in (2, 3) for k in (1, 2)]
    if tuple(weight.shape) not in shapes or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}: expected a weight of shape {', '.join(map(str, shapes))} for input size {inputs} and hidden size"
            f" {hidden}, with a bias as long, got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    k = weight.shape[1] // inputs
    sign = torch.ones_like(bias)
    sign[hidden : 2 * hidden] = -1
    columns = (weight * sign.unsqueeze(-1)).t().reshape(k, inputs, -1).contiguous()
    return columns, bias * sign, k
