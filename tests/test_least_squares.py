"""`refit` against exact least squares, `pursue` against where it started."""

import functools
import itertools

import pytest
import torch

from optimum_slim.hessian import Hessian
from optimum_slim.least_squares import pursue, refit
from optimum_slim.sparsity import Pattern, select


def problem(rows=10, columns=32, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    x = torch.randn(300, 5) @ torch.randn(5, columns) + 0.5 * torch.randn(300, columns)
    weight = torch.randn(rows, columns)
    return weight.to(dtype), Hessian(x.T @ x / 300).matrix.to(dtype)


def output_error(weight, target, hessian):
    delta = (target - weight).double()
    return float(((delta @ hessian.double()) * delta).sum())


def solved(target, mask, hessian):
    """The normal equations of each row on its kept columns."""
    best = torch.zeros_like(target)
    for row in range(len(target)):
        kept = ~mask[row]
        if kept.any():
            right = (target[row] @ hessian)[kept]
            best[row, kept] = torch.linalg.solve(hessian[kept][:, kept], right)
    return best


def random_mask(shape, share=0.5, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def test_refit_solves_the_normal_equations():
    weight, hessian = problem()
    mask = random_mask(weight.shape)
    fitted = refit(weight.masked_fill(mask, 0), weight, mask, hessian, 100)
    torch.testing.assert_close(fitted, solved(weight, mask, hessian), rtol=1e-3, atol=1e-4)
    gradient = (weight - fitted) @ hessian
    assert gradient[~mask].abs().max() < 1e-4 * gradient[mask].abs().max()
    assert (fitted[mask] == 0).all()


def test_refit_in_fp32_comes_as_close():
    weight, hessian = problem(dtype=torch.float32)
    mask = random_mask(weight.shape)
    fitted = refit(weight.masked_fill(mask, 0), weight, mask, hessian, 100)
    best = solved(weight.double(), mask, hessian.double())
    assert output_error(fitted, weight, hessian) == pytest.approx(output_error(best, weight, hessian), rel=1e-5)


def test_every_iteration_lowers_the_error():
    weight, hessian = problem()
    mask = random_mask(weight.shape, 0.7)
    start = weight.masked_fill(mask, 0)
    errors = [output_error(refit(start, weight, mask, hessian, n), weight, hessian) for n in range(8)]
    assert errors[0] == pytest.approx(output_error(start, weight, hessian))
    assert all(after < before for before, after in itertools.pairwise(errors))


def test_refit_of_another_target_and_start():
    """The target need not be the weight the mask came from, and the start may hold values where nothing is kept."""
    weight, hessian = problem()
    mask, target = random_mask(weight.shape), torch.randn(weight.shape, dtype=torch.float64)
    fitted = refit(weight, target, mask, hessian, 100)
    torch.testing.assert_close(fitted, solved(target, mask, hessian), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["nothing dropped", "all dropped", "some rows all dropped", "solved already"])
def test_refit_with_nothing_to_do_is_finite(kind):
    weight, hessian = problem()
    mask = random_mask(weight.shape)
    if kind != "solved already":
        mask = torch.zeros_like(mask) if kind == "nothing dropped" else mask
        mask[: {"all dropped": 10, "some rows all dropped": 4}.get(kind, 0)] = True
    best = solved(weight, mask, hessian)
    start = best if kind == "solved already" else weight.masked_fill(mask, 0)
    fitted = refit(start, weight, mask, hessian, 60)
    torch.testing.assert_close(fitted, best, rtol=1e-3, atol=1e-4)


def test_the_arguments_are_left_alone():
    weight, hessian = problem()
    mask = random_mask(weight.shape)
    before = [tensor.clone() for tensor in (weight, mask, hessian)]
    refit(weight, weight, mask, hessian, 5)
    pursue(weight, weight, mask, hessian, functools.partial(select, pattern=Pattern.parse(0.5)), 3)
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, mask, hessian), strict=True))


@pytest.mark.parametrize("sparsity", [0.5, 0.7, "2:4", "4:8", "1:4", "3:5"])
def test_pursuit_never_hurts_and_keeps_the_counts(sparsity):
    pattern = Pattern.parse(sparsity)
    choose = functools.partial(select, pattern=pattern)
    gains = []
    for seed in range(6):
        weight, hessian = problem(columns=30, seed=seed)
        mask = choose(weight.abs())
        start = refit(weight.masked_fill(mask, 0), weight, mask, hessian, 2)
        better, found = pursue(weight.masked_fill(mask, 0), weight, mask, hessian, choose, 20)
        errors = [output_error(w, weight, hessian) for w in (start, better)]
        assert errors[1] <= errors[0] * (1 + 1e-9)
        assert (better[found] == 0).all()
        assert int(found.sum()) == int(mask.sum())
        if pattern.of:
            assert torch.equal(found.sum(1), mask.sum(1))
            for group in (~found).split(pattern.of, dim=1):
                assert (group.sum(1) == min(pattern.keep, group.shape[1])).all()
        gains.append(errors[1] / errors[0])
    assert sorted(gains)[3] < 0.95


def test_pursuit_without_rounds_is_a_short_refit():
    weight, hessian = problem()
    mask = random_mask(weight.shape)
    same, found = pursue(weight, weight, mask, hessian, None, 0)
    assert torch.equal(found, mask) and torch.equal(same, refit(weight, weight, mask, hessian, 2))


def test_more_rounds_are_never_worse():
    weight, hessian = problem()
    choose = functools.partial(select, pattern=Pattern.parse(0.6))
    mask = choose(weight.abs())
    errors = [
        output_error(pursue(weight, weight, mask, hessian, choose, rounds)[0], weight, hessian) for rounds in range(6)
    ]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]
