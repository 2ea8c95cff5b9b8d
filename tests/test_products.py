"""Matrix products: both libraries against float64, whatever the processor."""

import pytest
import torch
from torch import nn

import qrnn
from qrnn import products
from qrnn.conv import conv_over_time

LIBRARIES = [False, pytest.param(True, marks=pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"))]  # fmt: skip


@pytest.fixture(params=LIBRARIES, ids=["torch", "oneDNN"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "ONEDNN", request.param)
    torch.manual_seed(0)


def laid_out(rows: int, columns: int, transposed: bool) -> torch.Tensor:
    return torch.randn(columns, rows).t() if transposed else torch.randn(rows, columns)


@torch.no_grad()  # with gradients times and add_times are torch's own
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 7), (33, 17, 129)])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_times_agrees_with_float64_in_every_layout(library, shape, transposed):
    rows, inner, columns = shape
    a, b, bias = laid_out(rows, inner, transposed[0]), laid_out(inner, columns, transposed[1]), torch.randn(columns)
    exact = a.double() @ b.double()
    torch.testing.assert_close(products.times(a, b).double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(products.times(a, b, bias).double(), exact + bias.double(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rows", [0, 1, 9, 10, 11, 23])
def test_add_times_adds_in_place_over_any_number_of_rows(library, monkeypatch, rows):
    monkeypatch.setattr(products, "PIECE", 10 * 5 * 4)  # bytes of 10 rows
    whole, a, b = torch.randn(rows + 2, 5), torch.randn(rows, 4), torch.randn(4, 5)
    expected = whole[1:-1].double() + a.double() @ b.double()
    edges = whole[[0, -1]].clone()
    products.add_times(whole[1:-1], a, b)
    torch.testing.assert_close(whole[1:-1].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(whole[[0, -1]], edges)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_layer_with_its_gradients(library, bias):
    layer = products.Linear(6, 9, bias=bias)
    exact = nn.Linear(6, 9, bias=bias).double()
    exact.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    x = torch.randn(3, 4, 6, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    upstream = torch.randn(3, 4, 9)
    y, y_exact = layer(x), exact(wide)
    y.backward(upstream)
    y_exact.backward(upstream.double())
    pairs = [(y, y_exact), (x.grad, wide.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(layer.parameters(), exact.parameters(), strict=True)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_linear_follows_autocast(library):
    layer, x = products.Linear(6, 9), torch.randn(3, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("width", [1, 2, 4])
def test_both_libraries_give_the_convolution_and_its_gradients(width, monkeypatch):
    torch.manual_seed(0)
    x, tail = torch.randn(9, 3, 5), torch.randn(width - 1, 3, 5)
    weight, bias, upstream = torch.randn(width, 5, 8), torch.randn(8), torch.randn(9, 3, 8)
    results = []
    for onednn in (False, True):
        monkeypatch.setattr(products, "ONEDNN", onednn)
        inputs = [tensor.clone().requires_grad_() for tensor in (x, tail, weight, bias)]
        y = conv_over_time(inputs[0], inputs[2], inputs[3], tail=inputs[1])
        y.backward(upstream)
        results.append([y, *(tensor.grad for tensor in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_compiled_layer_takes_torchs_own_products(monkeypatch):
    """The compiler has no lowering for oneDNN's product of weights that change."""
    monkeypatch.setattr(products, "ONEDNN", True)
    layer, x = products.Linear(6, 9), torch.randn(3, 4, 6)
    graphs = []

    def look(graph, _):
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    compiled = torch.compile(layer, backend=look, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    assert graphs
    assert not any("_linear_pointwise" in graph for graph in graphs)


def test_onednn_is_left_alone_where_torch_is_told_so(monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", True)
    a = torch.randn(3, 4)
    assert products._to_onednn(a) == torch.backends.mkldnn.enabled
    with torch.backends.mkldnn.flags(enabled=False):
        assert not products._to_onednn(a)


def test_linear_gives_gradients_of_single_rows(library):
    layer, x = products.Linear(6, 9), torch.randn(4, 6)
    parameters = dict(layer.named_parameters())

    def loss(parameters, row):
        return torch.func.functional_call(layer, parameters, (row,)).square().sum()

    by_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for b, row in enumerate(x):
        expected = torch.autograd.grad(loss(parameters, row), list(parameters.values()))
        for got, want in zip(by_row.values(), expected, strict=True):
            torch.testing.assert_close(got[b], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", [lambda: products.Linear(3, 4), lambda: qrnn.QRNN(3, 4, backend="reference")])
def test_second_derivatives_in_float32_are_those_of_float64(library, module):
    """Through either library; oneDNN's operator by itself has no gradient at all."""
    layer, x, found = module(), torch.randn(5, 2, 3), []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        output = layer.to(dtype)(leaf)
        output = output[0] if isinstance(output, tuple) else output
        (first,) = torch.autograd.grad((output**3).sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad((first**2).sum(), [leaf, *layer.parameters()]))
    for got, exact in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)
