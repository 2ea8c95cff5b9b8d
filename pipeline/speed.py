"""Pooling kernels beside their peers: fo-pooling of the same inputs, in one run, after a correctness gate.

Every candidate maps pre-activations z, f, o (T, B, C) to h (T, B, C). Within a round the candidates take turns, and
a plain copy takes a turn too: its bandwidth is the floor that the fractions refer to. It is of more than a cache holds,
so that small tensors may be above it. A peer's time has the copies into its layout and the activations outside it.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import qrnn
from pipeline import files, machine
from pipeline.errors import UserError

CHANNELS = 320
PAPER = [(batch, steps, CHANNELS) for batch in (8, 16, 32, 64, 128, 256) for steps in (32, 64, 128, 256, 512)]
"""(B, T, C) of the paper's Figure 4."""
TASKS = [(20, 105, 640), (24, 231, 256), (16, 100, 320)]  # ptb, imdb, iwslt
LONG = [(1, 4096, CHANNELS), (1, 65536, CHANNELS)]
QUICK = [(8, 32, CHANNELS), (20, 105, 640), (64, 256, CHANNELS)]

FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 5, 8  # moved a step and channel: z, f, o, h, c; z, f, o, c, dh, dz, df, do
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}  # read plus written; so many that caches and launching count for little
GATE_ROWS, GATE_CHANNELS = 3, 65
TOLERANCE = 1e-5  # of the gate: relative to the largest magnitude; peers take exponentials of logarithms
QUICK_S = 0.05  # what takes less is called once untimed before each timing
SLOW_S = 2.0  # what takes longer is timed once a shape
HEAD_START = 4_000_000  # cycles, about 2 ms, that a device waits before a timing begins: the host is then ahead of it


class Candidate(NamedTuple):
    """A way to pool: a function of z, f, o, or why there is none."""

    name: str
    function: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    missing: str = ""
    kernel: str | None = None  # a CUDA kernel to take whatever the rule says: so the rule's thresholds are measured
    gate_steps: int = 300  # more than a tile of the chunked kernel has, and no multiple of one


@dataclass(frozen=True)
class Setting:
    machine: machine.Machine
    shapes: list[tuple[int, int, int]]
    repeats: int


def run(
    *,
    shapes: str | None,
    quick: bool,
    device: str,
    threads: int,
    out: Path | None,
    only: Sequence[str] = (),
    keep_memory: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Gate, measure and print; returns what goes to `out` as JSON (times in ms, bandwidths in GB/s).

    The file is written anew after every shape, so that a run that is cut off leaves what it has measured.

    Args:
        only: names of the candidates to measure; all unless given.

    Raises:
        UserError: a shape that is not BxTxC, no such candidate, or a device that is not there.
    """
    listed = QUICK if quick else PAPER + TASKS + LONG
    chosen = listed if shapes is None else [parse(shape) for shape in shapes.split(",")]
    setting = Setting(
        machine.select(device, threads, "float32", keep_memory=keep_memory), chosen, repeats=3 if quick else 9
    )
    every = _chosen(candidates(setting.machine.device), only)
    gates = {candidate.name: gate(candidate, setting.machine.device) for candidate in every}
    for candidate in every:
        say(f"gate  {candidate.name:<24} {gates[candidate.name]}")
    passed = [candidate for candidate in every if gates[candidate.name].startswith("ok")]
    result = {
        "machine": setting.machine.describe(),
        "revision": machine.revision(),
        "gate": gates,
        "host_us": {candidate.name: host_us(candidate, setting.machine.device) for candidate in passed},
        "cells": [],
    }
    say(HEADER)
    for shape in setting.shapes:
        for cell in _measured(shape, passed, setting):
            result["cells"].append(cell)
            say(line(cell, result["host_us"][cell["candidate"]]))
        if out is not None:
            files.write_json(out, result)
    return result


def _chosen(every: list[Candidate], only: Sequence[str]) -> list[Candidate]:
    names = [candidate.name for candidate in every]
    for name in only:
        if name not in names:
            raise UserError(f"--candidate: expected one of {'; '.join(names)}, got {name!r}")
    return [candidate for candidate in every if not only or candidate.name in only]


def parse(text: str) -> tuple[int, int, int]:
    """BxTxC as three whole numbers."""
    parts = text.strip().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--shapes: expected BxTxC, such as 20x105x640, got {text!r}")
    batch, steps, channels = map(int, parts)
    return batch, steps, channels


# Candidates


def candidates(device: torch.device) -> list[Candidate]:
    """This repository's backends for the device first, then the peers; absent ones with the reason."""
    fused = "numba" if device.type == "cpu" else "numba_cuda"
    ours = [Candidate(f"qrnn {name}", partial(_pool, backend=name)) for name in (fused, "reference")]
    if fused not in qrnn.backends():
        ours[0] = Candidate(f"qrnn {fused}", None, "cannot run here")
    if device.type == "cuda" and ours[0].function is not None:
        pool = ours[0].function
        ours += [Candidate(f"{fused}, {kernel}", pool, kernel=kernel) for kernel in ("serial", "few", "chunked")]
    peers = [_associative_scan()]
    if device.type == "cuda":
        peers += [_hgrn("fused_recurrent_hgrn"), _hgrn("chunk_hgrn"), _accelerated_scan(), _lstm(device)]
    return ours + peers


def _pool(z: Tensor, f: Tensor, o: Tensor, backend: str) -> Tensor:
    return qrnn.pool(z, f, o, backend=backend)[0]


def _under(kernel: str | None, job: Callable[[], Any]) -> Any:
    """The job's result, with the CUDA kernel forced: backward chooses when it runs, so the whole job is covered."""
    if kernel is None:
        return job()
    from qrnn.pooling import numba_cuda

    before, numba_cuda.forced_kernel = numba_cuda.forced_kernel, kernel
    try:
        return job()
    finally:
        numba_cuda.forced_kernel = before


def _associative_scan() -> Candidate:
    name = "torch associative_scan"
    try:
        from torch._higher_order_ops.associative_scan import associative_scan
    except ImportError as error:
        return Candidate(name, None, f"not in this torch: {error}")

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    @torch.compile  # for sizes of any kind after the second: anew for each shape it would take longer than all the rest
    def pool(z: Tensor, f: Tensor, o: Tensor) -> Tensor:
        forget = torch.sigmoid(f)
        pair = forget, (1 - forget) * torch.tanh(z)
        mode = "pointwise" if z.is_cuda else "generic"
        return torch.sigmoid(o) * associative_scan(combine, pair, dim=0, combine_mode=mode)[1]

    return Candidate(name, pool)


def _hgrn(name: str) -> Candidate:
    """flash-linear-attention's recurrence h = exp(g) h + x over (B, T, C)."""
    try:
        from fla.ops import hgrn
    except ImportError:
        return Candidate(f"fla {name}", None, "not installed (fla-core)")
    kernel = getattr(hgrn, name)

    def pool(z: Tensor, f: Tensor, o: Tensor) -> Tensor:
        x = (1 - torch.sigmoid(f)) * torch.tanh(z)
        g = torch.nn.functional.logsigmoid(f)
        states = kernel(x.transpose(0, 1).contiguous(), g.transpose(0, 1).contiguous())[0]
        return torch.sigmoid(o) * states.transpose(0, 1)

    return Candidate(f"fla {name}", pool)


def _accelerated_scan() -> Candidate:
    """The recurrence h = gate h + token over (B, C, T); T must be a power of two there. Its import compiles."""
    try:
        from accelerated_scan.warp import scan
    except ImportError:
        return Candidate("accelerated-scan", None, "not installed (accelerated-scan)")
    except Exception as error:
        return Candidate("accelerated-scan", None, _cannot_run(error))

    def pool(z: Tensor, f: Tensor, o: Tensor) -> Tensor:
        forget = torch.sigmoid(f)
        tokens = (1 - forget) * torch.tanh(z)
        gates, tokens = (t.permute(1, 2, 0).contiguous() for t in (forget, tokens))
        return torch.sigmoid(o) * scan(gates, tokens).permute(2, 0, 1)

    return Candidate("accelerated-scan", pool, gate_steps=512)


def _lstm(device: torch.device) -> Candidate:
    """cuDNN's LSTM of as many channels, as context: another function, so it passes no gate."""
    made: dict[int, torch.nn.LSTM] = {}

    def pool(z: Tensor, f: Tensor, o: Tensor) -> Tensor:
        channels = z.shape[2]
        if channels not in made:
            made[channels] = torch.nn.LSTM(channels, channels, device=device)
        return made[channels](z)[0]

    return Candidate("cuDNN LSTM (context)", pool)


# Gate


def gate(candidate: Candidate, device: torch.device) -> str:
    """ "ok" with the error seen against the float64 definition in output and gradients, or what is wrong."""
    if candidate.function is None:
        return candidate.missing
    if "context" in candidate.name:
        return "ok, not comparable"
    torch.manual_seed(0)
    inputs = _inputs((GATE_ROWS, candidate.gate_steps, GATE_CHANNELS), device)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    upstream = torch.randn_like(inputs[0])
    try:
        got = _under(candidate.kernel, partial(_everything, candidate.function, inputs, upstream))
    except Exception as error:  # a peer that cannot run here is listed with its reason
        return _cannot_run(error)
    expected = _everything(partial(_pool, backend="reference"), exact, upstream.double())
    errors = [_error(*pair) for pair in zip(got, expected, strict=True)]
    if all(error <= TOLERANCE for error in errors):  # which NaN is not
        return f"ok, error {max(errors):.1e}"
    listed = ", ".join(f"{name} {error:.1e}" for name, error in zip(("h", "dz", "df", "do"), errors, strict=True))
    return f"wrong: errors {listed}, expected at most {TOLERANCE:.0e}"


def _error(got: Tensor | None, exact: Tensor) -> float:
    """Relative to the largest magnitude; infinite for a gradient that is none."""
    return float("inf") if got is None else float((got.double() - exact).abs().max() / exact.abs().max())


def _cannot_run(error: Exception) -> str:
    return f"cannot run here: {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"


def _inputs(shape: tuple[int, int, int], device: torch.device) -> list[Tensor]:
    batch, steps, channels = shape
    return [torch.randn(steps, batch, channels, device=device, requires_grad=True) for _ in range(3)]


def _everything(function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    h = function(*inputs)
    gradients = torch.autograd.grad(h, inputs, upstream, allow_unused=True)
    return h.detach(), *gradients


# Timing


def _measured(shape: tuple[int, int, int], passed: list[Candidate], setting: Setting) -> list[dict[str, Any]]:
    """`measure`, or where the tensors of a shape find no room a cell a candidate that says so."""
    try:
        return measure(shape, passed, setting)
    except (MemoryError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:80]}"
        return [_cell(shape, candidate.name, {}, {(candidate.name, part): reason for part in ("forward", "both")}, 0.0)
                for candidate in passed]  # fmt: skip


def measure(shape: tuple[int, int, int], passed: list[Candidate], setting: Setting) -> list[dict[str, Any]]:
    """One cell a candidate: the candidates and a copy take turns, after an untimed turn each."""
    inputs = _inputs(shape, setting.machine.device)
    upstream = torch.randn_like(inputs[0])
    jobs: dict[tuple[str, str], Callable[[], Any]] = {}
    for candidate in passed:
        forward, both = partial(candidate.function, *inputs), partial(_everything, candidate.function, inputs, upstream)
        jobs[candidate.name, "forward"] = partial(_under, candidate.kernel, forward)
        jobs[candidate.name, "both"] = partial(_under, candidate.kernel, both)
    copied_bytes = COPY_BYTES[setting.machine.device.type]
    source = torch.empty(copied_bytes // 8, device=setting.machine.device).fill_(1)
    target = torch.zeros_like(source)
    jobs["copy", "forward"] = partial(target.copy_, source)
    times: dict[tuple[str, str], list[float]] = {}
    failed: dict[tuple[str, str], str] = {}
    last: dict[tuple[str, str], float] = {}
    for turn in range(setting.repeats + 1):
        for key, job in jobs.items():
            if key in failed or (times.get(key) and times[key][0] > SLOW_S):
                continue
            try:
                if turn > 0 and last.get(key, 0) < QUICK_S:
                    job()  # the turn before was another candidate's, which left the caches full of other tensors
                seconds = last[key] = timed(job, setting.machine.device)
            except Exception as error:
                failed[key] = f"{type(error).__name__}: {str(error)[:80]}"
                if setting.machine.device.type == "cuda":
                    torch.cuda.empty_cache()  # what ran out of memory would leave too little to the others
                continue
            if turn > 0:  # the first turn compiles
                times.setdefault(key, []).append(seconds)
    copied = copied_bytes / statistics.median(times["copy", "forward"])
    return [_cell(shape, candidate.name, times, failed, copied) for candidate in passed]


def timed(job: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call: on the clock of the CPU, or between two events of the device.

    The device waits before the first event, or else it would wait for the host's launches between the two, and small
    shapes would all take what a launch takes. A call whose launches take longer than that waiting is bound by them.
    """
    if device.type == "cpu":
        start = time.perf_counter()
        job()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HEAD_START)
    begin.record()
    job()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def host_us(candidate: Candidate, device: torch.device, calls: int = 50) -> float | None:
    """Microseconds that a forward call of one element costs its caller, None where it fails; on CUDA nothing is waited
    for."""
    assert candidate.function is not None
    inputs = _inputs((1, 1, 1), device)
    try:
        candidate.function(*inputs)
        spans = []
        for _ in range(calls):
            start = time.perf_counter()
            candidate.function(*inputs)
            spans.append(time.perf_counter() - start)
    except Exception:
        return None
    return statistics.median(spans) * 1e6


def _cell(shape, name: str, times: dict, failed: dict, copied: float) -> dict[str, Any]:
    batch, steps, channels = shape
    cell: dict[str, Any] = {"batch": batch, "steps": steps, "channels": channels, "candidate": name}
    cell["copy_gb_s"] = copied / 1e9
    for part, elements in (("forward", FORWARD_ELEMENTS), ("both", FORWARD_ELEMENTS + BACKWARD_ELEMENTS)):
        if (name, part) in failed:
            cell[part] = {"failure": failed[name, part]}
            continue
        spans = times[name, part]
        moved = batch * steps * channels * elements * 4
        median = statistics.median(spans)
        cell[part] = {
            "median_ms": median * 1e3,
            "low_ms": min(spans) * 1e3,
            "high_ms": max(spans) * 1e3,
            "repeats": len(spans),
            "bytes": moved,
            "gb_s": moved / median / 1e9,
            "copy_fraction": moved / median / copied,
        }
    return cell


HEADER = (
    f"{'B x T x C':<16} {'candidate':<24} {'forward ms':>11} {'(low..high)':>19} {'GB/s':>7} {'of copy':>7}"
    f" {'fwd+bwd ms':>11} {'(low..high)':>19} {'GB/s':>7} {'of copy':>7} {'host us':>8}"
)


def line(cell: dict[str, Any], host: float | None) -> str:
    """A cell as a row of the printed grid."""
    start = f"{cell['batch']}x{cell['steps']}x{cell['channels']:<8}"
    row = f"{start:<16} {cell['candidate']:<24}"
    for part in ("forward", "both"):
        span = cell[part]
        if "failure" in span:
            row += f" {span['failure']:>47}"
            continue
        spread = f"({span['low_ms']:.2f}..{span['high_ms']:.2f})"
        row += f" {span['median_ms']:>11.3f} {spread:>19} {span['gb_s']:>7.1f} {span['copy_fraction']:>7.0%}"
    return f"{row} {'-' if host is None else f'{host:.1f}':>8}"
