"""Uniform grids with 0 on them."""

import pytest
import torch

from optimum_slim.affine import AffineGrid, nearest


def weight(rows=6, columns=40, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 8


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [None, 16, 64, 7], ids=lambda n: f"group{n}")
def test_rounding_is_off_by_half_a_step_at_most(bits, group_size):
    dense = weight()
    grid = AffineGrid.fit(dense, bits, group_size, scale_dtype=torch.float32)
    codes = grid.codes(dense)
    size = min(group_size or 40, 40)
    assert grid.scale.shape == grid.zero.shape == (6, -(-40 // size))
    assert codes.dtype == torch.uint8 and int(codes.max()) < 2**bits
    scale = grid.scale.repeat_interleave(size, dim=1)[:, :40]
    inside = (grid.values(codes) - dense).abs() <= 0.5 * scale * (1 + 1e-4)
    ends = (codes == 0) | (codes == 2**bits - 1)  # a rounded zero shifts the ends by up to half a step more
    assert (inside | ends).all()
    assert ((grid.values(codes) - dense).abs() <= scale * (1 + 1e-4)).all()


@pytest.mark.parametrize("search", [False, True], ids=["span", "search"])
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0], ids=["centred", "positive", "negative"])
def test_zero_is_on_every_grid(shift, search):
    grid = AffineGrid.fit(weight() + shift, 3, 8, search=search)
    assert ((grid.zero >= 0) & (grid.zero <= 7) & (grid.zero == grid.zero.round())).all()
    assert (grid.values(grid.codes(torch.zeros(6, 40))) == 0).all()


def test_values_on_the_grid_are_kept():
    grid = AffineGrid.fit(weight(), 4, 8)
    codes = torch.randint(0, 16, (6, 40), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    assert torch.equal(grid.codes(grid.values(codes)), codes)


def test_scales_are_what_their_dtype_stores():
    for dtype in (torch.float16, torch.bfloat16):
        scale = AffineGrid.fit(weight(), 4, 8, scale_dtype=dtype).scale
        assert scale.dtype == torch.float32 and torch.equal(scale.to(dtype).float(), scale)


def test_columns_have_the_grid_of_their_group():
    dense = weight()
    grid = AffineGrid.fit(dense, 3, 16)
    codes = torch.stack([nearest(dense[:, j], *grid.column(j), 3) for j in range(40)], dim=1)
    assert torch.equal(codes.to(torch.uint8), grid.codes(dense))


def test_searching_never_hurts_and_helps_with_outliers():
    dense = weight()
    dense[:, 0] = 1.0
    counts = torch.rand(40, generator=torch.Generator().manual_seed(1)) + 0.1
    for importance in (None, counts):
        errors = []
        for search in (False, True):
            grid = AffineGrid.fit(dense, 3, search=search, importance=importance)
            squares = (grid.values(grid.codes(dense)) - dense).square()
            errors.append((squares * (1 if importance is None else importance)).sum(1))
        assert (errors[1] <= errors[0]).all() and errors[1].sum() < 0.9 * errors[0].sum()


def test_rows_of_zeros_and_constants():
    dense = torch.tensor([0.0, 0.5, -0.5])[:, None].expand(3, 8)
    grid = AffineGrid.fit(dense, 2)
    torch.testing.assert_close(grid.values(grid.codes(dense)), dense, rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [1, 1e-1, 1e-2, 1e-3])
def test_small_weights_are_rounded_as_well_as_large_ones(size):
    """8-bit scales of weights around 1e-3 and less are below the normal range of fp16, not below fp16."""
    dense = weight() * size
    grid = AffineGrid.fit(dense, 8)
    lost = (grid.values(grid.codes(dense)) - dense).norm() / dense.norm()
    assert lost < 0.03
