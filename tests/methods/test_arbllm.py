"""ARB-RC: closed forms that never raise the error, and more for fewer bytes than BiLLM."""

from itertools import pairwise

import pytest
import torch
from binary_problems import output_error, problem
from torch import nn

from optimum_slim import ARBLLM, BiLLM
from optimum_slim.hessian import Hessian


def scaled_problem(rows=32, columns=96, seed=0):
    """Weights whose columns differ in width, as those of real layers do."""
    weight, gram = problem(rows, columns, seed)
    widths = torch.exp(0.5 * torch.randn(columns, generator=torch.Generator().manual_seed(seed)))
    return weight * widths, gram


def test_the_error_never_grows_with_the_iterations():
    for seed in range(3):
        weight, gram = scaled_problem(16, 48, seed)
        hessian = Hessian(gram)
        counts, pivots = hessian.matrix.diagonal(), hessian.factor.diagonal()
        errors = []
        for iterations in range(16):
            levels = ARBLLM(variant="paper", iterations=iterations).fit(weight, counts, pivots)
            errors.append(float((weight - levels.dense()).square().sum()))
        assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
        assert errors[-1] < 0.95 * errors[0]


def test_without_iterations_the_paper_variant_is_billm():
    weight, gram = scaled_problem()
    hessian = Hessian(gram)
    arb = ARBLLM(variant="paper", iterations=0, group_size=32).binarize(weight, hessian)
    billm = BiLLM(variant="paper", group_size=32).binarize(weight, hessian)
    assert torch.equal(arb.dense(), billm.dense()) and (arb.columns == 1).all()


def test_salient_columns_and_bitmap_of_the_paper_stay():
    weight, gram = scaled_problem()
    hessian = Hessian(gram)
    counts, pivots = hessian.matrix.diagonal(), hessian.factor.diagonal()
    first, last = (ARBLLM(variant="paper", iterations=n).fit(weight, counts, pivots) for n in (0, 15))
    assert torch.equal(first.salient, last.salient)
    plain = ~first.salient
    assert torch.equal(first.second[:, plain], last.second[:, plain])
    assert torch.equal(first.minus[:, plain], last.minus[:, plain])


def test_scales_are_fixed_points_of_their_closed_forms():
    """After many turns, a = sum c s W / sum c² over the row and c = sum a s W / sum a² over the column."""
    weight, gram = scaled_problem(16, 48)
    hessian = Hessian(gram)
    step = ARBLLM(variant="paper", iterations=200)
    levels = step.fit(weight, hessian.matrix.diagonal(), hessian.factor.diagonal())
    sign = torch.where(levels.minus, -1.0, 1.0) * weight
    for t in range(2):
        mask = (~levels.salient & (levels.second == bool(t))).float()
        a, c = levels.scale[:, 0, t], levels.columns[t]
        rows = (mask * c * sign).sum(1) / (mask * c**2).sum(1)
        columns = (mask * a[:, None] * sign).sum(0) / (mask * a[:, None] ** 2).sum(0)
        used = mask.any(0)
        torch.testing.assert_close(rows[mask.any(1)], a[mask.any(1)], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(columns[used], c[used], rtol=1e-3, atol=1e-4)


def test_rank_one_magnitudes_are_exact():
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.rand(size, generator=generator) / 2 + 0.5 for size in (24, 64))
    sign = torch.where(torch.rand(24, 64, generator=generator) < 0.5, -1.0, 1.0)
    weight = rows[:, None] * columns * sign
    hessian = Hessian(problem(24, 64)[1])
    errors = []
    for step in (ARBLLM(group_size=64, scale_dtype="float32"), BiLLM(group_size=64, scale_dtype="float32")):
        dense = step.binarize(weight, hessian).dense()
        errors.append(output_error(weight, dense, hessian.matrix))
    assert errors[0] < 1e-3 * errors[1]


@pytest.mark.parametrize("variant", ["paper", "improved"])
def test_better_than_billm(variant):
    errors = [0.0, 0.0]
    for seed in range(4):
        weight, gram = scaled_problem(seed=seed)
        hessian = Hessian(gram)
        for index, method in enumerate((ARBLLM, BiLLM)):
            levels = method(variant=variant, group_size=32).binarize(weight, hessian)
            errors[index] += output_error(weight, levels.dense(), hessian.matrix)
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("shape", [(576, 576), (1536, 576), (576, 1536), (4096, 4096), (4096, 11008)], ids=str)
def test_no_more_bytes_than_billm(shape):
    linear = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    default, official = (step.empty(linear).stored_bits() for step in (ARBLLM(), BiLLM(variant="official")))
    assert default <= BiLLM().empty(linear).stored_bits() < official
    assert ARBLLM(variant="paper").empty(linear).stored_bits() < official


def test_what_the_variants_decide():
    improved, paper = ARBLLM(), ARBLLM(variant="paper")
    assert (improved.offset, improved.compensation, improved.sequential) == (True, "triangular", True)
    assert (paper.offset, paper.group_size, paper.iterations, paper.rounds) == (False, 128, 15, 0)
    with pytest.raises(ValueError, match="variant must be one of improved, paper, found 'official'"):
        ARBLLM(variant="official")
