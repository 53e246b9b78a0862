"""BiLLM: its searches by brute force, the authors' code as a slow reference, and the variants beside one another."""

import pytest
import torch
from binary_problems import output_error, problem

from optimum_slim import BiLLM
from optimum_slim.binarize import part_values, split_part
from optimum_slim.hessian import Hessian
from optimum_slim.methods.billm import (
    COUNTS,
    SHARES,
    fit_improved,
    official_columns,
    official_split,
    paper_columns,
    paper_split,
)


def saliency_of(weight, gram):
    return (weight * Hessian(gram).factor.diagonal()).square()


def binarized(weight, mask):
    """First-order binarization of the masked weights of each row, zeros elsewhere; a plain loop."""
    result = torch.zeros_like(weight)
    for row in range(len(weight)):
        chosen = weight[row][mask[row]]
        if len(chosen):
            result[row][mask[row]] = chosen.abs().mean() * torch.where(chosen < 0, -1.0, 1.0)
    return result


@pytest.mark.parametrize("columns", [64, 16, 4, 2, 1])
def test_salient_columns_of_the_paper(columns):
    weight, gram = problem(8, columns)
    weight[:, ::5] *= 6
    saliency = saliency_of(weight, gram)
    salient = paper_columns(weight, saliency)
    order = saliency.sum(0).argsort(descending=True)
    last = max(1, columns - 1)
    errors = {}
    for count in range(min(3, last), min(30, last) + 1):
        mask = torch.zeros(columns, dtype=torch.bool)
        mask[order[:count]] = True
        both = binarized(weight, mask.expand(8, -1)) + binarized(weight, ~mask.expand(8, -1))
        errors[count] = float((weight - both).square().sum())
    best = min(errors, key=errors.get)
    assert set(salient.nonzero()[:, 0].tolist()) == set(order[:best].tolist())
    assert columns < 8 or 3 <= int(salient.sum()) <= 30


def test_split_of_the_paper():
    weight, _ = problem(8, 40)
    large = paper_split(weight)
    errors = []
    for share in SHARES:
        mask = weight.abs() > share * weight.abs().max()
        errors.append(float((weight - binarized(weight, mask) - binarized(weight, ~mask)).square().sum()))
    threshold = SHARES[errors.index(min(errors))] * weight.abs().max()
    assert torch.equal(large, weight.abs() > threshold)


def test_the_error_of_the_split_has_one_minimum_on_a_bell_curve():
    weight = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    sizes, energy = weight.abs(), float(weight.square().sum())
    errors = []
    for share in SHARES:
        part = split_part(weight, sizes > share * sizes.max())
        dense = torch.where(part.second, part.scale[:, 1:], part.scale[:, :1]) * torch.where(part.minus, -1.0, 1.0)
        errors.append(float((weight - dense).square().sum()) / energy)
    signs = [after > before for before, after in zip(errors[::4], errors[4::4], strict=False)]
    assert signs == sorted(signs) and not signs[0] and signs[-1]
    assert min(errors) == pytest.approx(0.12, abs=0.01)
    assert 0.15 < SHARES[errors.index(min(errors))] < 0.3
    threshold = sizes[paper_split(weight)].min()
    assert 0.15 < float(threshold / sizes.max()) < 0.3


def test_rows_of_two_magnitudes_are_exact():
    generator = torch.Generator().manual_seed(0)
    large = torch.rand(12, 64, generator=generator) < 0.2
    weight = torch.where(large, 0.75, 0.25) * torch.where(torch.rand(12, 64, generator=generator) < 0.5, -1.0, 1.0)
    second = paper_split(weight)
    assert torch.equal(second, large)
    torch.testing.assert_close(part_values(split_part(weight, second), salient=False), weight)
    levels = BiLLM(group_size=32).binarize(weight, Hessian(problem(12, 64)[1]))
    torch.testing.assert_close(levels.dense(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["improved", "paper", "official"])
@pytest.mark.parametrize("columns", [64, 40], ids=["whole groups", "short group"])
def test_masks_are_disjoint_cover_everything_and_are_constant_along_columns(variant, columns):
    weight, gram = problem(16, columns)
    weight[:, 5] *= 9
    levels = BiLLM(variant=variant, group_size=32).binarize(weight, Hessian(gram))
    salient = levels.salient.expand_as(weight)
    concentrated, sparse = ~salient & ~levels.second, ~salient & levels.second
    assert ((salient.int() + concentrated.int() + sparse.int()) == 1).all()
    for start in range(0, columns, 32):
        found = int(levels.salient[start : start + 32].sum())
        width = min(32, columns - start)
        assert {"paper": 3, "official": 1, "improved": 0}[variant] <= found <= max(*COUNTS, 30) and found < width
    if variant == "paper":  # by one threshold for the whole group
        target = weight[:, :32]
        sizes = target.abs()[:, ~levels.salient[:32]]
        second = levels.second[:, :32][:, ~levels.salient[:32]]
        assert sizes[second].min() > sizes[~second].max()


def authors(weight, gram, size):
    """The formulae of the authors' code in float64, with masks for columns and 1 for the sign of 0."""
    weight, hessian = weight.double().clone(), gram.double() / gram.diagonal().double().mean()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(hessian.inverse(), upper=True)

    def quantize(matrix, mask, order):
        total = torch.zeros_like(matrix)
        for _ in range(order):
            left = torch.where(mask, matrix - total, torch.nan)
            mean = left.nanmean(1, keepdim=True).nan_to_num(0)
            scale = (left - mean).abs().nanmean(1, keepdim=True).nan_to_num(0)
            sign = torch.where(left - mean < 0, -1.0, 1.0)
            total += torch.where(mask, mean + scale * sign, 0)
        return total

    for start in range(0, weight.shape[1], size):
        group = slice(start, min(start + size, weight.shape[1]))
        block, factor = weight[:, group].clone(), upper[group, group]
        scores = block**2 / factor.diagonal() ** 2
        order, width = scores.sum(0).argsort(descending=True), block.shape[1]
        best = (float("inf"), None)
        for count in range(1, min(50, width)):
            columns = torch.zeros(width, dtype=torch.bool)
            columns[order[:count]] = True
            mask = columns.expand_as(block)
            error = float((scores - quantize(scores, mask, 2) - quantize(scores, ~mask, 2)).square().mean())
            if error < best[0]:
                best = (error, mask)
        salient, best = best[1], (float("inf"), None)
        twice = quantize(scores, salient, 2)
        for threshold in torch.quantile((scores * ~salient).flatten(), torch.linspace(0.1, 0.9, 81).double()):
            large = (scores * ~salient >= threshold) & ~salient
            small = (scores * ~salient < threshold) & ~salient
            error = float((scores - quantize(scores, small, 1) - quantize(scores, large, 1) - twice).square().mean())
            if error < best[0]:
                best = (error, (small, large))
        small, large = best[1]
        found = quantize(block, small, 1) + quantize(block, large, 1) + quantize(block, salient, 2)
        weight[:, group.stop :] -= (block - found) / factor.diagonal() @ upper[group, group.stop :]
        weight[:, group] = found
    return weight


@pytest.mark.parametrize("columns", [48, 40], ids=["whole groups", "short group"])
def test_official_is_the_authors_code(columns):
    equal = []
    for seed in range(3):
        weight, gram = problem(8, columns, seed)
        levels = BiLLM(variant="official", group_size=24, scale_dtype="float32").binarize(weight, Hessian(gram))
        near = (levels.dense().double() - authors(weight, gram, 24)).abs() < 1e-5
        assert near[:, :24].all()
        equal.append(near.float().mean())
    assert min(equal) > 0.97  # a weight at a threshold may fall to either side


def test_searches_of_the_authors_code_stay_in_their_ranges():
    saliency = torch.rand(6, 90, generator=torch.Generator().manual_seed(0)) ** 8
    salient = official_columns(saliency)
    assert 1 <= int(salient.sum()) <= 49
    large = official_split(saliency, salient)
    assert large.shape == (6, 90 - int(salient.sum()))
    plain = saliency[:, ~salient]
    assert plain[large].min() > plain[~large].max()
    assert official_columns(saliency[:, :1]).tolist() == [True]


@pytest.mark.parametrize("offset", [False, True])
def test_the_improved_fit_of_a_group_is_better_than_the_papers(offset):
    ratios = []
    for seed in range(4):
        weight, gram = problem(24, 64, seed)
        hessian = Hessian(gram)
        counts, pivots = hessian.matrix.diagonal(), hessian.factor.diagonal()
        paper = BiLLM(variant="paper", offset=offset).fit(weight, counts, pivots)
        errors = [((weight - paper.dense()).square() @ counts).sum()]
        for iterations in (3, 8):
            levels = fit_improved(weight, counts, saliency_of(weight, gram), iterations, offset=offset)
            errors.append(((weight - levels.dense()).square() @ counts).sum())
        assert errors[2] <= errors[1] * (1 + 1e-5)
        ratios.append(float(errors[2] / errors[0]))
    assert max(ratios) < 0.8


def test_improved_is_better_than_paper_is_better_than_official():
    errors = dict.fromkeys(("improved", "paper", "official"), 0.0)
    for seed in range(4):
        weight, gram = problem(32, 96, seed)
        hessian = Hessian(gram)
        for variant in errors:
            levels = BiLLM(variant=variant, group_size=32).binarize(weight, hessian)
            errors[variant] += output_error(weight, levels.dense(), hessian.matrix)
    assert errors["improved"] < 0.7 * errors["paper"] < 0.7 * errors["official"]


def test_offsets_help_and_cost_three_numbers_for_each_group():
    errors = []
    for offset in (False, True):
        step = BiLLM(group_size=32, offset=offset)
        total = 0.0
        for seed in range(3):
            weight, gram = problem(24, 64, seed)
            total += output_error(weight, step.binarize(weight, Hessian(gram)).dense(), gram)
        errors.append(total)
    assert errors[1] < errors[0]


def test_what_the_variants_decide():
    improved, paper, official = (BiLLM(variant=name) for name in ("improved", "paper", "official"))
    assert (improved.offset, improved.compensation, improved.rounds, improved.sequential) == (
        False,
        "triangular",
        2,
        True,
    )
    assert (paper.offset, paper.iterations, paper.rounds, paper.asymmetric, paper.sequential) == (
        False,
        0,
        0,
        0,
        False,
    )
    assert (official.offset, official.compensation, official.group_size) == (True, "diagonal", 128)
    assert BiLLM(variant="paper", compensation="none", rounds=1).rounds == 1
