"""The sign operators: reference by hand, registration, gradient, compilation, arguments."""

import pytest
import torch

from optimum_slim import _kernels as kernels


def make_layer(outs=6, columns=20, *, scale_in=True, per_tensor=False, bias=True):
    """The arguments of `sign_linear` after x, without activation_bits."""
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": kernels.pack_signs(torch.rand(outs, columns, generator=generator) < 0.5),
        "scale_in": torch.randn(columns, generator=generator) if scale_in else None,
        "scale_out": torch.rand(1 if per_tensor else outs, generator=generator) + 0.1,
        "bias": torch.randn(outs, generator=generator) if bias else None,
    }


def dense_of(layer, columns=20):
    return kernels.sign_dense(layer["weight"], layer["scale_in"], layer["scale_out"], columns)


def test_packing_by_hand():
    minus = torch.zeros(2, 11, dtype=torch.bool)
    minus[0, [0, 3, 10]] = True
    minus[1, 7] = True
    packed = kernels.pack_signs(minus)
    assert packed.tolist() == [[0b00001001, 0b00000100], [0b10000000, 0]]
    assert torch.equal(kernels.unpack_signs(packed, 11), minus)


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 9), (2, 2, 17)], ids=str)
def test_packing_is_undone(shape):
    minus = torch.rand(shape) < 0.5
    packed = kernels.pack_signs(minus)
    assert packed.shape == (*shape[:-1], -(-shape[-1] // 8)) and packed.dtype == torch.uint8
    assert torch.equal(kernels.unpack_signs(packed, shape[-1]), minus)


def test_packing_takes_masks_only():
    with pytest.raises(TypeError, match=r"torch.float32; it takes a bool mask"):
        kernels.pack_signs(torch.randn(2, 8))


def test_reference_by_hand():
    weight = kernels.pack_signs(torch.tensor([[False, True, False], [True, True, True]]))
    scale_in, scale_out = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 10.0])
    assert kernels.sign_dense(weight, scale_in, scale_out, 3).tolist() == [[3.0, -6.0, 1.5], [-10.0, -20.0, -5.0]]
    x, bias = torch.tensor([[127.0, 5.2, 4.0]]), torch.tensor([1.0, 0.0])
    exact = kernels.sign_linear_reference(x, weight, scale_in, scale_out, bias, 0)
    torch.testing.assert_close(exact, torch.tensor([[3 * (127 - 10.4 + 2) + 1, -10 * (127 + 10.4 + 2)]]))
    # 127, 10.4 and 2 are rounded: it is x * scale_in whose largest magnitude sets the step.
    rounded = kernels.sign_linear_reference(x, weight, scale_in, scale_out, bias, 8)
    torch.testing.assert_close(rounded, torch.tensor([[3 * (127.0 - 10 + 2) + 1, -10 * (127.0 + 10 + 2)]]))


@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("shape", [(20,), (0, 20), (2, 0, 20), (1, 20), (2, 3, 20), (30, 20)], ids=str)
def test_leading_dimensions(shape, bits):
    layer, x = make_layer(), torch.randn(shape)
    y = kernels.sign_linear(x, **layer, activation_bits=bits)
    assert y.shape == (*shape[:-1], 6)
    torch.testing.assert_close(y, kernels.sign_linear_reference(x, **layer, activation_bits=bits))
    if bits == 0:
        torch.testing.assert_close(y, torch.nn.functional.linear(x, dense_of(layer), layer["bias"]))


@pytest.mark.parametrize("per_tensor", [False, True], ids=["rows", "per_tensor"])
def test_opcheck(per_tensor):
    layer = make_layer(scale_in=not per_tensor, per_tensor=per_tensor)
    for x in (torch.randn(3, 20, requires_grad=True), torch.randn(2, 20, dtype=torch.bfloat16)):
        torch.library.opcheck(kernels.sign_linear, (x, *layer.values(), 8))
    packed = (layer["weight"], layer["scale_in"], layer["scale_out"])
    torch.library.opcheck(kernels.sign_linear_dx, (torch.randn(3, 6), *packed, 20))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend):
    layer = make_layer()

    def model(x):
        return torch.relu(kernels.sign_linear(x * 2, **layer, activation_bits=8)).sum()

    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (1, 7):
        x = torch.randn(tokens, 20, requires_grad=True)
        loss = compiled(x)
        torch.testing.assert_close(loss, model(x))
        (gradient,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(gradient, torch.autograd.grad(model(x), x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [0, 8])
def test_gradient_is_the_dense_one(dtype, bits):
    layer = make_layer()
    for tokens in (1, 3, 40):
        x = torch.randn(2, tokens, 20, dtype=dtype, requires_grad=True)
        dy = torch.randn(2, tokens, 6, dtype=dtype)
        (gradient,) = torch.autograd.grad(kernels.sign_linear(x, **layer, activation_bits=bits), x, dy)
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, (dy.float() @ dense_of(layer)).to(dtype))


def test_backward_keeps_only_packed_tensors():
    layer = make_layer()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        kernels.sign_linear(torch.randn(100, 20, requires_grad=True), **layer, activation_bits=8)
    names = ("weight", "scale_in", "scale_out")
    assert {tensor.data_ptr() for tensor in saved} == {layer[name].data_ptr() for name in names}


def test_other_devices_have_shapes():
    on_meta = {name: value.to("meta") for name, value in make_layer().items()}
    y = kernels.sign_linear(torch.empty(2, 20, device="meta", dtype=torch.float16), **on_meta, activation_bits=0)
    assert y.shape == (2, 6) and y.dtype == torch.float16 and y.is_meta


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(2, 33)}, ValueError, r"weight of shape \(6, 3\).*must be \(6, 5\)"),
        ({"x": torch.tensor(1.0)}, ValueError, "weight of shape"),
        ({"x": torch.ones(2, 20, dtype=torch.float64)}, TypeError, "x of torch.float64"),
        ({"weight": torch.zeros(6, 3)}, TypeError, "pack it to uint8 with pack_signs"),
        ({"scale_in": torch.ones(19)}, ValueError, r"scale_in of shape \(19,\).*must be \(20,\)"),
        ({"scale_in": torch.ones(20, dtype=torch.int32)}, TypeError, "scale_in of torch.int32"),
        ({"scale_out": torch.ones(5)}, ValueError, r"scale_out of shape \(5,\).*must be \(1,\) or \(6,\)"),
        ({"bias": torch.ones(7)}, ValueError, r"bias of shape \(7,\)"),
        ({"activation_bits": 4}, ValueError, "activation_bits=4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_arguments(change, error, message, device):
    arguments = {"x": torch.randn(2, 20), **make_layer(), "activation_bits": 8, **change}
    arguments = {name: value.to(device) if torch.is_tensor(value) else value for name, value in arguments.items()}
    with pytest.raises(error, match=message):
        kernels.sign_linear(**arguments)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_dx_arguments(device):
    layer = {name: value.to(device) for name, value in make_layer().items()}
    packed = (layer["weight"], layer["scale_in"], layer["scale_out"])
    with pytest.raises(ValueError, match=r"dy of shape \(2, 5\)"):
        kernels.sign_linear_dx(torch.randn(2, 5, device=device), *packed, 20)
    with pytest.raises(ValueError, match="weight of shape"):
        kernels.sign_linear_dx(torch.randn(2, 6, device=device), *packed, 40)
