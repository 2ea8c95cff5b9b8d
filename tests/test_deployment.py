"""What surrounds the layer: torch.compile, torch.export, files, threads, CUDA graphs, memory, and the wheel."""

import errno
import gc
import json
import os
import platform
import re
import subprocess
import sys
import threading
import weakref
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numba.core.caching
import pytest
import torch
from torch.autograd import forward_ad

import qrnn
from pipeline import paths
from qrnn import LSTM, QRNN
from qrnn.pooling import numba_cpu
from qrnn.pooling.numba_cpu import kernels

POOLINGS = ("f", "fo", "ifo")


pytestmark = pytest.mark.usefixtures("one_seed_one_thread")


@pytest.fixture(autouse=True)
def _compiled_anew():
    yield
    torch.compiler.reset()


def close(got, expected, atol=1e-12):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("options", [{"pooling": p} for p in POOLINGS] + [{"bidirectional": True}], ids=str)
def test_compile_takes_the_whole_graph_and_gives_the_same(options):
    """fullgraph=True raises at any graph break; outputs, state and gradients are the eager ones."""
    stack = QRNN(3, 4, 2, kernel_size=3, dense=True, **options).double()
    x, lengths = torch.randn(6, 2, 3).double().requires_grad_(), torch.tensor([6, 3])
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    _, before = stack(torch.randn(4, 2, 3).double())
    upstream = torch.randn(6, 2, stack.output_size).double()
    leaves = [x, *stack.parameters()]
    results = []
    for run in (stack, compiled):
        output, state = run(x, before.detach(), lengths)
        gradients = torch.autograd.grad(output, leaves, upstream)
        begun, _ = run(x, (before.h.detach(), before.c.detach()))
        results.append((output, state.h, state.c, *gradients, begun))
    for eager, got in zip(*results, strict=True):
        close(got, eager)


def test_compile_takes_zoneout_in_training():
    stack, x = QRNN(3, 4, zoneout=0.5), torch.randn(6, 2, 3)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    outputs = [compiled(x)[0] for _ in range(2)]
    assert outputs[0].isfinite().all()
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_step_compiles_whole(pooling):
    stack, x = QRNN(3, 4, 2, pooling=pooling).double(), torch.randn(2, 3).double()
    _, state = stack.step(x)
    compiled = torch.compile(stack.step, fullgraph=True, backend="aot_eager")
    close(compiled(x, state)[0], stack.step(x, state)[0])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_export_keeps_time_and_batch_open(pooling):
    """Time from k + 1 steps on: below, the offset views have one row or none, which export would have to fix."""
    stack = QRNN(3, 4, 2, pooling=pooling).double().eval()
    time, batch = torch.export.Dim("time", min=3, max=512), torch.export.Dim("batch", min=1, max=64)
    x = torch.randn(6, 2, 3).double()
    exported = torch.export.export(stack, (x,), dynamic_shapes={"x": {0: time, 1: batch}}).module()
    for shape in ((6, 2, 3), (11, 5, 3), (3, 1, 3)):
        x = torch.randn(shape).double()
        output, state = exported(x)
        expected, last = stack(x)
        close(output, expected)
        close(state.c, last.c)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_was_exported_without_gradients_is_trained(frozen):
    stack, x = QRNN(3, 4, 2).double().eval(), torch.randn(6, 2, 3).double()
    stack.requires_grad_(not frozen)
    with torch.set_grad_enabled(frozen):
        exported = torch.export.export(stack, (x,)).module()
    stack.requires_grad_(True)
    exported.requires_grad_(True)
    results = []
    for module in (stack, exported):
        leaf = x.clone().requires_grad_()
        output, _ = module(leaf)
        parameters = dict(module.named_parameters())
        results.append(
            torch.autograd.grad(
                output.square().sum(), [leaf, *(parameters[name] for name, _ in stack.named_parameters())]
            )
        )
    for eager, got in zip(*results, strict=True):
        close(got, eager)


def test_an_exported_stack_and_a_state_are_saved_and_loaded(tmp_path):
    stack, x = QRNN(3, 4, 2).double().eval(), torch.randn(6, 2, 3).double()
    torch.export.save(torch.export.export(stack, (x,)), tmp_path / "stack.pt2")
    close(torch.export.load(tmp_path / "stack.pt2").module()(x)[0], stack(x)[0])
    for family in (stack, LSTM(3, 4, 2).double()):
        _, state = family(x)
        torch.save(state.detach(), tmp_path / "state.pt")
        close(torch.load(tmp_path / "state.pt").c, state.c)  # weights_only, as is torch's default


def test_a_helper_thread_keeps_the_tensors_that_it_writes_into():
    """The caller may be interrupted meanwhile, and let go of its own."""
    begun, end = threading.Event(), threading.Event()
    tensor = torch.zeros(3)
    alive = weakref.ref(tensor)
    share = numba_cpu._hand_over(1, (tensor,), lambda: (begun.set(), end.wait()))
    begun.wait()
    del tensor
    gc.collect()
    kept = alive() is not None
    end.set()
    share.result()
    assert kept


def test_a_share_whose_thread_does_not_start_runs_once(monkeypatch):
    """The executor queues it before it starts the thread: one that starts later finds it there."""
    numba_cpu._forget_helpers()
    runs = []

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert numba_cpu._hand_over(1, (), runs.append, "here") is None
    assert runs == ["here"]
    numba_cpu._hand_over(1, (), runs.append, "there").result()
    assert runs == ["here", "there"]


def test_a_share_that_lies_in_a_queue_for_nothing_holds_no_tensors(monkeypatch):
    queued, runs = [], []

    def submit(run, *arguments):
        queued.append(arguments)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(numba_cpu, "_pool_of", lambda count: SimpleNamespace(submit=submit))
    numba_cpu._hand_over(1, (torch.zeros(1),), runs.append, "here")
    assert runs == ["here"]
    ((_, shares),) = queued
    assert shares == []


def test_a_share_that_two_threads_take_is_waited_for_by_the_second():
    begun, end, once, runs = threading.Event(), threading.Event(), threading.Lock(), []
    shares = [(lambda: (begun.set(), end.wait(), runs.append(1)), (), ())]
    first, second = (threading.Thread(target=numba_cpu._run, args=(once, shares)) for _ in range(2))
    first.start()
    begun.wait()
    second.start()
    second.join(0.1)
    waits = second.is_alive()
    end.set()
    first.join()
    second.join()
    assert waits
    assert runs == [1]


def test_a_kernels_tensors_are_all_held(monkeypatch):
    launched = []

    def launch(kernel, plan, mode, held, shape, dtype):
        launched.append((plan, held))

    monkeypatch.setattr(numba_cpu, "_launch", launch)
    gates, rows = [torch.randn(3, 2, 4) for _ in range(4)], torch.randn(2, 4)
    zoned, lengths = torch.zeros(3, 2, 4, dtype=torch.bool), torch.tensor([1, 3])
    h, last, c = numba_cpu.forward(gates, rows, zoned, lengths, False, True)
    out, grad_initial = [torch.empty_like(gate) for gate in gates], torch.empty_like(rows)
    numba_cpu.backward(h, last, gates, rows, zoned, lengths, c, False, out, grad_initial)
    for (plan, held), count in zip(launched, (10, 15), strict=True):
        held_at = {tensor.data_ptr() for tensor in held}
        addresses = {value for value in plan.tolist() if value > 2**20}  # the others are strides and sizes
        assert addresses <= held_at
        assert len(addresses) == count


def test_a_thread_that_outlives_the_main_one_pools_on():
    """Python takes no more work for helper threads then."""
    program = (
        "import threading, torch, qrnn\n"
        "torch.set_num_threads(2)\n"
        "def work():\n"
        "    threading.main_thread().join()\n"
        "    z = torch.randn(600, 8, 64)\n"
        "    torch.testing.assert_close(qrnn.pool(z, z)[0], qrnn.pool(z, z, backend='reference')[0])\n"
        "    print('done')\n"
        "threading.Thread(target=work).start()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=paths.CODE, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


def test_without_a_folder_for_what_is_compiled_it_is_compiled_anew(monkeypatch):
    def kept():
        return isinstance(kernels._compiled(lambda x: x)._cache, numba.core.caching.FunctionCache)

    assert kept()
    monkeypatch.setattr(numba.core.caching.CompileResultCacheImpl, "_locator_classes", [])
    assert not kept()


def test_a_kernel_runs_though_the_disk_is_full(monkeypatch):
    def save_overload(cache, signature, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(numba.core.caching.FunctionCache, "save_overload", save_overload)
    increased = kernels._compiled(lambda x: x + 1)
    with pytest.warns(UserWarning, match="kernels are compiled anew in each process, .*No space left on device"):
        assert increased(1) == 2


@pytest.mark.parametrize(
    ("variables", "first", "obstacle"),
    [
        ({"NUMBA_DISABLE_JIT": "1"}, "", "NUMBA_DISABLE_JIT is set"),
        ({}, "sys.modules['llvmlite'] = None", "numba is not loaded: .*llvmlite"),
    ],
)
def test_a_numba_that_cannot_run_is_an_obstacle(variables, first, obstacle):
    """backend="auto" takes the reference then, with a warning; "numba" is refused."""
    program = (
        f"import sys, warnings\n{first}\nimport torch, qrnn\n"
        "layer = qrnn.QRNN(3, 4)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    output, _ = layer(torch.zeros(5, 2, 3))\n"
        "print(qrnn.backends(), tuple(output.shape), caught[0].message)\n"
        "qrnn.pool(*torch.zeros(2, 5, 2, 3), backend='numba')\n"
    )
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=paths.CODE, env=environment, capture_output=True, text=True
    )
    assert re.match(rf"\['reference'\] \(5, 2, 4\) pool: 'numba' cannot run here \({obstacle}", done.stdout), done
    assert re.search(rf"RuntimeError: backend: 'numba' was requested but cannot run here \({obstacle}", done.stderr)


def test_forward_mode_is_refused_where_a_kernel_has_none():
    z = torch.randn(3, 2, 4)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        qrnn.pool(forward_ad.make_dual(z, torch.ones_like(z)), z)


@pytest.mark.parametrize("options", [{}, {"pooling": "ifo", "bidirectional": True}, {"causal": False}], ids=str)
def test_the_reference_takes_torchs_transforms(options):
    """Gradients of single rows, and derivatives by parameters both ways; autograd, row by row, is the authority."""
    stack = QRNN(3, 4, 2, kernel_size=3, backend="reference", **options).double()
    x, parameters = torch.randn(5, 2, 3).double(), dict(stack.named_parameters())

    def loss(parameters, row):
        output, _ = torch.func.functional_call(stack, parameters, (row.unsqueeze(1),))
        return output.square().sum()

    by_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, x)
    tangents = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    _, slope = torch.func.jvp(lambda p: loss(p, x[:, 0]), (parameters,), (tangents,))
    alone = torch.autograd.grad(loss(parameters, x[:, 0]), list(parameters.values()))
    for (name, rows), gradient in zip(by_row.items(), alone, strict=True):
        close(rows[0], gradient)
        close(torch.func.jacrev(loss)(parameters, x[:, 0])[name], gradient)
    close(slope, sum((gradient * tangents[name]).sum() for name, gradient in zip(parameters, alone, strict=True)))


def test_the_reference_takes_batched_upstream_gradients():
    stack, x = QRNN(3, 4, 2, backend="reference").double(), torch.randn(5, 2, 3).double().requires_grad_()
    output, _ = stack(x)
    upstream = torch.randn(3, *output.shape).double()
    (batched,) = torch.autograd.grad(output, x, upstream, retain_graph=True, is_grads_batched=True)
    for got, one in zip(batched, upstream, strict=True):
        close(got, torch.autograd.grad(output, x, one, retain_graph=True)[0])


def test_a_transform_around_a_fused_kernel_is_named():
    stack, x = QRNN(3, 4), torch.randn(5, 2, 3)
    with pytest.raises(RuntimeError, match=r"no torch.func transform around a fused kernel.*backend='reference'"):
        torch.func.vmap(lambda row: stack(row.unsqueeze(1))[0], in_dims=1)(x)


@pytest.mark.gpu
def test_a_cuda_graph_replays_forward_and_backward():
    stack, x = QRNN(16, 32, 2).cuda(), torch.randn(20, 4, 16, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(lambda x: stack(x)[0], (x,))
    other = torch.randn_like(x).requires_grad_()
    output, expected = graphed(other), stack(other)[0]
    close(output, expected, 1e-6)
    upstream = torch.randn_like(output)
    close(*(torch.autograd.grad(y, other, upstream)[0] for y in (output, expected)), 1e-6)


PEAK = """
import ctypes, json, sys, torch
from qrnn import QRNN
torch.set_num_threads(1)
def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024
def peak(module, x):
    def run():
        output, _ = module(x)
        output.backward(torch.ones_like(output))
        module.zero_grad(set_to_none=True)
    run()  # compiles, and lets the allocator and the libraries take what they keep
    ctypes.CDLL(None).malloc_trim(0)  # else what lies free in the heap would hide a part of the peak
    before = status("VmRSS")
    peaks = []
    for _ in range(3):  # what the allocator gives back, and when, differs a little
        open("/proc/self/clear_refs", "w").write("5")
        run()
        peaks.append(status("VmHWM") - before)
    return sorted(peaks)[1]
kind, (steps, rows, size) = sys.argv[1], map(int, sys.argv[2:])
module = {"qrnn": QRNN, "lstm": torch.nn.LSTM}[kind](size, size)
print(json.dumps(peak(module, torch.randn(steps, rows, size))))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="peak memory is read from Linux and glibc")
@pytest.mark.parametrize("shape", [(105, 20, 640), (512, 8, 320)], ids=str)
def test_peak_memory_is_no_more_than_nn_lstms(shape, capsys):
    """Forward and backward, in processes of their own, the median of three calls after the first; margin zero."""
    peaks = {}
    for kind in ("qrnn", "lstm"):
        command = [sys.executable, "-c", PEAK, kind, *map(str, shape)]
        done = subprocess.run(command, cwd=paths.CODE, capture_output=True, text=True, timeout=300, check=True)
        peaks[kind] = json.loads(done.stdout)
    with capsys.disabled():
        print(f" {shape}: QRNN {peaks['qrnn'] / 2**20:.1f} MiB, LSTM {peaks['lstm'] / 2**20:.1f} MiB", end="")
    assert 0 < peaks["qrnn"] <= peaks["lstm"]


BARE = """
import sys
BLOCKED = {"ray", "mlflow", "dvc", "datasets", "pipeline", "stages", "yaml", "matplotlib", "numba.cuda"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in BLOCKED or name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not at hand")
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import torch, qrnn, qrnn.models
assert qrnn.__file__.startswith(sys.argv[1]), qrnn.__file__
output, state = qrnn.QRNN(3, 4, 2, backend=sys.argv[2])(torch.randn(5, 2, 3))
output.sum().backward()
print(tuple(output.shape), sorted(name for name in sys.modules if name in BLOCKED))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of the sources as they stand, built from a copy: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("pyproject.toml", "README.md", *(f.relative_to(paths.CODE) for f in paths.CODE.glob("*/**/*.py"))):
        if Path(name).parts[0] in ("qrnn", "pipeline", "stages", "pyproject.toml", "README.md"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((paths.CODE / name).read_bytes())
    program = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(folder)], cwd=source, capture_output=True, check=True)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_library_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    modules = {name for name in names if ".dist-info/" not in name}
    expected = {f.relative_to(paths.CODE).as_posix() for f in (paths.CODE / "qrnn").rglob("*") if f.is_file()}
    assert modules == {name for name in expected if "__pycache__" not in name}
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert [line.split()[1].partition(">")[0] for line in needed] == ["torch", "numba", "numpy", "safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_wheel_runs_without_the_pipelines_packages_or_cuda(wheel, backend, tmp_path):
    """In a process where those cannot be imported, nor numba.cuda, and where no device is visible."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    command = [sys.executable, "-I", "-c", BARE, str(tmp_path), backend]
    done = subprocess.run(command, cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(5, 2, 4) []"
