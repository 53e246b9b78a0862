"""The sparse operators: reference by hand, registration, gradient, compilation, arguments."""

import pytest
import torch

from optimum_slim import _kernels as kernels


KINDS = ["values", "rows", "codes", "2:4", "1:4"]


def make_layer(kind, outs=6, columns=20, *, bias=True, dtype=torch.float32):
    """The arguments of `sparse_linear` after x, and the dense weight they stand for."""
    generator = torch.Generator().manual_seed(0)
    keep = {"2:4": 2, "1:4": 1}.get(kind, 0)
    order = torch.rand(outs, columns // 4, 4, generator=generator).argsort(-1)
    mask = (order < (keep or 2)).flatten(1)
    if kind == "rows":
        mask = torch.rand(outs, columns, generator=generator) < 0.4
    dense = torch.randn(outs, columns, generator=generator).to(dtype) * mask
    layer = {"weight": kernels.pack_mask(mask, keep)}
    layer["values"], layer["rows"] = kernels.pack_values(dense, mask, keep, ragged=kind == "rows")
    layer |= {"scale": None, "zero": None}
    bits, group_size = 0, columns
    if kind == "codes":
        bits, group_size = 3, 8
        codes = torch.randint(0, 8, (outs, columns), generator=generator, dtype=torch.uint8)
        layer["values"], layer["rows"] = kernels.pack_codes(codes, mask, bits)
        layer["scale"] = torch.rand(outs, 3, generator=generator) + 0.5
        layer["zero"] = torch.randint(0, 8, (outs, 3), generator=generator, dtype=torch.uint8)
        group = torch.arange(columns) // group_size
        dense = (codes.float() - layer["zero"].float()[:, group]) * layer["scale"][:, group] * mask
    layer["bias"] = torch.randn(outs, generator=generator) if bias else None
    return layer | {"keep": keep, "bits": bits, "group_size": group_size}, dense


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(20,), (0, 20), (2, 0, 20), (1, 20), (2, 3, 20), (30, 20)], ids=str)
def test_linear_is_the_dense_one(shape, kind):
    layer, dense = make_layer(kind)
    x = torch.randn(shape)
    y = kernels.sparse_linear(x, **layer)
    assert y.shape == (*shape[:-1], 6)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dense, layer["bias"]))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    layer, _ = make_layer(kind)
    for x in (torch.randn(3, 20, requires_grad=True), torch.randn(2, 20, dtype=torch.bfloat16)):
        torch.library.opcheck(kernels.sparse_linear, (x, *layer.values()))
    packed = [layer[name] for name in ("weight", "values", "rows", "scale", "zero")]
    numbers = [layer[name] for name in ("keep", "bits", "group_size")]
    torch.library.opcheck(kernels.sparse_linear_dx, (torch.randn(3, 6), *packed, 20, *numbers))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend):
    layer, _ = make_layer("rows")

    def model(x):
        return torch.relu(kernels.sparse_linear(x * 2, **layer)).sum()

    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (1, 7):
        x = torch.randn(tokens, 20, requires_grad=True)
        loss = compiled(x)
        torch.testing.assert_close(loss, model(x))
        (gradient,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(gradient, torch.autograd.grad(model(x), x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_dense_one(kind, dtype):
    layer, dense = make_layer(kind)
    for tokens in (1, 3, 40):
        x = torch.randn(2, tokens, 20, dtype=dtype, requires_grad=True)
        dy = torch.randn(2, tokens, 6, dtype=dtype)
        (gradient,) = torch.autograd.grad(kernels.sparse_linear(x, **layer), x, dy)
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, (dy.float() @ dense).to(dtype))


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
def test_gradient_by_differences():
    layer, _ = make_layer("2:4")
    x = torch.randn(2, 20, requires_grad=True)
    # The op is linear in x, so that large steps cost no accuracy where fp32 needs them.
    assert torch.autograd.gradcheck(
        lambda x: kernels.sparse_linear(x, **layer), x, eps=0.5, atol=1e-4, rtol=1e-4, nondet_tol=0.0
    )


def test_backward_keeps_only_packed_tensors():
    layer, _ = make_layer("codes")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        kernels.sparse_linear(torch.randn(100, 20, requires_grad=True), **layer)
    names = ("weight", "values", "scale", "zero")
    assert {tensor.data_ptr() for tensor in saved} == {layer[name].data_ptr() for name in names}


def test_other_devices_have_shapes():
    layer, _ = make_layer("codes")
    on_meta = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in layer.items()}
    y = kernels.sparse_linear(torch.empty(2, 20, device="meta", dtype=torch.float16), **on_meta)
    assert y.shape == (2, 6) and y.dtype == torch.float16 and y.is_meta


@pytest.mark.parametrize(
    ("kind", "change", "error", "message"),
    [
        ("rows", {"x": torch.randn(2, 33)}, ValueError, r"weight of shape \(6, 3\).*must be \(6, 5\)"),
        ("rows", {"x": torch.ones(2, 20, dtype=torch.float64)}, TypeError, "x of torch.float64"),
        ("rows", {"weight": torch.zeros(6, 3)}, TypeError, "weight of torch.float32; it must be uint8"),
        ("rows", {"values": torch.zeros(9, dtype=torch.uint8)}, TypeError, "values of torch.uint8"),
        ("codes", {"values": torch.zeros(6, 4)}, TypeError, "values of torch.float32; it must be uint8"),
        ("2:4", {"values": torch.zeros(6, 9)}, ValueError, r"values of shape \(6, 9\).*must be \(6, 10\)"),
        ("rows", {"rows": torch.zeros(7)}, TypeError, "rows of torch.float32; it must be int32"),
        ("rows", {"rows": torch.zeros(6, dtype=torch.int32)}, ValueError, r"rows of shape \(6,\)"),
        ("rows", {"rows": None}, ValueError, "flat values together with rows"),
        ("codes", {"scale": None}, ValueError, "needs scale and zero for codes"),
        ("codes", {"scale": torch.ones(6, 2)}, ValueError, r"scale of shape \(6, 2\).*must be \(6, 3\)"),
        ("codes", {"zero": torch.ones(6, 3)}, TypeError, "zero of torch.float32"),
        ("rows", {"bias": torch.ones(7)}, ValueError, r"bias of shape \(7,\)"),
        ("rows", {"keep": 3}, ValueError, "keep=3"),
        ("rows", {"bits": 1}, ValueError, "bits=1"),
        ("rows", {"group_size": 0}, ValueError, "group_size=0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_arguments(kind, change, error, message, device):
    arguments = {"x": torch.randn(2, 20), **make_layer(kind)[0], **change}
    arguments = {name: value.to(device) if torch.is_tensor(value) else value for name, value in arguments.items()}
    with pytest.raises(error, match=message):
        kernels.sparse_linear(**arguments)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_dx_arguments(device):
    layer, _ = make_layer("rows")
    packed = [layer[name] for name in ("weight", "values", "rows", "scale", "zero")]
    packed = [None if tensor is None else tensor.to(device) for tensor in packed]
    with pytest.raises(ValueError, match=r"dy of shape \(2, 5\)"):
        kernels.sparse_linear_dx(torch.randn(2, 5, device=device), *packed, 20, 0, 0, 20)
    with pytest.raises(ValueError, match="weight of shape"):
        kernels.sparse_linear_dx(torch.randn(2, 6, device=device), *packed, 40, 0, 0, 40)
