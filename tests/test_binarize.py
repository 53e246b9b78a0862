"""Binarizing one group: the closed forms, and that taking turns never raises the error."""

from itertools import pairwise

import pytest
import torch

from optimum_slim.binarize import (
    Part,
    assemble,
    binarize,
    normal_part,
    part_error,
    part_values,
    refine,
    residual_part,
    split_part,
)


def gaussian(rows=16, columns=48, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def importance(columns=48):
    return torch.rand(columns, generator=torch.Generator().manual_seed(1)) + 0.1


def first_order(weight, **settings):
    minus, scale, mean = binarize(weight, **settings)
    return torch.where(minus, mean - scale, mean + scale)


@pytest.mark.parametrize("centred", [False, True], ids=["plain", "centred"])
def test_the_error_falls_with_every_order(centred):
    weight = gaussian()
    left, energy = weight, [weight.square().sum(1)]
    for _ in range(5):
        left = left - first_order(left, centred=centred)
        energy.append(left.square().sum(1))
    assert all((after < before).all() for before, after in pairwise(energy))
    twice = part_values(residual_part(weight, centred=centred), salient=True)
    torch.testing.assert_close((weight - twice).square().sum(1), energy[2])


def test_first_order_of_a_bell_curve_leaves_0_363_of_its_energy():
    weight = gaussian(8, 40_000)
    left = (weight - first_order(weight)).square().sum() / weight.square().sum()
    assert float(left) == pytest.approx(1 - 2 / torch.pi, abs=0.004)


def test_the_mean_magnitude_is_the_best_scale():
    weight = gaussian()
    minus, scale, _ = binarize(weight)
    assert torch.allclose(scale[:, 0], weight.abs().mean(1))
    sign = torch.where(minus, -1.0, 1.0)
    best = (weight - scale * sign).square().sum(1)
    for change in (0.99, 1.01):
        assert ((weight - change * scale * sign).square().sum(1) > best).all()


def test_a_mask_leaves_the_other_weights_out():
    weight, mask = gaussian(), gaussian(seed=3) > 0
    minus, scale, mean = binarize(weight, mask, centred=True)
    for row in range(16):
        chosen = weight[row][mask[row]]
        assert float(mean[row]) == pytest.approx(float(chosen.mean()), abs=1e-6)
        assert float(scale[row]) == pytest.approx(float((chosen - chosen.mean()).abs().mean()), rel=1e-5)
    assert torch.equal(minus, weight < mean)
    assert torch.equal(binarize(weight, torch.zeros_like(mask))[1], torch.zeros(16, 1))


def test_zeros_are_positive():
    assert not binarize(torch.zeros(2, 5))[0].any()


@pytest.mark.parametrize("centred", [False, True], ids=["plain", "centred"])
def test_rows_of_two_magnitudes_are_split_exactly(centred):
    generator = torch.Generator().manual_seed(0)
    large = torch.rand(10, 40, generator=generator) < 0.3
    sign = torch.where(torch.rand(10, 40, generator=generator) < 0.5, -1.0, 1.0)
    sign[:, :4], large[:, :4] = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([True, True, False, False])
    if centred:  # as many of each sign in each set, so that the means are 0
        sign[large], sign[~large] = (torch.tensor([1.0, -1.0]).repeat(400)[: int(m.sum())] for m in (large, ~large))
        weight = torch.where(large, 0.75, 0.25) * sign
        part = refine(weight, torch.ones(40), normal_part(weight, torch.ones(40), offset=True), 30, salient=False)
    else:
        weight = torch.where(large, 0.75, 0.25) * sign
        part = split_part(weight, large)
    torch.testing.assert_close(part_values(part, salient=False), weight, rtol=1e-5, atol=1e-6)


STARTS = {
    "plain": (lambda w, h, o, c: normal_part(w, h, offset=o, columns=c), False, True),
    "given split": (lambda w, h, o, c: split_part(w, w.abs() > 1, centred=o, columns=c), False, False),
    "salient": (lambda w, h, o, c: residual_part(w, offset=o, columns=c), True, True),
}


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "rows and columns"])
@pytest.mark.parametrize("offset", [False, True], ids=["", "offset"])
@pytest.mark.parametrize("start", STARTS)
def test_taking_turns_never_raises_the_error(start, offset, columns):
    for seed in range(5):
        weight, counts = gaussian(seed=seed), importance()
        make, salient, split = STARTS[start]
        part = make(weight, counts, offset, columns)
        errors = [part_error(weight, counts, part, salient=salient)]
        for _ in range(15):
            second = part.second
            part = refine(weight, counts, part, 1, salient=salient, split=split)
            errors.append(part_error(weight, counts, part, salient=salient))
            assert split or torch.equal(part.second, second)
        assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
        assert errors[-1] < (0.999 if start != "given split" or columns else 1.00001) * errors[0]
        assert (part.scale >= 0).all() and (part.columns is None or (part.columns >= 0).all())


@pytest.mark.parametrize("offset", [False, True])
def test_numbers_are_the_least_squares_solution(offset):
    weight, counts = gaussian(), importance()
    start = normal_part(weight, counts, offset=offset)
    part = refine(weight, counts, start, 1, salient=False, split=False)
    for row in range(16):
        for t in range(2):
            mask = (start.second[row] == bool(t)).double() * counts.double().sqrt()
            sign = torch.where(start.minus[row], -1.0, 1.0).double()
            basis = torch.stack([sign, torch.ones(48).double()][: 1 + offset], dim=1) * mask[:, None]
            best = torch.linalg.lstsq(basis, weight[row].double() * mask).solution
            assert float(part.scale[row, t]) == pytest.approx(float(best[0]), rel=1e-4)
            if offset:
                assert float(part.offset[row, t]) == pytest.approx(float(best[1]), rel=1e-3, abs=1e-5)


def test_four_levels_of_a_bell_curve():
    """0.1175 is what the best four levels leave of a normal variable (Lloyd, Max)."""
    weight, ones = gaussian(4, 20_000), torch.ones(20_000)
    energy = float(weight.square().sum())
    start = normal_part(weight, ones)
    assert part_error(weight, ones, start, salient=False) / energy == pytest.approx(0.1175, abs=0.003)
    found = refine(weight, ones, start, 10, salient=False)
    assert part_error(weight, ones, found, salient=False) / energy == pytest.approx(0.1175, abs=0.003)


def test_magnitudes_of_rank_one_need_column_scales():
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.rand(size, generator=generator) + 0.5 for size in (12, 40))
    weight = rows[:, None] * columns * torch.where(gaussian(12, 40) < 0, -1.0, 1.0)
    ones, small = torch.ones(40), torch.zeros(12, 40, dtype=torch.bool)
    errors = []
    for scaled in (False, True):
        part = refine(weight, ones, split_part(weight, small, columns=scaled), 15, salient=False, split=False)
        errors.append(part_error(weight, ones, part, salient=False))
    assert errors[1] < 1e-6 * errors[0]


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("offset", [False, True])
def test_assembled_levels_are_the_parts(offset, columns):
    weight, counts, mask = gaussian(), importance(), torch.arange(48) % 7 == 3
    plain = normal_part(weight[:, ~mask], counts[~mask], offset=offset, columns=columns)
    twice = residual_part(weight[:, mask], offset=offset, columns=columns)
    plain = refine(weight[:, ~mask], counts[~mask], plain, 2, salient=False)
    twice = refine(weight[:, mask], counts[mask], twice, 2, salient=True)
    dense = assemble(plain, twice, mask).dense()
    torch.testing.assert_close(dense[:, ~mask], part_values(plain, salient=False))
    torch.testing.assert_close(dense[:, mask], part_values(twice, salient=True))


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(
    "weight", [torch.zeros(3, 5), torch.ones(3, 5), torch.zeros(3, 0)], ids=["zeros", "ones", "none"]
)
def test_weights_without_any_spread(weight, offset, columns):
    ones = torch.ones(weight.shape[1])
    for part, salient in (
        (normal_part(weight, ones, offset=offset, columns=columns), False),
        (residual_part(weight, offset=offset, columns=columns), True),
    ):
        found = refine(weight, ones, part, 3, salient=salient)
        assert isinstance(found, Part) and all(torch.isfinite(value).all() for value in found[2:] if value is not None)
        torch.testing.assert_close(part_values(found, salient=salient), weight, rtol=1e-5, atol=1e-6)
