"""The operators: reference by hand, registration, gradient, compilation, arguments."""

import pytest
import torch

from optimum_slim import _kernels as kernels
from optimum_slim._kernels import reference


def make_layer(out_features, columns, group_size, *, offset=True, bias=True, per_tensor=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (out_features, columns), generator=generator, dtype=torch.int8)
    shape = (1,) if per_tensor else (out_features, -(-columns // group_size))
    return {
        "weight": kernels.pack_ternary(codes),
        "scale": torch.rand(shape, generator=generator) + 0.1,
        "offset": torch.randn(shape, generator=generator) if offset and not per_tensor else None,
        "bias": torch.randn(out_features, generator=generator) if bias else None,
        "out_features": out_features,
        "group_size": group_size,
    }


def test_packing_by_hand():
    codes = torch.tensor([[-1, 0], [0, 1], [1, -1], [1, 1], [0, 0], [-1, 1]], dtype=torch.int8)
    # P = 2: byte [0, k] holds rows 0, 2, 4 and padding; byte [1, k] rows 1, 3, 5 and padding (code 1).
    expected = [
        [0 | 2 << 2 | 1 << 4 | 1 << 6, 1 | 0 << 2 | 1 << 4 | 1 << 6],
        [1 | 2 << 2 | 0 << 4 | 1 << 6, 2 | 2 << 2 | 2 << 4 | 1 << 6],
    ]
    packed = kernels.pack_ternary(codes)
    assert packed.tolist() == expected
    assert torch.equal(kernels.unpack_ternary(packed, 6), codes)
    with pytest.raises(ValueError, match="outside -1, 0, 1"):
        kernels.pack_ternary(codes * 2)
    with pytest.raises(ValueError, match="expects"):
        kernels.pack_ternary(codes[0])


def test_packing_is_the_one_of_transformers():
    from transformers.integrations.bitnet import pack_weights

    codes = torch.randint(-1, 2, (12, 5), dtype=torch.int8)
    assert torch.equal(kernels.pack_ternary(codes), pack_weights(codes.float()))


def test_linear_by_hand():
    weight = kernels.pack_ternary(torch.tensor([[1, -1, 0], [0, 1, 1]], dtype=torch.int8))
    scale, offset = torch.tensor([[2.0, 3.0], [0.5, 1.0]]), torch.tensor([[0.0, 1.0], [0.25, 0.0]])
    # W = [[2, -2, 1], [0.25, 0.75, 1]]
    dense = [[2.0, -2.0, 1.0], [0.25, 0.75, 1.0]]
    assert reference.dequantize(weight, scale, offset, 2, 2).tolist() == dense
    x = torch.tensor([[127.0, -63.7, 5.0]])
    bias = torch.tensor([1.0, 0.0])
    exact = reference.ternary_linear_reference(x, weight, scale, offset, bias, 2, 2, 0)
    torch.testing.assert_close(exact, torch.tensor([[386.4 + 1, 31.75 - 47.775 + 5]]))
    # Two groups: the first rounds -63.7 to -64 (s = 1), the second holds 5 exactly.
    rounded = reference.ternary_linear_reference(x, weight, scale, offset, bias, 2, 2, 8)
    torch.testing.assert_close(rounded, torch.tensor([[254.0 + 128 + 5 + 1, 31.75 - 48 + 5]]))


@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 0, 6), (1, 6), (2, 3, 6), (2, 1, 3, 6)], ids=str)
def test_leading_dimensions(shape, bits):
    layer = make_layer(5, 6, 4)
    x = torch.randn(shape)
    y = kernels.ternary_linear(x, **layer, act_bits=bits)
    assert y.shape == (*shape[:-1], 5)
    torch.testing.assert_close(y, kernels.ternary_linear_reference(x, **layer, act_bits=bits))


def test_opcheck():
    for per_tensor in (False, True):
        layer = make_layer(6, 10, 4, per_tensor=per_tensor)
        for x in (torch.randn(3, 10, requires_grad=True), torch.randn(2, 10, dtype=torch.bfloat16)):
            torch.library.opcheck(kernels.ternary_linear, (x, *layer.values(), 8))
    layer = make_layer(6, 10, 4)
    dx_arguments = (torch.randn(3, 6), layer["weight"], layer["scale"], layer["offset"], 4)
    torch.library.opcheck(kernels.ternary_linear_dx, dx_arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend):
    layer = make_layer(9, 20, 8)

    def model(x):
        return torch.relu(kernels.ternary_linear(x * 2, **layer, act_bits=8)).sum()

    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (1, 7):
        x = torch.randn(tokens, 20, requires_grad=True)
        loss = compiled(x)
        torch.testing.assert_close(loss, model(x))
        (gradient,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(gradient, torch.autograd.grad(model(x), x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("per_tensor", [False, True], ids=["groups", "per_tensor"])
def test_gradient_is_the_dense_one(dtype, per_tensor):
    layer = make_layer(37, 50, 50 if per_tensor else 16, per_tensor=per_tensor)
    dense = kernels.dequantize(layer["weight"], layer["scale"], layer["offset"], 37, layer["group_size"])
    x = torch.randn(2, 3, 50, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 3, 37, dtype=dtype)
    for bits in (0, 8):
        (gradient,) = torch.autograd.grad(kernels.ternary_linear(x, **layer, act_bits=bits), x, dy)
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, (dy.float() @ dense).to(dtype))


def test_backward_keeps_only_packed_tensors():
    layer = make_layer(8, 16, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        kernels.ternary_linear(torch.randn(100, 16, requires_grad=True), **layer, act_bits=8)
    assert {tensor.data_ptr() for tensor in saved} == {
        layer[name].data_ptr() for name in ("weight", "scale", "offset")
    }


def test_modes_without_gradient():
    layer = make_layer(8, 16, 8)
    x = torch.randn(2, 16)
    expected = kernels.ternary_linear(x, **layer, act_bits=8)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            y = kernels.ternary_linear(x, **layer, act_bits=8)
        assert torch.equal(y, expected) and not y.requires_grad
    with torch.no_grad():
        assert not kernels.ternary_linear(x.requires_grad_(), **layer, act_bits=8).requires_grad


def test_other_devices_have_shapes():
    layer = make_layer(8, 16, 8)
    on_meta = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in layer.items()}
    y = kernels.ternary_linear(torch.empty(2, 16, device="meta", dtype=torch.float16), **on_meta, act_bits=8)
    assert y.shape == (2, 8) and y.dtype == torch.float16 and y.is_meta


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(2, 15)}, ValueError, r"weight of shape \(2, 16\).*must be \(2, 15\)"),
        ({"x": torch.tensor(1.0)}, ValueError, "weight of shape"),
        ({"x": torch.ones(2, 16, dtype=torch.float64)}, TypeError, "x of torch.float64"),
        ({"x": torch.ones(2, 16, dtype=torch.int8)}, TypeError, "x of torch.int8"),
        ({"weight": torch.zeros(2, 16)}, TypeError, "pack it"),
        ({"out_features": 9}, ValueError, r"must be \(3, 16\)"),
        ({"scale": torch.ones(8)}, ValueError, r"scale of shape \(8,\).*must be \(8, 2\)"),
        ({"scale": torch.ones(8, 2, dtype=torch.int32)}, TypeError, "scale of torch.int32"),
        ({"offset": torch.ones(8, 1)}, ValueError, r"offset of shape \(8, 1\)"),
        ({"bias": torch.ones(7)}, ValueError, r"bias of shape \(7,\)"),
        ({"group_size": 0}, ValueError, "group_size=0"),
        ({"act_bits": 4}, ValueError, "act_bits=4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_arguments(change, error, message, device):
    arguments = {"x": torch.randn(2, 16), **make_layer(8, 16, 8), "act_bits": 8, **change}
    arguments = {name: value.to(device) if torch.is_tensor(value) else value for name, value in arguments.items()}
    with pytest.raises(error, match=message):
        kernels.ternary_linear(**arguments)


def test_wrong_dx_arguments():
    layer = make_layer(8, 16, 8)
    with pytest.raises(ValueError, match="weight of shape"):
        kernels.ternary_linear_dx(torch.randn(2, 12), layer["weight"], layer["scale"], layer["offset"], 8)
