"""The binary operators: reference by hand, registration, gradient, compilation, arguments."""

import itertools

import pytest
import torch

from optimum_slim import _kernels as kernels


FORMS = ["plain", "offset", "columns", "offset+columns"]
PACKED = ("weight", "salient", "scale", "offset", "columns")


def make_layer(form="offset+columns", outs=6, columns=20, group_size=8, *, dtype=torch.float32):
    """The arguments of `binary_linear` after x."""
    generator = torch.Generator().manual_seed(0)
    groups = -(-columns // group_size)
    return {
        "weight": kernels.pack_signs(torch.rand(outs, 2, columns, generator=generator) < 0.5),
        "salient": kernels.pack_signs(torch.rand(columns, generator=generator) < 0.3),
        "scale": torch.rand(outs, groups, 4, generator=generator).to(dtype),
        "offset": torch.randn(outs, groups, 3, generator=generator).to(dtype) if "offset" in form else None,
        "columns": torch.rand(2, columns, generator=generator).to(dtype) if "columns" in form else None,
        "bias": torch.randn(outs, generator=generator).to(dtype),
        "group_size": group_size,
    }


def dense_of(layer, columns=20):
    return kernels.binary_dense(*(layer[name] for name in PACKED), columns, layer["group_size"])


@pytest.mark.parametrize("form", FORMS)
def test_dense_one_weight_at_a_time(form):
    """The formulas of the layout, written as they are drawn, from numbers stored in 16 bits."""
    layer = make_layer(form, dtype=torch.float16)
    minus, salient = kernels.unpack_signs(layer["weight"], 20), kernels.unpack_signs(layer["salient"], 20)
    scale = layer["scale"].float()
    offset = torch.zeros(6, 3, 3) if layer["offset"] is None else layer["offset"].float()
    factor = torch.ones(2, 20) if layer["columns"] is None else layer["columns"].float()
    dense = dense_of(layer)
    for n, k in itertools.product(range(6), range(20)):
        g, t = k // 8, int(minus[n, 1, k])
        s, second = (-1.0 if minus[n, plane, k] else 1.0 for plane in (0, 1))
        if salient[k]:
            first_order = offset[n, g, 2] + scale[n, g, 2] * factor[0, k] * s
            assert dense[n, k] == first_order + scale[n, g, 3] * factor[1, k] * second
        else:
            assert dense[n, k] == offset[n, g, t] + scale[n, g, t] * factor[t, k] * s
    for dtype in (torch.bfloat16, torch.float16):
        narrow = kernels.binary_dense(*(layer[name] for name in PACKED), 20, 8, dtype)
        assert torch.equal(narrow, dense.to(dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(20,), (0, 20), (2, 0, 20), (1, 20), (2, 3, 20), (30, 20)], ids=str)
def test_linear_is_the_dense_one(shape, form):
    layer, x = make_layer(form), torch.randn(shape)
    y = kernels.binary_linear(x, **layer)
    assert y.shape == (*shape[:-1], 6)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dense_of(layer), layer["bias"]))


@pytest.mark.parametrize("form", ["plain", "offset+columns"])
def test_opcheck(form):
    layer = make_layer(form)
    for x in (torch.randn(3, 20, requires_grad=True), torch.randn(2, 20, dtype=torch.bfloat16)):
        torch.library.opcheck(kernels.binary_linear, (x, *layer.values()))
    packed = [layer[name] for name in PACKED]
    torch.library.opcheck(kernels.binary_linear_dx, (torch.randn(3, 6), *packed, 20, 8))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend):
    layer = make_layer()

    def model(x):
        return torch.relu(kernels.binary_linear(x * 2, **layer)).sum()

    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (1, 7):
        x = torch.randn(tokens, 20, requires_grad=True)
        loss = compiled(x)
        torch.testing.assert_close(loss, model(x))
        (gradient,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(gradient, torch.autograd.grad(model(x), x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_the_dense_one(form, dtype):
    layer = make_layer(form)
    for tokens in (1, 3, 40):
        x = torch.randn(2, tokens, 20, dtype=dtype, requires_grad=True)
        dy = torch.randn(2, tokens, 6, dtype=dtype)
        (gradient,) = torch.autograd.grad(kernels.binary_linear(x, **layer), x, dy)
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, (dy.float() @ dense_of(layer)).to(dtype))


def test_backward_keeps_only_packed_tensors():
    layer = make_layer()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        kernels.binary_linear(torch.randn(100, 20, requires_grad=True), **layer)
    assert {tensor.data_ptr() for tensor in saved} == {layer[name].data_ptr() for name in PACKED}


def test_other_devices_have_shapes():
    on_meta = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in make_layer().items()}
    y = kernels.binary_linear(torch.empty(2, 20, device="meta", dtype=torch.float16), **on_meta)
    assert y.shape == (2, 6) and y.dtype == torch.float16 and y.is_meta


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(2, 33)}, ValueError, r"weight of shape \(6, 2, 3\).*must be \(6, 2, 5\)"),
        ({"x": torch.tensor(1.0)}, ValueError, "weight of shape"),
        ({"x": torch.ones(2, 20, dtype=torch.float64)}, TypeError, "x of torch.float64"),
        ({"weight": torch.zeros(6, 2, 3)}, TypeError, "weight of torch.float32; pack it to uint8"),
        ({"salient": torch.zeros(3)}, TypeError, "salient of torch.float32"),
        ({"salient": torch.zeros(4, dtype=torch.uint8)}, ValueError, r"salient of shape \(4,\).*must be \(3,\)"),
        ({"scale": torch.ones(6, 3, 3)}, ValueError, r"scale of shape \(6, 3, 3\).*must be \(6, 3, 4\)"),
        ({"scale": torch.ones(6, 3, 4, dtype=torch.int32)}, TypeError, "scale of torch.int32"),
        ({"offset": torch.ones(6, 3, 4)}, ValueError, r"offset of shape \(6, 3, 4\).*must be \(6, 3, 3\)"),
        ({"columns": torch.ones(20)}, ValueError, r"columns of shape \(20,\).*must be \(2, 20\)"),
        ({"bias": torch.ones(7)}, ValueError, r"bias of shape \(7,\)"),
        ({"group_size": 12}, ValueError, "group_size=12.*a multiple of 8"),
        ({"group_size": 0}, ValueError, "group_size=0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_arguments(change, error, message, device):
    arguments = {"x": torch.randn(2, 20), **make_layer(), **change}
    arguments = {name: value.to(device) if torch.is_tensor(value) else value for name, value in arguments.items()}
    with pytest.raises(error, match=message):
        kernels.binary_linear(**arguments)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_dx_arguments(device):
    packed = [make_layer()[name].to(device) for name in PACKED]
    with pytest.raises(ValueError, match=r"dy of shape \(2, 5\)"):
        kernels.binary_linear_dx(torch.randn(2, 5, device=device), *packed, 20, 8)
    with pytest.raises(ValueError, match="weight of shape"):
        kernels.binary_linear_dx(torch.randn(2, 6, device=device), *packed, 40, 8)
