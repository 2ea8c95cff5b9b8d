"""The pooling: its definition by hand, and every backend against it in float64."""

import itertools
import math
import multiprocessing
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qrnn
from qrnn.pooling import numba_cpu, ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EVERY = [name for name in qrnn.backends() if name != "numba_cuda"]  # those of CPU tensors
FUSED = [name for name in EVERY if name != "reference"]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 2e-14, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Allowed error against float64, relative to the largest magnitude (at least 1) of the tensor compared."""
MODES = {"f": (), "fo": ("o",), "if": ("i",), "ifo": ("o", "i")}


def by_hand(z, f, o=None, i=None, initial=None, lengths=None):
    """Eq. 3, 4 and 5 in numpy, one scalar at a time, on activated gates."""
    steps, rows, channels = z.shape
    h, c = np.zeros(z.shape), np.zeros((rows, channels)) if initial is None else initial.copy()
    for b, k in itertools.product(range(rows), range(channels)):
        for t in range(steps if lengths is None else lengths[b]):
            new = (1 - f[t, b, k]) if i is None else i[t, b, k]
            c[b, k] = f[t, b, k] * c[b, k] + new * z[t, b, k]
            h[t, b, k] = c[b, k] * (1 if o is None else o[t, b, k])
    return h, c


def draw(mode, steps, rows, channels, dtype=torch.float64, initial=True, scale=3.0):
    """Pre-activations by name, with an initial state."""
    names = ("z", "f", *MODES[mode])
    gates = {name: (torch.randn(steps, rows, channels, dtype=torch.float64) * scale).to(dtype) for name in names}
    if initial:
        gates["initial"] = torch.randn(rows, channels, dtype=torch.float64).to(dtype)
    return gates


def everything(inputs, upstream, dtype, **options):
    """h, last and the gradient of every input, for inputs cast to dtype."""
    leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}
    h, last = qrnn.pool(**leaves, **options)
    gradients = torch.autograd.grad(
        (h, last), list(leaves.values()), (upstream[0].to(h.dtype), upstream[1].to(last.dtype))
    )
    return {
        "h": h.detach(),
        "last": last.detach(),
        **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)},
    }


def compare(got, expected, dtype):
    for name, truth in expected.items():
        assert got[name].shape == truth.shape, name
        scale = max(1.0, float(truth.abs().max())) if truth.numel() else 1.0
        error = float((got[name].double() - truth).abs().max()) / scale if truth.numel() else 0.0
        assert error <= TOLERANCE[dtype], f"{name}: error {error:.3g} in {dtype}"


def test_backends_lists_the_reference_first():
    assert qrnn.backends()[:2] == ["reference", "numba"]
    assert ("numba_cuda" in qrnn.backends()) <= torch.cuda.is_available()


@pytest.mark.parametrize("backend", EVERY)
def test_equation_3_on_paper(backend):
    """h_1 = .25 * 8 + .75 * 4 = 5; h_2 = .5 * 5 + .5 * -1 = 2; f weighs the OLD state."""
    z = torch.tensor([4.0, -1.0], dtype=torch.float64).view(2, 1, 1)
    f = torch.tensor([0.25, 0.5], dtype=torch.float64).view(2, 1, 1)
    initial = torch.tensor([[8.0]], dtype=torch.float64)
    h, last = qrnn.pool(z, f, initial=initial, activated=True, backend=backend)
    assert h.flatten().tolist() == [5.0, 2.0]
    assert last.item() == 2.0


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("mode", MODES)
def test_equations_3_4_5_by_hand(mode, backend):
    gates = draw(mode, 5, 3, 4)
    lengths = [5, 0, 3]
    h, last = qrnn.pool(**gates, lengths=torch.tensor(lengths), backend=backend)
    active = {
        name: (np.tanh(g) if name == "z" else 1 / (1 + np.exp(-g)) if name != "initial" else g)
        for name, g in ((name, tensor.numpy()) for name, tensor in gates.items())
    }
    expected_h, expected_last = by_hand(**active, lengths=lengths)
    np.testing.assert_allclose(h.numpy(), expected_h, atol=1e-14)
    np.testing.assert_allclose(last.numpy(), expected_last, atol=1e-14)


SHAPES = [(1, 1, 1), (7, 3, 5), (33, 5, 67), (4, 2, 1030), (11, 40, 41)]


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("activated", [False, True], ids=["raw", "activated"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-B{}-C{}".format(*s))
def test_backend_equals_reference_in_float64(shape, mode, activated, dtype, backend):
    steps, rows, channels = shape
    for initial, ragged in itertools.product((False, True), repeat=2):
        inputs = draw(mode, *shape, dtype=dtype, initial=initial)
        if activated:
            inputs = {n: g if n == "initial" else g.tanh() if n == "z" else g.sigmoid() for n, g in inputs.items()}
        lengths = torch.randint(0, steps + 1, (rows,)) if ragged else None
        if ragged and rows > 2:
            lengths[:2] = torch.tensor([0, steps])
        upstream = torch.randn(shape, dtype=torch.float64), torch.randn(rows, channels, dtype=torch.float64)
        upstream = tuple(u.to(dtype).double() for u in upstream)
        options = {"lengths": lengths, "activated": activated}
        expected = everything(inputs, upstream, torch.float64, **options, backend="reference")
        compare(everything(inputs, upstream, dtype, **options, backend=backend), expected, dtype)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_keeps_its_state_in_float32(dtype, backend):
    inputs = draw("fo", 40, 3, 9, dtype=dtype)
    upstream = tuple(torch.randn(s, dtype=torch.float64).to(dtype).double() for s in ((40, 3, 9), (3, 9)))
    expected = everything(inputs, upstream, torch.float64, backend="reference")
    got = everything(inputs, upstream, dtype, backend=backend)
    assert (got["h"].dtype, got["last"].dtype, got["dz"].dtype) == (dtype, torch.float32, dtype)
    compare(got, expected, dtype)
    compare({"last": got["last"]}, {"last": expected["last"]}, torch.float32)  # rounded at each step it is 1e-3 off


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode, backend):
    inputs = draw(mode, 4, 2, 3)
    lengths = torch.tensor([4, 2])
    leaves = tuple(tensor.requires_grad_() for tensor in inputs.values())
    assert torch.autograd.gradcheck(
        lambda *t: qrnn.pool(**dict(zip(inputs, t, strict=True)), lengths=lengths, backend=backend), leaves
    )


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("mode", MODES)
def test_zoneout_in_a_kernel_equals_the_reference(mode, backend):
    for activated in (False, True):
        inputs = draw(mode, 9, 4, 33)
        if activated:
            inputs = {n: g if n == "initial" else g.sigmoid() for n, g in inputs.items()}
        upstream = torch.randn(9, 4, 33, dtype=torch.float64), torch.randn(4, 33, dtype=torch.float64)
        results = []
        for name in ("reference", backend):
            torch.manual_seed(3)
            results.append(everything(inputs, upstream, torch.float64, zoneout=0.4, activated=activated, backend=name))
        compare(results[1], results[0], torch.float64)


@pytest.mark.parametrize("backend", EVERY)
def test_equation_6_drops_1_minus_f_without_rescaling(backend):
    """A zoned-out channel copies its state; every other one is as without zoneout."""
    gates = draw("f", 1, 50, 400)
    plain, _ = qrnn.pool(**gates, backend=backend)
    h, _ = qrnn.pool(**gates, zoneout=0.1, backend=backend)
    zoned = h[0] == gates["initial"]
    assert torch.equal(h[0][~zoned], plain[0][~zoned])
    # 20,000 draws: the frequency's standard deviation is 0.0021
    assert abs(zoned.double().mean().item() - 0.1) < 0.009


@pytest.mark.parametrize("laid_out", [
    lambda mask: mask.transpose(0, 2).contiguous().transpose(0, 2), lambda mask: mask[..., :1].expand(-1, -1, 33),
], ids=["channels apart", "expanded"])  # fmt: skip
def test_the_operator_takes_a_mask_in_any_layout(laid_out):
    z, f = (torch.randn(9, 4, 33, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = laid_out(torch.rand(9, 4, 33) < 0.4)
    results = []
    for zoned in (mask, mask.contiguous()):
        h, last, _ = torch.ops.qrnn.pool(z, f, None, None, None, zoned, None, False, True)
        results.append((h, last, *torch.autograd.grad(h.sum() + last.sum(), (z, f))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", EVERY)
def test_zoneout_does_nothing_in_evaluation(backend):
    gates = draw("fo", 6, 3, 8)
    before = torch.get_rng_state()
    h, last = qrnn.pool(**gates, zoneout=0.5, training=False, backend=backend)
    plain = qrnn.pool(**gates, backend=backend)
    assert torch.equal(h, plain[0])
    assert torch.equal(last, plain[1])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("backend", EVERY)
def test_forget_gate_exactly_0_and_1(backend):
    gates = draw("f", 6, 2, 8)
    for value, expected in ((0.0, gates["z"]), (1.0, gates["initial"].expand(6, 2, 8))):
        f = torch.full_like(gates["f"], value).requires_grad_()
        h, _ = qrnn.pool(gates["z"], f, initial=gates["initial"], activated=True, backend=backend)
        assert torch.equal(h, expected)
        h.sum().backward()
        assert f.grad.isfinite().all()


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_extreme_pre_activations(dtype, backend):
    signs = torch.tensor(list(itertools.product((-80.0, 0.0, 80.0), repeat=4)), dtype=torch.float64)  # (81, 4)
    inputs = {name: signs[:, k].view(1, 1, 81).repeat(3, 2, 1) for k, name in enumerate("zfoi")}
    upstream = (
        torch.randn(3, 2, 81, dtype=torch.float64).to(dtype).double(),
        torch.ones(2, 81, dtype=torch.float64),
    )
    expected = everything(inputs, upstream, torch.float64, backend="reference")
    got = everything(inputs, upstream, dtype, backend=backend)
    assert all(tensor.isfinite().all() for tensor in got.values())
    compare(got, expected, dtype)


@pytest.mark.parametrize("backend", EVERY)
def test_infinite_and_missing_values_come_through(backend):
    z, f = torch.tensor([math.inf, -math.inf, math.nan, 0.0]).view(1, 1, 4), torch.zeros(1, 1, 4)
    h, _ = qrnn.pool(z, f, backend=backend)
    np.testing.assert_array_equal(h.flatten().numpy(), np.array([0.5, -0.5, np.nan, 0.0], np.float32))
    h, _ = qrnn.pool(torch.ones(1, 1, 2), torch.tensor([[[math.nan, -math.inf]]]), backend=backend)
    assert h.flatten().isnan().tolist() == [True, False]


@pytest.mark.parametrize("backend", FUSED)
def test_activations_are_accurate_in_relative_terms(backend):
    """Small candidates keep their digits: tanh is not made of two nearly equal numbers."""
    z = torch.logspace(-30, 1.9, 500, dtype=torch.float64)
    z = torch.cat([z, -z]).view(1, 1, -1)
    for dtype, tolerance in ((torch.float32, 4e-7), (torch.float64, 6e-16)):
        x = z.to(dtype)
        h, _ = qrnn.pool(x, torch.full_like(x, -100.0), backend=backend)
        truth = torch.tanh(x.double())
        assert ((h.double() - truth).abs() / truth.abs()).max() < tolerance
        h, _ = qrnn.pool(torch.ones_like(x), torch.zeros_like(x), x, activated=False, backend=backend)
        truth = math.tanh(1.0) * 0.5 / (1 + torch.exp(-x.double()))
        assert ((h.double() - truth).abs() / truth).max() < 2 * tolerance + 1e-15


@pytest.mark.parametrize("backend", EVERY)
def test_beyond_its_length_a_row_is_frozen_and_silent(backend):
    """Output and gradients are 0 there, last is the state at the length, and the padding's values do not
    matter.
    """
    gates, lengths = draw("ifo", 6, 3, 5), torch.tensor([0, 2, 6])
    upstream = torch.randn(6, 3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    got = everything(gates, upstream, torch.float64, lengths=lengths, backend=backend)
    assert torch.equal(got["last"][0], gates["initial"][0])
    assert torch.equal(got["dinitial"][0], upstream[1][0])
    for name in ("h", "dz", "df", "do", "di"):
        assert (got[name][2:, 1] == 0).all(), name
        assert (got[name][:, 0] == 0).all(), name
    short = {name: g[:2, 1:2] if name != "initial" else g[1:2] for name, g in gates.items()}
    alone = everything(short, (upstream[0][:2, 1:2], upstream[1][1:2]), torch.float64, backend=backend)
    compare({"h": got["h"][:2, 1:2], "dz": got["dz"][:2, 1:2]}, {n: alone[n] for n in ("h", "dz")}, torch.float64)
    poisoned = {name: g.clone() for name, g in gates.items()}
    for name in ("z", "f", "o", "i"):
        poisoned[name][2:, 1] = 1e30
    again = everything(poisoned, upstream, torch.float64, lengths=lengths, backend=backend)
    assert all(torch.equal(got[name], again[name]) for name in got)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 0, 4), (5, 3, 0)], ids=["T0", "B0", "C0"])
def test_empty_axes(shape, backend):
    gates = draw("fo", *shape)
    h, last = qrnn.pool(**gates, backend=backend)
    assert h.shape == shape
    assert torch.equal(last, gates["initial"]) if shape[0] == 0 else last.shape == shape[1:]


@pytest.mark.parametrize("backend", EVERY)
def test_strides_do_not_matter(backend):
    """Transposed, sliced and expanded inputs and gradients, and (B, T, C)."""
    gates = draw("ifo", 6, 4, 10)
    upstream = torch.randn(6, 4, 10, dtype=torch.float64), torch.zeros(4, 10, dtype=torch.float64)
    expected = everything(gates, upstream, torch.float64, backend=backend)
    odd = {name: g.transpose(0, -1).contiguous().transpose(0, -1) for name, g in gates.items()}
    compare(everything(odd, upstream, torch.float64, backend=backend), expected, torch.float64)
    wide = {name: g.repeat_interleave(2, -1)[..., ::2] for name, g in gates.items()}
    compare(everything(wide, upstream, torch.float64, backend=backend), expected, torch.float64)
    flipped = {name: g if name == "initial" else g.transpose(0, 1).contiguous() for name, g in gates.items()}
    got = everything(
        flipped, (upstream[0].transpose(0, 1), upstream[1]), torch.float64, batch_first=True, backend=backend
    )
    compare({n: t if t.dim() == 2 else t.transpose(0, 1) for n, t in got.items()}, expected, torch.float64)
    ones = torch.ones(1, dtype=torch.float64)
    full = everything(gates, (torch.ones(6, 4, 10), torch.ones(4, 10)), torch.float64, backend=backend)
    expanded = everything(gates, (ones.expand(6, 4, 10), ones.expand(4, 10)), torch.float64, backend=backend)
    compare(expanded, full, torch.float64)
    h, _ = qrnn.pool(**{name: g.requires_grad_() for name, g in gates.items()}, backend=backend)
    h.sum().backward()  # an expanded gradient of autograd's own making


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("pooling", MODES)
def test_packed_gates_equal_separate_ones(pooling, backend):
    gates, initial = draw(pooling, 7, 3, 6, initial=False), torch.randn(3, 6, dtype=torch.float64)
    parts = [gates[name].requires_grad_() for name in "zfio" if name in gates]
    packed = torch.cat(parts, -1).detach().requires_grad_()
    h, last = ops.pool_packed(packed, pooling, initial=initial, backend=backend)
    expected_h, expected_last = qrnn.pool(**gates, initial=initial, backend="reference")
    torch.testing.assert_close((h, last), (expected_h, expected_last), rtol=0, atol=1e-14)
    upstream = torch.randn_like(h)
    gradients = torch.autograd.grad(expected_h, parts, upstream)
    torch.testing.assert_close(
        torch.autograd.grad(h, packed, upstream)[0], torch.cat(gradients, -1), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("backend", EVERY)
def test_bit_identical_twice_and_for_any_number_of_threads(backend, monkeypatch):
    monkeypatch.setattr(numba_cpu, "_SERIAL_ELEMENTS", 1)  # threads at this small shape too
    shares, asked = set(), numba_cpu._pool_of
    monkeypatch.setattr(numba_cpu, "_pool_of", lambda count: (shares.add(count), asked(count))[1])
    gates = draw("fo", 64, 12, 65, dtype=torch.float32)
    upstream = torch.randn(64, 12, 65), torch.randn(12, 65)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (2, 2, 1, 3):
            torch.set_num_threads(count)
            results.append(everything(gates, upstream, torch.float32, backend=backend))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)
    assert shares == ({1, 2} if backend == "numba" else set())


@pytest.mark.parametrize("activated", [False, True], ids=["raw", "activated"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", FUSED)
def test_a_decaying_gradient_ends_in_zeros_not_in_denormal_numbers(mode, activated, backend):
    """f = 1/8 divides the flow by 8 a step: after 50 of 400 steps it would be denormal in float32."""
    gates = {name: torch.rand(400, 2, 9) for name in ("z", "f", *MODES[mode])}
    gates["f"] = torch.full((400, 2, 9), 0.125 if activated else -math.log(7.0))
    leaves = {name: tensor.requires_grad_() for name, tensor in gates.items()}
    _, last = qrnn.pool(**leaves, activated=activated, backend=backend)
    z, f = torch.autograd.grad(last.sum(), (leaves["z"], leaves["f"]), allow_unused=True)
    for gradient in (z, f):
        size = gradient.abs()
        assert size[:300].max() == 0
        assert size[size > 0].min() >= torch.finfo(torch.float32).tiny


def _last_output(z, f):
    return qrnn.pool(z, f, backend="numba")[0][-1, 0, :8].tolist()


def test_a_forked_child_pools_after_its_parent_did():
    """Only the pooling: torch's own OpenMP regions may hang in such a child, so it must enter none of them."""
    torch.use_deterministic_algorithms(False)  # filling memory with NaN would be such a region
    z, f = torch.randn(64, 16, 64), torch.randn(64, 16, 64)
    expected = _last_output(z, f)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=lambda: queue.put(_last_output(z, f)), daemon=True)
    child.start()
    assert queue.get(timeout=20) == expected
    child.join(20)
    assert child.exitcode == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 70), st.sampled_from(list(MODES)), st.data())
def test_any_shape(steps, rows, channels, mode, data):
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, steps), min_size=rows, max_size=rows)))
    inputs = draw(mode, steps, rows, channels)
    upstream = torch.randn(steps, rows, channels).double(), torch.randn(rows, channels).double()
    expected = everything(inputs, upstream, torch.float64, lengths=lengths, backend="reference")
    compare(everything(inputs, upstream, torch.float64, lengths=lengths, backend="auto"), expected, torch.float64)


def test_a_second_derivative_of_a_kernel_is_refused_and_of_the_reference_right():
    inputs = draw("fo", 3, 2, 2)
    leaves = tuple(tensor.requires_grad_() for tensor in inputs.values())
    assert torch.autograd.gradgradcheck(
        lambda *t: qrnn.pool(**dict(zip(inputs, t, strict=True)), backend="reference")[0], leaves
    )
    h, _ = qrnn.pool(**inputs, backend="numba")
    (first,) = torch.autograd.grad(h.sum(), inputs["z"], create_graph=True)
    with pytest.raises(RuntimeError, match="second; use backend='reference'"):
        first.sum().backward()


@pytest.mark.parametrize("backend", FUSED)
def test_torch_compile_takes_it_without_a_graph_break(backend):
    """Dynamo and autograd are traced; what a compiler makes of the rest is not this repository's."""
    gates = {name: tensor.requires_grad_() for name, tensor in draw("fo", 9, 3, 5, dtype=torch.float32).items()}
    upstream = torch.randn(9, 3, 5)

    def step(**inputs):
        h, last = qrnn.pool(**inputs, backend=backend)
        return h * 2, last

    torch.use_deterministic_algorithms(False)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for function in (step, compiled):
        h, last = function(**gates)
        gradients = torch.autograd.grad((h, last.sum()), list(gates.values()), (upstream, torch.ones(())))
        results = (h, last, *gradients)
        if function is step:
            expected = results
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


def test_under_autocast_a_layers_gates_come_in_half_precision():
    layer = qrnn.QRNN(6, 8, num_layers=1)
    x = torch.randn(7, 3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, _ = layer(x)
        h.float().sum().backward()
    exact, _ = layer(x)
    assert h.dtype == torch.bfloat16
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert (h.float() - exact).abs().max() < TOLERANCE[torch.bfloat16]


def test_torch_func_is_for_the_reference_alone_and_the_error_says_so():
    z, f = torch.randn(4, 2, 3), torch.randn(4, 2, 3)

    def loss(z, backend):
        return qrnn.pool(z, f, backend=backend)[0].square().sum()

    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, "numba"), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(z, "reference"), expected)
    with pytest.raises(RuntimeError, match=r"pool: expected no torch.func transform.*use backend='reference'"):
        torch.func.grad(loss)(z, "numba")
    with pytest.raises(RuntimeError, match=r"pool: expected no torch.func transform"):
        torch.func.vmap(lambda z: qrnn.pool(z, f)[0])(z.expand(5, 4, 2, 3))


def test_registration_holds_torchs_contract():
    gates = tuple(tensor.requires_grad_() for tensor in draw("ifo", 3, 2, 4).values())
    torch.library.opcheck(
        torch.ops.qrnn.pool.default,
        (*gates, None, torch.tensor([3, 1]), False, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    packed = torch.randn(3, 2, 12, requires_grad=True)
    torch.library.opcheck(
        torch.ops.qrnn.pool_packed.default,
        (packed, None, None, None, True, False, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


Z = torch.zeros(3, 2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": Z[0]}, r"z: expected 3 axes.*got shape \(2, 4\)"),
        ({"z": Z.int()}, r"z: expected float32.*got torch.int32"),
        ({"f": Z[:2]}, r"f: expected z's shape \(3, 2, 4\), got \(2, 2, 4\)"),
        ({"o": Z.double()}, r"o: expected z's dtype torch.float32, got torch.float64"),
        ({"i": Z.to("meta")}, r"i: expected z's device cpu, got meta"),
        ({"initial": Z}, r"initial: expected shape \(B, C\) = \(2, 4\), got \(3, 2, 4\)"),
        ({"initial": Z[0].double()}, r"initial: expected dtype torch.float32, got torch.float64"),
        ({"zoneout": 1.0}, r"zoneout: expected a probability in \[0, 1\), got 1.0"),
        ({"zoneout": -0.1}, r"zoneout: expected .*got -0.1"),
        ({"zoneout": math.nan}, r"zoneout: expected .*got nan"),
        ({"lengths": torch.tensor([1, 4])}, r"lengths: expected values in \[0, T\] = \[0, 3\], got 4"),
        ({"lengths": torch.tensor([-1, 3])}, r"lengths: expected values .*got -1"),
        (
            {"lengths": torch.tensor([1.0, 2.0])},
            r"lengths: expected int64 of shape \(B,\) = \(2,\), got torch.float32",
        ),
        ({"lengths": torch.tensor([1])}, r"lengths: expected int64 of shape .*of \(1,\)"),
        ({"backend": "cupy"}, r"backend: expected auto or one of reference, numba, numba_cuda, got 'cupy'"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        qrnn.pool(**{"z": Z, "f": Z, **change})


def test_a_backend_that_cannot_run_raises(monkeypatch):
    meta = Z.to("meta")
    with pytest.raises(RuntimeError, match="'numba' runs on CPU tensors, got tensors on meta"):
        qrnn.pool(meta, meta, backend="numba")
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    assert qrnn.backends() == ["reference"]
    with pytest.raises(
        RuntimeError,
        match=r"'numba' was requested but cannot run here \(numba is not installed\); available: reference$",
    ):
        qrnn.pool(Z, Z, backend="numba")
    with pytest.warns(UserWarning, match=r"'numba' cannot run here \(numba is not installed\); .*'reference'"):
        qrnn.pool(Z, Z)


def test_backward_fills_no_tensor_for_an_output_without_a_gradient():
    """torch would fill one as large as h for c, which has none, a fifth of the time that backward takes."""
    z, f, o = (torch.randn(30, 4, 50, requires_grad=True) for _ in range(3))
    h, last = qrnn.pool(z, f, o)
    for output in (h, last):
        with torch.profiler.profile(record_shapes=True) as profiler:
            torch.autograd.grad(output.sum(), (z, f, o), retain_graph=True)
        filled = [event.input_shapes[0] for event in profiler.key_averages(True) if event.key == "aten::zero_"]
        assert [30, 4, 50] not in filled


def test_how_a_backend_is_found_is_not_traced(monkeypatch):
    """Looking for CUDA imports modules and asks drivers, which torch.compile cannot trace."""

    def looks_around():
        torch._dynamo.graph_break()
        return "cannot run here"

    monkeypatch.setattr(ops, "_cuda_obstacle", looks_around)
    traced = torch.compile(lambda x: x + len(ops.obstacle("numba_cuda")), fullgraph=True, backend="eager")
    assert traced(torch.zeros(1)).item() == len("cannot run here")


def test_a_numba_cuda_that_does_not_load_is_an_obstacle(monkeypatch):
    def import_module(name, package=None):
        raise AttributeError("module 'numpy' has no attribute 'row_stack'")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "find_spec", lambda name: True)
    monkeypatch.setattr(ops, "import_module", import_module)
    assert ops._cuda_obstacle.__wrapped__() == (
        "numba-cuda is not loaded: AttributeError: module 'numpy' has no attribute 'row_stack'"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_cuda_backend_says_why_it_cannot_run():
    with pytest.raises(RuntimeError, match=r"'numba_cuda' was requested .*\(torch finds no CUDA device\)"):
        qrnn.pool(Z, Z, backend="numba_cuda")


def test_no_mode_of_the_cpu_kernels_falls_out_of_vector_code(one_seed_one_thread):
    """One loop that is not vectorised takes eight times as long; no mode has twice the arithmetic of fo-pooling."""

    def backward_ms(parts, zoneout):
        gates = {name: gate.requires_grad_() for name, gate in draw(parts, 64, 16, 256, torch.float32).items()}
        h, _ = qrnn.pool(**gates, zoneout=zoneout, backend="numba")
        upstream, times = torch.randn(h.shape), []
        for _ in range(8):
            begin = time.perf_counter()
            torch.autograd.grad(h, tuple(gates.values()), upstream, retain_graph=True)
            times.append(1e3 * (time.perf_counter() - begin))
        return min(times)

    modes = [(parts, zoneout) for parts in MODES for zoneout in (0.0, 0.3)]
    times = {mode: backward_ms(*mode) for mode in modes}
    assert max(times.values()) < 3.5 * times["fo", 0.0], times
