"""The CUDA pooling kernels: in numba's simulator, compiled without a device, and (marker `gpu`) on one."""

import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_pooling import MODES, SHAPES, compare, draw, everything

import qrnn
from pipeline import paths
from qrnn.pooling import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
KERNELS = ("serial", "few", "chunked")
SIMULATED = ("serial", "chunked")  # "few" is the serial kernel with smaller blocks, and the simulator's are small


@pytest.mark.slow
@pytest.mark.parametrize("kernel", SIMULATED)
def test_the_pooling_suite_in_the_simulator(kernel):
    """tests/test_pooling.py at its small shapes, in a process whose numba simulates CUDA."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "simulated_cuda", "--kernel", kernel, "-x", "tests/test_pooling.py"],
        cwd=paths.CODE,
        env={
            **os.environ,
            "NUMBA_ENABLE_CUDASIM": "1",
            "PYTHONPATH": os.pathsep.join([str(paths.CODE), str(paths.CODE / "tests")]),
        },
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


# Compiled without a device

COMPILE = """
import itertools, json, re, sys
from types import SimpleNamespace
import torch
import numba.cuda.dispatcher
from cuda.core import Linker, LinkerOptions, ObjectCode
from numba import cuda
from qrnn.pooling import numba_cuda
from qrnn.pooling.numba_cuda import kernels

cc = tuple(json.loads(sys.argv[1]))
numba.cuda.dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=cc)  # of device functions
arch = "sm_%d%d" % cc + "a" * (cc >= (9, 0))  # as numba-cuda links for such a device
# Modes: f- and fo-pooling, all that a case may have, and all that for tensors of 2^31 elements and more.
some = {torch.float32: ("f", "fo", "all", "far")}
modes = [(dtype, mode) for dtype in numba_cuda.DTYPES for mode in some.get(dtype, ("all",))]
for (dtype, mode), kind, name in itertools.product(modes, ("serial", "chunked"), ("forward", "backward")):
    shape = numba_cuda.SHAPES[torch.float64 if mode == "far" else kernels.state_dtype(dtype)][kind]
    rest = mode in ("all", "far")
    case = kernels.Case(
        dtype, mode != "f", rest, True, rest, rest, False, name == "forward", mode == "far", shape
    )
    signature = getattr(kernels, name + "_signature")(case)
    threads = shape.lanes * shape.chunks
    function = getattr(kernels, name + "_kernel")(case)
    ptx, _ = cuda.compile_ptx(function, signature, device=False, cc=cc, launch_bounds=threads)
    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=LinkerOptions(arch=arch, ptxas_options=["-v"]))
    linker.link("cubin")
    log = str(linker.get_info_log())
    print("RESULT", json.dumps({
        "id": f"{dtype}-{kind}-{name}-{mode}",
        "threads": threads,
        "double": dtype == torch.float64,
        "local": ptx.count(".local"),
        "f64": len(re.findall(r"[.]f64", ptx)),
        "far": mode == "far",
        "steps": shape.steps,
        "wide": len(re.findall(r"(?:mul|mad|div|rem)[.](?:lo[.])?[su]64", ptx)),
        "calls": len(re.findall(r"\\bcall", ptx)),
        "instructions": len(re.findall(r"^\\s+(?:@\\S+ )?[a-z][a-z0-9]*[.][^;]*;", ptx, re.M)) / (2 * shape.steps),
        "registers": int(re.search(r"Used (\\d+) registers", log)[1]),
        "spills": [int(n) for n in re.findall(r"(\\d+) bytes (?:stack frame|spill)", log)],
        "memory": "".join({"ld": "L", "st": "S"}[m] for m in re.findall(r"\\b(ld|st)[.]global", ptx)),
    }))
"""


def _has_compiler() -> bool:
    program = "import numba_cuda, cuda.core; from numba.cuda.cudadrv import nvvm; nvvm.NVVM()"
    return subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("cc", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
def test_compiled_kernels_neither_spill_nor_compute_in_double(cc):
    if not _has_compiler():
        pytest.skip("numba-cuda and its compiler are not installed (the extra `cuda`)")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(list(cc))], cwd=paths.CODE, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(results) == 28
    for result in results:
        print(result["id"], result["registers"], "registers,", result["instructions"], "instructions a step")
        assert result["local"] == 0, result
        assert result["spills"] == [0, 0, 0], result
        assert result["double"] or result["f64"] == 0, result
        assert result["registers"] * result["threads"] <= 65536, result
        # What an element's place takes would otherwise take more than all the rest.
        assert result["calls"] == 0, result
        assert result["far"] or result["wide"] < result["steps"], result
        # Every load of a tile, the whole and the ragged, stands before its first store: between them none could be
        # moved past the other.
        assert re.fullmatch("L+S+L+S+", result["memory"]), result


def test_a_toolkit_that_is_not_found_is_an_obstacle_and_no_crash(numba_cuda, monkeypatch):
    """As cuda.pathfinder has it, whose error is no OSError."""

    def missing():
        raise RuntimeError("no libnvvm.so\nlooked in: ...")

    monkeypatch.setattr(numba_cuda.cuda, "is_available", missing)
    assert numba_cuda.unavailable() == "numba.cuda: no libnvvm.so (CUDA_HOME names the toolkit's folder)"


@pytest.mark.parametrize(("implementation", "obstacle"), [("NVIDIA", None), ("Built-in", "numba.cuda is numba's own")])
def test_numbas_own_cuda_in_numba_cudas_place_is_an_obstacle(numba_cuda, monkeypatch, implementation, obstacle):
    """Its launches are others, and fail at the first."""
    monkeypatch.setattr(numba_cuda.cuda, "is_available", lambda: True)
    monkeypatch.setattr(numba_cuda.cuda, "implementation", implementation)
    said = numba_cuda.unavailable()
    assert said is None if obstacle is None else said.startswith(obstacle)


def test_a_kernel_is_not_compiled_while_a_graph_is_captured(numba_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    z = torch.zeros(3, 1, 2)
    case = numba_cuda._case((z, z, None, None), None, None, None, False, False, (3, 1, 2, 2, 2))
    with pytest.raises(RuntimeError, match="pool: a kernel would be compiled while a CUDA graph is captured"):
        numba_cuda._compiled.__wrapped__("forward", case, 0)


# On a device

gpu = pytest.mark.gpu


@pytest.fixture
def numba_cuda():
    pytest.importorskip("numba.cuda")
    from qrnn.pooling import numba_cuda

    return numba_cuda


@pytest.fixture
def force(numba_cuda, monkeypatch):
    """Chooses the kernel by name instead of by the rule."""
    return lambda kernel: monkeypatch.setattr(numba_cuda, "forced_kernel", kernel)


def on_device(inputs: dict, upstream: tuple, dtype: torch.dtype, **options) -> dict:
    """`everything` on the device, its results on the CPU."""
    moved = {name: tensor.cuda() for name, tensor in inputs.items()}
    lengths = options.pop("lengths", None)
    got = everything(
        moved,
        tuple(u.cuda() for u in upstream),
        dtype,
        lengths=None if lengths is None else lengths.cuda(),
        backend="numba_cuda",
        **options,
    )
    return {name: tensor.cpu() for name, tensor in got.items()}


def lengths_of(steps: int, rows: int) -> torch.Tensor:
    """Lengths with 0 and T among them, where there are rows enough."""
    lengths = torch.randint(0, steps + 1, (rows,))
    lengths[0], lengths[-1] = steps, 0 if rows > 1 else steps
    return lengths


# The shape varies fastest: a serial kernel is compiled once for all shapes, a chunked one for each number of chunks
# that their steps fill. Of float32 every combination of what a case may have is compiled (64 kernels a mode and block
# shape), of the other types two.
@gpu
@pytest.mark.parametrize("shape", [*SHAPES, (300, 3, 65)], ids=lambda s: "T{}-B{}-C{}".format(*s))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_device_equals_reference_in_float64(dtype, kernel, mode, shape, force):
    force(kernel)
    steps, rows, _ = shape
    every = itertools.product((False, True), repeat=3)
    for initial, ragged, activated in every if dtype == torch.float32 else ((True, True, False), (False, False, True)):
        inputs = draw(mode, *shape, dtype=dtype, initial=initial)
        if activated:
            inputs = {n: g if n == "initial" else g.sigmoid() for n, g in inputs.items()}
        upstream = tuple(torch.randn(s).to(dtype).double() for s in (shape, shape[1:]))
        options = {"lengths": lengths_of(steps, rows) if ragged else None, "activated": activated}
        expected = everything(inputs, upstream, torch.float64, **options, backend="reference")
        compare(on_device(inputs, upstream, dtype, **options), expected, dtype)


@gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_device_reckons_places_in_64_bits_where_tensors_are_large(kernel, force, numba_cuda, monkeypatch):
    force(kernel)
    monkeypatch.setattr(numba_cuda, "FAR", 0)
    inputs = draw("ifo", 300, 3, 65, dtype=torch.float32, initial=True)
    upstream = tuple(torch.randn(shape).double() for shape in ((300, 3, 65), (3, 65)))
    options = {"lengths": lengths_of(300, 3)}
    expected = everything(inputs, upstream, torch.float64, **options, backend="reference")
    compare(on_device(inputs, upstream, torch.float32, **options), expected, torch.float32)


@gpu
@pytest.mark.slow
def test_device_pools_a_tensor_of_more_than_2_to_the_31_elements(force):
    """9 GB of gates. Rows are alike, so that the last, whose steps end beyond 2^31, is what the first is."""
    force("serial")
    one = torch.randn(300, 1, 128, device="cuda", dtype=torch.float16)
    rows = 2**31 // (300 * 128) + 99
    with torch.no_grad():
        h, last = qrnn.pool(*(one.repeat(1, rows, 1) for _ in range(2)))
    for got in (h, last.unsqueeze(0)):
        assert torch.equal(got[:, -1], got[:, 0])
    expected, _ = qrnn.pool(one, one)  # by the kernel with places of 32 bits, which may fuse other products and sums
    torch.testing.assert_close(h[:, -1:], expected)


@gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_device_gradcheck(kernel, force):
    force(kernel)
    inputs = {name: tensor.cuda().requires_grad_() for name, tensor in draw("ifo", 5, 2, 3).items()}
    lengths = torch.tensor([5, 2], device="cuda")
    assert torch.autograd.gradcheck(
        lambda *t: qrnn.pool(**dict(zip(inputs, t, strict=True)), lengths=lengths), tuple(inputs.values())
    )


@gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_device_zoneout_and_packed_gates(kernel, force):
    from qrnn.pooling import ops

    force(kernel)
    packed = torch.randn(40, 3, 4 * 33, device="cuda", dtype=torch.float64, requires_grad=True)
    results = []
    for backend in ("reference", "numba_cuda"):
        torch.manual_seed(1)
        h, last = ops.pool_packed(packed, "ifo", zoneout=0.3, backend=backend)
        results.append((h, last, *torch.autograd.grad(h.square().sum() + last.sum(), packed)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-11)


@gpu
@pytest.mark.parametrize("activated", [False, True], ids=["raw", "activated"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_device_takes_zoneout_and_gates_and_gradients_of_any_strides(kernel, activated, force):
    """Channels that are not adjacent, steps and rows swapped, and an upstream gradient that is one expanded row."""
    force(kernel)
    gates = [torch.rand(3, 33, 40, dtype=torch.float64, device="cuda").permute(2, 0, 1), *(
        torch.rand(3, 40, 33, dtype=torch.float64, device="cuda").transpose(0, 1) for _ in range(3)
    )]  # fmt: skip
    gates = [gate.detach().requires_grad_() for gate in gates]
    upstream = torch.randn(1, 1, 33, dtype=torch.float64, device="cuda").expand(40, 3, 33)
    results = []
    for backend in ("reference", "numba_cuda"):
        torch.manual_seed(1)
        h, last = qrnn.pool(*gates, zoneout=0.3, activated=activated, backend=backend)
        results.append((h, last, *torch.autograd.grad((h, last), gates, (upstream, torch.ones_like(last)))))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-11)


@gpu
@pytest.mark.parametrize("shape", [(0, 3, 5), (7, 0, 5), (7, 3, 0)], ids=lambda s: "T{}-B{}-C{}".format(*s))
def test_device_takes_nothing(shape):
    z, f = (torch.randn(shape, device="cuda", requires_grad=True) for _ in range(2))
    h, last = qrnn.pool(z, f)
    assert (h.shape, last.shape) == (shape, shape[1:])
    assert [g.shape for g in torch.autograd.grad(h.sum() + last.sum(), (z, f))] == [shape, shape]
    assert not last.any()


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_device_passes_nan_and_infinity_on_as_the_reference_does(kernel, dtype, force):
    """In every type: float32 takes exponentials and reciprocals from approximate instructions."""
    force(kernel)
    z, f = torch.randn(2, 40, 2, 33, device="cuda", dtype=dtype)
    z[5, 0, 3], f[7, 1, 4], z[9, 1, 8], f[11, 0, 9], f[12, 1, 10] = map(float, ("nan", "nan", "inf", "inf", "-inf"))
    limit = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    expected = qrnn.pool(z.double(), f.double(), backend="reference")
    for got, exact in zip(qrnn.pool(z, f), expected, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=limit, atol=limit, equal_nan=True)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_device_zones_out_and_reads_odd_places_in_every_type(kernel, dtype, force):
    """Gates that begin in memory one element beyond a multiple of anything."""
    force(kernel)
    shape = (70, 3, 65)
    gates = [torch.randn(1 + 70 * 3 * 65, device="cuda").to(dtype)[1:].view(shape) for _ in range(3)]
    upstream, results = torch.randn(shape, device="cuda").to(dtype), []
    for kind, backend in ((dtype, "numba_cuda"), (torch.float64, "reference")):
        leaves = [gate.detach().to(kind).requires_grad_() for gate in gates]
        torch.manual_seed(1)
        h, last = qrnn.pool(*leaves, zoneout=0.3, backend=backend)
        gradients = torch.autograd.grad(h, leaves, upstream.to(kind))
        results.append({"h": h, "last": last, **dict(zip("zfo", gradients, strict=True))})
    got, expected = ({name: tensor.detach().cpu() for name, tensor in result.items()} for result in results)
    compare(got, expected, dtype)


@gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_device_takes_lengths_out_of_range_as_clamped(kernel, force):
    force(kernel)
    z, f = torch.randn(2, 40, 2, 33, device="cuda")
    beyond, within = (torch.tensor(lengths, device="cuda") for lengths in ((49, -5), (40, 0)))
    for got, expected in zip(qrnn.pool(z, f, lengths=beyond), qrnn.pool(z, f, lengths=within), strict=True):
        assert torch.equal(got, expected)


@gpu
def test_device_is_compiled_without_a_graph_break():
    z, f, o = (torch.randn(20, 4, 33, device="cuda", requires_grad=True) for _ in range(3))

    def loss(z, f, o):
        h, last = qrnn.pool(z, f, o, zoneout=0.0)
        return h.square().sum() + last.sum()

    expected = torch.autograd.grad(loss(z, f, o), (z, f, o))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(z, f, o), (z, f, o))
    torch.testing.assert_close(got, expected)


@gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_device_extremes_and_determinism(kernel, force):
    force(kernel)
    signs = torch.tensor(list(itertools.product((-80.0, 0.0, 80.0), repeat=4)), dtype=torch.float64)
    inputs = {name: signs[:, k].view(1, 1, 81).repeat(35, 2, 1) for k, name in enumerate("zfoi")}
    upstream = torch.randn(35, 2, 81, dtype=torch.float64), torch.ones(2, 81, dtype=torch.float64)
    upstream = tuple(u.float().double() for u in upstream)
    expected = everything(inputs, upstream, torch.float64, backend="reference")
    first, second = (on_device(inputs, upstream, torch.float32) for _ in range(2))
    compare(first, expected, torch.float32)
    assert all(torch.equal(first[name], second[name]) for name in first)


@gpu
def test_device_takes_auto_and_side_streams():
    z, f = torch.randn(64, 8, 40, device="cuda"), torch.randn(64, 8, 40, device="cuda")
    expected, _ = qrnn.pool(z, f)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would read y before it is written
        y = z * 1
        got, _ = qrnn.pool(y, f)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, expected)


@gpu
def test_device_neither_synchronises_nor_breaks_graph_capture():
    z, f = (torch.randn(64, 8, 40, device="cuda", requires_grad=True) for _ in range(2))
    lengths = torch.full((8,), 64, device="cuda")

    def step() -> tuple:
        h, last = qrnn.pool(z, f, lengths=lengths)
        return h, *torch.autograd.grad(h.sum() + last.sum(), (z, f))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        z.copy_(torch.randn_like(z))
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


@gpu
def test_device_launches_in_a_thread_that_has_no_context_yet():
    """As autograd's may be: cuda.core, unlike torch, leaves it to its caller to have one."""
    z, f = torch.randn(2, 20, 4, 33, device="cuda")
    expected, _ = qrnn.pool(z, f)
    with ThreadPoolExecutor(1) as executor:
        got, _ = executor.submit(qrnn.pool, z, f).result()
    assert torch.equal(got, expected)


@gpu
@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_kernels_on_the_device_keep_everything_in_registers(dtype, kernel, name, numba_cuda):
    """With all that a case may have; the driver's word on what was loaded."""
    shape = numba_cuda.SHAPES[reference.state_dtype(dtype)][kernel]
    case = numba_cuda.Case(dtype, True, True, True, True, True, False, name == "forward", False, shape)
    assert numba_cuda._compiled(name, case, 0).get_local_mem_per_thread() == 0


@gpu
def test_device_and_reference_agree_on_state_dtype():
    z = torch.randn(5, 2, 8, device="cuda", dtype=torch.bfloat16)
    assert qrnn.pool(z, z)[1].dtype == reference.state_dtype(torch.bfloat16)


def case_of(numba_cuda, z):
    sizes = (*z.shape, *z.stride()[:2])
    return numba_cuda._case((z, z, None, None), None, None, None, False, False, sizes)


def test_tensors_that_reach_beyond_2_to_the_31_take_places_of_64_bits(numba_cuda):
    near, far = (torch.empty(2**15, rows, 512, device="meta") for rows in (127, 128))
    assert not case_of(numba_cuda, near).wide
    assert case_of(numba_cuda, far).wide
    view = torch.empty(2**15, 2, 4 * 8192, device="meta")[..., :8192]  # one of four gates side by side
    assert case_of(numba_cuda, view).wide


@pytest.mark.parametrize(("steps", "chunks"), [(32, 4), (33, 8), (64, 8), (65, 16), (128, 16), (512, 16)])
def test_a_block_has_no_more_chunks_than_the_steps_fill(numba_cuda, steps, chunks):
    z = torch.empty(steps, 8, 320, device="meta")
    assert case_of(numba_cuda, z).shape == (32, chunks, 8)


def test_bfloat16_on_a_device_that_cannot_round_to_it_says_so(numba_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    z = torch.empty(4, 2, 8, dtype=torch.bfloat16, device="meta")
    case = case_of(numba_cuda, z)
    with pytest.raises(RuntimeError, match=r"bfloat16 expected a device of .* \(8, 0\) or later, got \(7, 5\)"):
        numba_cuda._compiled("forward", case, 0)


def test_the_rule_chooses_by_columns_and_steps(numba_cuda):
    few, many = numba_cuda.RULE.columns, numba_cuda.RULE.columns + 1
    assert [numba_cuda.choose(few, t) for t in (1, numba_cuda.RULE.steps - 1)] == ["serial"] * 2
    assert numba_cuda.choose(few, numba_cuda.RULE.steps) == "chunked"
    assert numba_cuda.choose(many, 10**6) == "serial"
    assert numba_cuda.choose(1, 1) == "few"
    assert (
        {"serial", "few", "chunked"} == set(numba_cuda.SHAPES[torch.float32]) == set(numba_cuda.SHAPES[torch.float64])
    )
