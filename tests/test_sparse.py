"""`SparseLinear`: what goes in comes out, damage is noticed, and bytes are as few as promised."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from optimum_slim import Magnitude, SparseGPT, SparseLinear, Wanda
from optimum_slim.affine import AffineGrid
from optimum_slim.sparsity import Pattern, lowest_in_rows, select
from optimum_slim.stored import stored_bits


LAYOUTS = {
    "flat": ("flat", 0.6),
    "rows": ("rows", 0.5),
    "2:4": ("positions", "2:4"),
    "1:4": ("positions", "1:4"),
    "4:8": ("rows", "4:8"),
    "3:4": ("rows", "3:4"),
}
SHAPES = [(10, 32), (7, 45), (1, 3), (5, 130)]


def dropped(weight, name):
    layout, sparsity = LAYOUTS[name]
    pattern = Pattern.parse(sparsity)
    return select(weight.abs(), pattern, by_row=layout == "rows")


def kept(mask, name):
    layout, sparsity = LAYOUTS[name]
    if layout == "positions":
        return int(sparsity[0])
    return int((~mask).sum()) if layout == "flat" else int((~mask[0]).sum())


def layer_of(name, shape=(10, 32), bits=None, group_size=None, seed=0, **settings):
    """A layer, the dense weight it stands for, and the mask of what is dropped."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 8
    mask = dropped(weight, name)
    settings = {"bias": False, "value_dtype": torch.float32} | settings
    layer = SparseLinear(
        shape[1],
        shape[0],
        layout=LAYOUTS[name][0],
        kept=kept(mask, name),
        bits=bits,
        group_size=group_size,
        **settings,
    )
    if bits is None:
        layer.load_packed(layer.packed_state(weight, mask))
        return layer, weight.to(settings["value_dtype"]).float().masked_fill(mask, 0), mask
    grid = AffineGrid.fit(weight, bits, group_size)
    codes = grid.codes(weight)
    layer.load_packed(layer.packed_state(codes, mask, (grid.scale, grid.zero)))
    return layer, grid.values(codes).masked_fill(mask, 0), mask


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("bits", "group_size"), [(None, None), (4, None), (3, 16), (8, 8), (2, None)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_goes_in_comes_out(name, bits, group_size, shape):
    layer, dense, mask = layer_of(name, shape, bits, group_size)
    assert torch.equal(layer.dense(), dense)
    assert torch.equal(layer.mask(), ~mask)
    layer.validate()
    x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ dense.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_values_are_kept_bit_for_bit_in_their_dtype(dtype):
    layer, dense, _ = layer_of("flat", value_dtype=dtype)
    assert layer.weight_values.dtype == dtype
    assert torch.equal(layer.dense(), dense) and torch.equal(layer.dense(dtype), dense.to(dtype))


def test_bias_gradient_and_copies():
    layer, dense, _ = layer_of("2:4", bias=True)
    with torch.no_grad():
        layer.bias.normal_()
    x = torch.randn(2, 32, requires_grad=True)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, layer.bias), rtol=1e-4, atol=1e-5)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(2, -1), rtol=1e-4, atol=1e-5)
    clone = copy.deepcopy(layer)
    assert torch.equal(clone.weight, layer.weight) and not clone.weight_values.requires_grad


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", ["flat", "rows"])
def test_a_mask_that_drops_more_than_the_layout_is_filled_with_zeros(name, bits):
    layer, _, mask = layer_of(name, bits=bits)
    more = mask.clone()
    more[3] = True
    weight = torch.randn(10, 32, generator=torch.Generator().manual_seed(0)) / 8
    grid = AffineGrid.fit(weight, 4)
    pruned = weight.masked_fill(more, 0)
    state = (
        layer.packed_state(grid.codes(pruned), more, (grid.scale, grid.zero))
        if bits
        else layer.packed_state(pruned, more)
    )
    layer.load_packed(state)
    layer.validate()
    assert torch.equal(layer.dense() == 0, more | (grid.values(grid.codes(pruned)) == 0 if bits else more))


@pytest.mark.parametrize("bits", [None, 4, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_damaged_index_is_noticed(name, bits):
    """A bit turned in a bitmask leaves counts that do not fit; in positions it may make other, sound ones."""
    layer, _, _ = layer_of(name, (5, 37), bits)
    sound = layer.weight.data.clone()
    for byte in range(sound.shape[1]):
        for bit in (0, 3, 7):
            damaged = sound.clone()
            damaged[2, byte] ^= 1 << bit
            layer.weight.data = damaged
            if name in ("2:4", "1:4") and _still_sound(damaged, layer.keep):
                continue
            with pytest.raises(ValueError, match="damaged"):
                layer.validate()


def _still_sound(index, keep):
    """Whether positions of 37 columns ascend, and the last group, of one column, has its own and then padding."""
    positions = torch.stack([index >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1).long()
    positions = positions[:, : 10 * keep].unflatten(1, (10, keep))
    ascending = keep == 1 or bool((positions[..., 0] < positions[..., 1]).all())
    return ascending and bool((positions[:, -1] == torch.arange(keep)).all())


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(("entry", "change"), [(0, 1), (3, 1), (3, -1), (10, 1), (10, -1)])
def test_damaged_row_starts_are_noticed(entry, change, bits):
    layer, _, _ = layer_of("flat", bits=bits)
    layer.weight_rows.data[entry] += change
    with pytest.raises(ValueError, match="weight_rows does not fit the index"):
        layer.validate()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("weight", torch.zeros(10, 5, dtype=torch.uint8)),
        ("weight", torch.zeros(10, 4)),
        ("weight_values", torch.zeros(7)),
        ("weight_values", torch.zeros(128, dtype=torch.uint8)),
        ("weight_rows", torch.zeros(10, dtype=torch.int32)),
    ],
)
def test_state_that_does_not_fit_is_refused(name, tensor):
    layer, _, _ = layer_of("flat")
    state = {key: getattr(layer, key) for key in layer.packed_tensors()}
    with pytest.raises(ValueError, match=f"{name} has"):
        layer.load_packed(state | {name: tensor})
    del state[name]
    with pytest.raises(ValueError, match="do not fit"):
        layer.load_packed(state)


@pytest.mark.parametrize("settings", [{"layout": "columns", "kept": 2}, {"layout": "positions", "kept": 3}], ids=str)
def test_unknown_layouts_are_refused(settings):
    with pytest.raises(ValueError, match=r"found.*kept="):
        SparseLinear(8, 8, **settings)


@pytest.mark.parametrize(("bits", "group_size"), [(None, None), (4, None), (4, 16)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_stored_bits_are_the_bytes_of_the_tensors(name, bits, group_size):
    layer, _, _ = layer_of(name, (6, 45), bits, group_size)
    tensors = [getattr(layer, key) for key in layer.packed_tensors()]
    assert layer.stored_bits() == 8 * sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_bits_are_counted_from_the_file(tmp_path, name, bits):
    layer, _, _ = layer_of(name, (6, 48), bits, value_dtype=torch.bfloat16)
    tensors = {f"layer.{key}": getattr(layer, key).data for key in layer.packed_tensors()}
    save_file(tensors | {"norm.weight": torch.ones(48)}, tmp_path / "model.safetensors")
    found = stored_bits(tmp_path)
    assert found.dense_bytes == 4 * 48 and 8 * found.packed_bytes == layer.stored_bits()


@pytest.mark.parametrize(
    ("step", "bound"),
    [
        (Magnitude(), 0.57),
        (SparseGPT(variant="paper"), 0.57),
        (Wanda(), 0.57),
        (Magnitude(sparsity="2:4"), 0.57),
        (Magnitude(sparsity="2:4", bits=4), 0.20),
        (Magnitude(sparsity="2:4", bits=4, group_size=128), 0.202),
        (Magnitude(sparsity="1:4"), 0.32),
        (Magnitude(sparsity=0.7), 0.37),
    ],
    ids=lambda value: repr(value)[:60] if not isinstance(value, float) else str(value),
)
@pytest.mark.parametrize("rows", [192, 1536])
def test_bytes_beside_the_dense_layer(step, bound, rows):
    linear = nn.Linear(576, rows, bias=False, dtype=torch.bfloat16, device="meta")
    assert step.empty(linear).stored_bits() / (16 * 576 * rows) <= bound


def test_extra_repr_and_lowest_rows():
    layer, _, mask = layer_of("rows")
    assert "layout=rows, kept=16, torch.float32" in repr(layer)
    assert torch.equal(mask, lowest_in_rows(torch.where(mask, 0.0, 1.0), 16))
