"""Levels of two-bit weights: what they stand for, and each joint improvement against its least-squares problem."""

import dataclasses
from itertools import pairwise, product

import pytest
import torch
from binary_problems import output_error, problem, random_levels

from optimum_slim._kernels import binary_dense, pack_signs
from optimum_slim.hessian import Hessian
from optimum_slim.levels import (
    ColumnLevels,
    Levels,
    groups_of,
    rounded_to,
    solve_columns,
    solve_scales,
    sweep_bits,
)


FORMS = [(False, False), (True, False), (False, True), (True, True)]
SHAPES = [(6, 40, 16), (3, 37, 16), (1, 3, 3), (4, 24, 24)]


def fitted(rows=12, columns=56, offset=True, scaled=True, seed=0):
    """A weight, its H, and levels near it."""
    weight, gram = problem(rows, columns, seed)
    hessian = Hessian(gram).matrix
    levels = random_levels(rows, columns, 16, offset, scaled, seed)
    return weight, hessian, dataclasses.replace(levels, scale=levels.scale / 8).nearest(weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
@pytest.mark.parametrize(("offset", "scaled"), FORMS)
def test_dense_is_what_the_packed_bits_stand_for(offset, scaled, rows, columns, size, dtype):
    levels = random_levels(rows, columns, size, offset, scaled, dtype=dtype)
    packed = pack_signs(torch.stack([levels.minus, levels.second], dim=1)), pack_signs(levels.salient)
    numbers = (levels.scale, levels.offset, levels.columns)
    numbers = [None if n is None else n.to(dtype) for n in numbers]
    assert torch.equal(levels.dense(), binary_dense(*packed, *numbers, columns, size))


@pytest.mark.parametrize(("offset", "scaled"), FORMS)
def test_dense_by_the_equation(offset, scaled):
    levels = random_levels(4, 21, 8, offset, scaled)
    dense = levels.dense()
    for n, k in product(range(4), range(21)):
        g, t, s = k // 8, int(levels.second[n, k]), 1 - 2 * int(levels.minus[n, k])
        scale, middle = levels.scale[n, g], levels.offset[n, g] if offset else torch.zeros(3)
        c = levels.columns[:, k] if scaled else torch.ones(2)
        if levels.salient[k]:
            expected = middle[2] + scale[2] * c[0] * s + scale[3] * c[1] * (1 - 2 * t)
        else:
            expected = middle[t] + scale[t] * c[t] * s
        assert dense[n, k] == pytest.approx(float(expected), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(("offset", "scaled"), FORMS)
def test_nearest_is_the_best_of_the_four_levels(offset, scaled):
    levels = random_levels(8, 40, 16, offset, scaled)
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
    distances = []
    for minus, second in product((False, True), repeat=2):
        bits = [torch.full_like(levels.minus, value) for value in (minus, second)]
        distances.append((levels.with_bits(*bits).dense() - weight).abs())
    found = (levels.nearest(weight).dense() - weight).abs()
    torch.testing.assert_close(found, torch.stack(distances).amin(0))


@pytest.mark.parametrize(("offset", "scaled"), FORMS)
def test_one_column_at_a_time_is_the_same(offset, scaled):
    levels = random_levels(8, 40, 16, offset, scaled)
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
    expected = levels.nearest(weight)
    dense = expected.dense()
    for number, group in enumerate(groups_of(40, 16)):
        nearest = ColumnLevels(levels, number, group)
        for k in range(group.start, group.stop):
            minus, second, value = nearest.nearest(k, weight[:, k])
            assert torch.equal(minus, expected.minus[:, k]) and torch.equal(second, expected.second[:, k])
            assert torch.equal(value, dense[:, k])


@pytest.mark.parametrize(("offset", "scaled"), FORMS)
def test_negative_scales_turn_signs(offset, scaled):
    levels = random_levels(6, 40, 16, offset, scaled)
    levels.scale *= torch.where(torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(2)) < 0.5, -1, 1)
    if scaled:
        levels.columns[:, ::3] *= -1
    positive = levels.positive()
    assert (positive.scale >= 0).all() and (not scaled or (positive.columns >= 0).all())
    assert torch.equal(positive.dense(), levels.dense())


def test_joined_groups():
    whole = random_levels(6, 40, 16)
    parts = [
        Levels(
            whole.minus[:, group],
            whole.second[:, group],
            whole.salient[group],
            whole.scale[:, number : number + 1],
            whole.offset[:, number : number + 1],
            whole.columns[:, group],
            16,
        )
        for number, group in enumerate(groups_of(40, 16))
    ]
    assert torch.equal(Levels.join(parts).dense(), whole.dense())
    assert torch.equal(torch.cat([part.dense() for part in parts], dim=1), whole.dense())


@pytest.mark.parametrize(("offset", "scaled"), FORMS)
def test_solve_scales_is_the_joint_least_squares_solution(offset, scaled):
    weight, hessian, levels = fitted(offset=offset, scaled=scaled)
    solved = solve_scales(weight, hessian, levels)
    root = torch.linalg.cholesky(hessian.double())
    for row in range(0, 12, 5):
        basis = []
        for number in range(4):
            for kind in range(7 if offset else 4):
                one = dataclasses.replace(
                    levels,
                    scale=torch.zeros_like(levels.scale),
                    offset=torch.zeros_like(levels.offset) if offset else None,
                )
                target = one.scale if kind < 4 else one.offset
                target[row, number, kind % 4] = 1
                basis.append(one.dense()[row])
        basis = torch.stack(basis, dim=1).double()
        best = torch.linalg.lstsq(root.T @ basis, root.T @ weight[row].double(), driver="gelsd").solution
        expected = output_error(weight[row : row + 1], (basis @ best)[None], hessian)
        found = output_error(weight[row : row + 1], solved.dense()[row : row + 1], hessian)
        assert found == pytest.approx(expected, rel=1e-4)


def test_solve_scales_with_a_diagonal():
    weight, hessian, levels = fitted()
    diagonal = hessian.diagonal()
    one, other = (solve_scales(weight, metric, levels).dense() for metric in (diagonal, torch.diag(diagonal)))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_solve_scales_in_parts(monkeypatch):
    weight, hessian, levels = fitted(rows=40)
    whole = solve_scales(weight, hessian, levels)
    monkeypatch.setattr("optimum_slim.levels.ENTRIES_AT_ONCE", 1)
    torch.testing.assert_close(solve_scales(weight, hessian, levels).dense(), whole.dense(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offset", [False, True])
def test_solve_columns_is_the_joint_least_squares_solution(offset):
    weight, hessian, levels = fitted(rows=30, columns=24, offset=offset)
    solved = solve_columns(weight, hessian, levels)
    root = torch.linalg.cholesky(hessian.double())
    fixed = dataclasses.replace(levels, columns=torch.zeros_like(levels.columns)).dense()
    basis = []
    for index in range(48):
        one = dataclasses.replace(levels, columns=torch.zeros_like(levels.columns))
        one.columns.view(-1)[index] = 1
        basis.append(((one.dense() - fixed).double() @ root).flatten())
    target = ((weight - fixed).double() @ root).flatten()
    best = torch.linalg.lstsq(torch.stack(basis, dim=1), target[:, None], driver="gelsd").solution[:, 0]
    expected = float((torch.stack(basis, dim=1) @ best - target).square().sum())
    assert output_error(weight, solved.dense(), hessian) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("offset", "scaled"), FORMS)
def test_no_improvement_raises_the_output_error(offset, scaled):
    weight, hessian, levels = fitted(offset=offset, scaled=scaled)
    errors = [output_error(weight, levels.dense(), hessian)]
    for _ in range(3):
        levels = solve_scales(weight, hessian, levels).positive()
        errors.append(output_error(weight, levels.dense(), hessian))
        if scaled:
            levels = solve_columns(weight, hessian, levels).positive()
            errors.append(output_error(weight, levels.dense(), hessian))
        levels = sweep_bits(weight, hessian, levels, sweeps=1)
        errors.append(output_error(weight, levels.dense(), hessian))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize(("offset", "scaled"), FORMS)
def test_after_many_sweeps_no_single_weight_has_a_better_level(offset, scaled):
    weight, hessian, levels = fitted(3, 20, offset, scaled)
    levels = sweep_bits(weight, hessian, levels, sweeps=40)
    best = output_error(weight, levels.dense(), hessian)
    for row, column in product(range(3), range(20)):
        for minus, second in product((False, True), repeat=2):
            other = levels.with_bits(levels.minus.clone(), levels.second.clone())
            other.minus[row, column], other.second[row, column] = minus, second
            assert output_error(weight, other.dense(), hessian) >= best * (1 - 1e-5)


def test_levels_that_are_all_zero():
    levels = random_levels(4, 20, 8)
    zero = dataclasses.replace(
        levels,
        scale=torch.zeros_like(levels.scale),
        offset=torch.zeros_like(levels.offset),
        columns=torch.zeros_like(levels.columns),
    )
    weight, hessian = torch.zeros(4, 20), torch.eye(20)
    for step in (solve_scales, solve_columns, sweep_bits):
        assert (step(weight, hessian, zero).dense() == 0).all()


def test_scales_out_of_range():
    small = torch.tensor([[0.1, 1e-9]])
    assert torch.equal(rounded_to(small, torch.float16, 0.1), small.half().float())
    for value in (1e6, 1e-9, torch.nan):
        with pytest.raises(ValueError, match=r"out of the range of torch.float16; pass scale_dtype"):
            rounded_to(torch.full((2, 3), value), torch.float16, value)
    assert rounded_to(torch.tensor([[1e6]]), torch.bfloat16, 1e6) == pytest.approx(1e6, rel=0.01)
