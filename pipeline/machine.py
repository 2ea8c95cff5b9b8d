"""What a trial runs on: device, threads, memory, versions, revision."""

import contextlib
import ctypes
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import torch
from torch import nn

from pipeline import paths
from pipeline.errors import UserError
from pipeline.params import Compile, Precision
from qrnn.pooling.ops import obstacle

REVISION = "revision.json"  # in a bundle, which has no Git
KEPT_SHARE = 0.25


@dataclass(frozen=True)
class Machine:
    """What a trial runs on: its device, its CPU threads, and what its matrix products are computed in.

    float32: throughout. tf32: operands of products are rounded to TF32 on a CUDA device, all else is float32. bfloat16:
    products by torch's autocast, operands and results; weights, optimiser, loss and the QRNN's state stay float32,
    and torch's LSTM has its gates and state in bfloat16 too. Of the products those of the translation model's attention
    and output layer are float32.
    memory_kept: whether freed memory stays with the process; see `keep_freed_memory`.
    kept_share: up to which share of the machine's memory, over the trials that its processors have room for.
    compile: the mode in which torch.compile takes the training steps, or none.
    """

    device: torch.device
    threads: int
    precision: Precision
    memory_kept: bool = False
    compile: Compile = "none"
    kept_share: float = KEPT_SHARE

    def products(self) -> contextlib.AbstractContextManager[Any]:
        """The context that a forward pass belongs in, entered anew for every step: it keeps casts of the weights."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def compiled(self, model: nn.Module) -> Any:
        """The model as training steps call it; its parameters are the model's own."""
        return model if self.compile == "none" else torch.compile(model, mode=self.compile)

    def relieve(self) -> None:
        """Gives freed memory back where it is kept and the process has outgrown its share; to be called after a step.

        Batches of ever other shapes leave a heap full of holes that fit no later block: a trial of IMDB that needs 2.5
        GiB went beyond 24.
        """
        own_share = self.kept_share * self.threads / (os.cpu_count() or 1)
        if self.memory_kept and _resident_bytes() > own_share * memory_bytes():
            _libc().malloc_trim(0)

    @property
    def options(self) -> str:
        """The options of `python -m pipeline trial` that ask for this."""
        compiled = "" if self.compile == "none" else f" --compile {self.compile}"
        return f"--device {self.device.type} --threads {self.threads} --precision {self.precision}{compiled}"

    def describe(self) -> dict[str, Any]:
        """The environment field of a record; of a CUDA device also the libraries that its times depend on."""
        on_cuda = self.device.type == "cuda"
        libraries = {} if not on_cuda else {
            "cudnn": torch.backends.cudnn.version(),
            "numba_cuda": importlib.metadata.version("numba-cuda"),
            "cpu": cpu_name(),
        }  # fmt: skip
        return {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numba": numba.__version__,
            "device": self.device.type,
            "device_name": torch.cuda.get_device_name(self.device) if on_cuda else cpu_name(),
            "cuda": torch.version.cuda if on_cuda else None,
            **libraries,
            "cpus": os.cpu_count(),
            "threads": self.threads,
            "precision": self.precision,
            "memory_kept": self.memory_kept,
            "compile": self.compile,
            "hostname": socket.gethostname(),
        }


def bfloat16_lstm_runs() -> bool:
    """Whether torch's LSTM runs in bfloat16 on this CPU: oneDNN has none where AVX-512 is missing, and raises."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        try:
            torch.nn.LSTM(1, 1)(torch.zeros(1, 1, 1))
        except RuntimeError:
            return False
    return True


def select(
    device: str, threads: int, precision: Precision = "auto", compile: Compile = "none", keep_memory: bool = True
) -> Machine:
    """Sets torch up for a trial: CPU threads, which the pooling kernels follow, and the precision of products.

    auto is the CUDA device where there is one, and tf32 there, float32 on a CPU. On a CPU freed memory is kept if
    that is asked for and can be had.

    Raises:
        UserError: cuda, or tf32, was asked for and there is no CUDA device; or there is one, but no kernels for it.
    """
    torch.set_num_threads(threads)
    # Gradients that decay over hundreds of steps end as denormal numbers, which slow matrix products down tenfold.
    torch.set_flush_denormal(True)
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise UserError("device: expected a CUDA device, found none; use cpu or auto")
    chosen = torch.device("cuda" if found and device != "cpu" else "cpu")
    missing = obstacle("numba_cuda") if chosen.type == "cuda" else None
    if missing:
        raise UserError(f"device: expected pooling kernels for the CUDA device, got none: {missing}; or use cpu")
    if precision == "auto":
        precision = "tf32" if chosen.type == "cuda" else "float32"
    if precision == "tf32" and chosen.type != "cuda":
        raise UserError("precision: expected float32 or bfloat16 on a CPU, got tf32, which CUDA devices have")
    # torch's defaults differ between the two: cuDNN's LSTM would compute in TF32 and matrix products in float32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    kept = keep_memory and chosen.type == "cpu" and keep_freed_memory()
    return Machine(chosen, threads, precision, kept, compile)


def keep_freed_memory() -> bool:
    """Has the C library keep what is freed for the next step, which asks for the same again; whether it can (glibc).

    By itself it gives blocks above 32 MiB, and the heap's free end, back to the system: then every step waits for
    fresh pages, a quarter of a training step of nn.LSTM at 105 x 20, 640 units. Peak memory is the same. The heaps of
    other threads than the first take no block above 64 MiB, unless MALLOC_ARENA_MAX was 1 when the process began.
    """
    own_heap = threading.current_thread() is not threading.main_thread() and os.environ.get("MALLOC_ARENA_MAX") != "1"
    if platform.libc_ver()[0] != "glibc" or own_heap or not Path("/proc/self/statm").is_file():
        return False
    trim_threshold, most_mappings, never = -1, -4, -1  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    return bool(_libc().mallopt(most_mappings, 0) and _libc().mallopt(trim_threshold, never))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def memory_bytes() -> int:
    """The machine's memory, or what of it a container has."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    granted = limit.read_text().strip() if limit.is_file() else "max"
    return min(whole, int(granted)) if granted.isdigit() else whole


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model name where the system tells it, else its architecture.

    A virtual machine may leave a name without a number, which several generations share: family and model tell them
    apart.
    """
    if not info.is_file():
        return platform.processor() or platform.machine()
    facts: dict[str, str] = {}
    for line in info.read_text().splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    if re.search(r"\d", name) or "cpu family" not in facts:
        return name
    return f"{name} (family {facts['cpu family']}, model {facts['model']})"


def reset_peak(device: torch.device) -> None:
    """Starts a new count of peak memory, so that a process that runs trials in turn counts each by itself."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    if platform.libc_ver()[0] == "glibc":
        _libc().malloc_trim(0)  # what an earlier trial freed is no memory of this one
    # Where this is not Linux, or not allowed, the count goes on from the process's start.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Peak memory in bytes: allocated on a CUDA device, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def revision() -> dict[str, Any]:
    """Commit of the sources, and whether they differ from it. params.yaml is left out: a record holds its recipe.

    In a bundle it is what the checkout was that the bundle was made of. Where neither can be told both are None.
    """
    packed = paths.CODE / REVISION
    if packed.is_file() and not (paths.CODE / ".git").exists():
        return json.loads(packed.read_bytes())
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!params.yaml") if commit else None
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=paths.CODE, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
