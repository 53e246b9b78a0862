"""SparseGPT: each piece against its equation, the whole against slow loops in float64."""

import dataclasses

import pytest
import torch

from optimum_slim.affine import AffineGrid
from optimum_slim.block import Group
from optimum_slim.hessian import Hessian
from optimum_slim.methods.sparsegpt import SparseGPT, eliminate, official
from optimum_slim.sparsity import Pattern, lowest, lowest_in_groups, select


HALF = Pattern.parse(0.5)


def problem(rows=24, columns=64, seed=0, white=False):
    """A Gaussian weight and the Gram matrix of strongly correlated (or of white) inputs."""
    torch.manual_seed(seed)
    x = torch.randn(4 * columns, columns)
    if not white:
        x = torch.randn(4 * columns, 1 + columns // 8) @ torch.randn(1 + columns // 8, columns) + x
    return torch.randn(rows, columns), x.T @ x / len(x)


def random_mask(rows=24, columns=64, share=0.5):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(9)) < share


def output_error(weight, dense, gram):
    delta = (dense - weight).double()
    return float(((delta @ gram.double()) * delta).sum())


def one_by_one(weight, matrix, mask, grid=None):
    """SparseGPT for a given mask, a column at a time, in float64; the inverse is shrunk, never factorized."""
    weight, inverse = weight.double().clone(), matrix.double().inverse()
    for j in range(weight.shape[1]):
        kept = weight[:, j].clone()
        if grid is not None:
            scale, zero = (value.double() for value in grid.column(j))
            kept = scale * ((kept / scale).round().add(zero).clamp(0, 2**grid.bits - 1) - zero)
        kept[mask[:, j]] = 0
        direction = inverse[0] / inverse[0, 0]
        weight[:, j:] -= (weight[:, j] - kept)[:, None] * direction
        weight[:, j] = kept
        inverse = inverse[1:, 1:] - inverse[1:, :1] * inverse[:1, 1:] / inverse[0, 0]
    return weight


@pytest.mark.parametrize("bits", [None, 3])
@pytest.mark.parametrize("pattern", [0.5, 0.8, "2:4", "4:8"])
def test_squared_errors_add_up_to_half_the_output_error(pattern, bits):
    weight, gram = problem()
    hessian = Hessian(gram)
    grid = None if bits is None else AffineGrid.fit(weight, bits)
    pruned, mask, error = eliminate(weight, hessian, Pattern.parse(pattern), 16, grid)
    assert error == pytest.approx(0.5 * output_error(pruned, weight, hessian.matrix), rel=1e-4)
    assert (pruned[mask] == 0).all()


@pytest.mark.parametrize("bits", [None, 4], ids=["values", "codes"])
@pytest.mark.parametrize("blocksize", [1, 5, 16, 128])
def test_a_given_mask_is_followed_the_same_in_blocks_of_any_size(blocksize, bits):
    weight, gram = problem(columns=61)
    hessian, mask = Hessian(gram), random_mask(columns=61)
    grid = None if bits is None else AffineGrid.fit(weight, bits, 16)
    found, same, _ = eliminate(weight, hessian, HALF, blocksize, grid, mask)
    expected = one_by_one(weight, hessian.matrix, mask, grid)
    if bits is None:
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    else:  # a code at the edge may fall to either side, which moves those after it
        equal = (found.double() - expected).abs() < 1e-4
        assert equal.all(dim=1).float().mean() > 0.8
    assert torch.equal(same, mask)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_groups_do_not_depend_on_the_block_size(pattern):
    weight, gram = problem(columns=60)
    results = [eliminate(weight, Hessian(gram), Pattern.parse(pattern), size) for size in (8, 16, 64)]
    for pruned, mask, _ in results[1:]:
        assert torch.equal(mask, results[0][1])
        torch.testing.assert_close(pruned, results[0][0], rtol=1e-3, atol=1e-4)


def test_dropping_the_first_columns_is_least_squares_on_the_rest():
    weight, gram = problem()
    hessian, mask = Hessian(gram), torch.zeros(24, 64, dtype=torch.bool)
    mask[:, :20] = True
    pruned, _, _ = eliminate(weight, hessian, HALF, 16, mask=mask)
    matrix = hessian.matrix.double()
    best = torch.linalg.solve(matrix[20:, 20:], (weight.double() @ matrix)[:, 20:], left=False)
    torch.testing.assert_close(pruned[:, 20:].double(), best, rtol=1e-3, atol=1e-4)


def test_dropping_the_last_columns_changes_nothing_else():
    weight, gram = problem()
    mask = torch.zeros(24, 64, dtype=torch.bool)
    mask[:, 44:] = True
    pruned, _, _ = eliminate(weight, Hessian(gram), HALF, 16, mask=mask)
    assert torch.equal(pruned, weight.masked_fill(mask, 0))


@pytest.mark.parametrize("pattern", [0.5, "2:4"])
def test_without_correlations_the_scores_are_those_of_wanda(pattern):
    weight, _ = problem()
    diagonal = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.1
    hessian = Hessian(torch.diag(diagonal), 1e-6)
    pruned, mask, _ = eliminate(weight, hessian, Pattern.parse(pattern), 64)
    assert torch.equal(mask, select(weight.abs() * diagonal.sqrt(), Pattern.parse(pattern)))
    assert torch.equal(pruned, weight.masked_fill(mask, 0))


@pytest.mark.parametrize("variant", ["improved", "paper", "official"])
@pytest.mark.parametrize("fields", [{}, {"sparsity": "2:4"}, {"bits": 4}], ids=str)
def test_scaling_the_inputs_changes_nothing(variant, fields):
    weight, gram = problem()
    step = SparseGPT(variant=variant, allocation="uniform", **fields)
    states = []
    for scale in (1, 1024):
        gram_or_hessian = scale * gram if variant == "official" else Hessian(scale * gram)
        states.append(step.compress(weight, gram_or_hessian))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


KINDS = {
    "random": lambda w, g: (w, g),
    "ties": lambda w, g: (w.round(), torch.eye(len(g))),
    "constant rows": lambda w, g: (w[:, :1].expand_as(w).contiguous(), torch.eye(len(g))),
    "dead": lambda w, g: (w, g * (torch.arange(len(g)) % 3 > 0) * (torch.arange(len(g)) % 3 > 0)[:, None]),
    "zero weight": lambda w, g: (torch.zeros_like(w), g),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns", "blocksize"), [(24, 64, 16), (7, 45, 16), (1, 3, 2), (5, 33, 128)])
def test_counts_are_exact_in_every_block(kind, rows, columns, blocksize):
    weight, gram = KINDS[kind](*problem(rows, columns))
    for share in (0.3, 0.5, 0.77):
        mask = eliminate(weight, Hessian(gram), Pattern.parse(share), blocksize)[1]
        assert int(mask.sum()) == int(share * rows * columns)
        stops = [*range(blocksize, columns, blocksize), columns]
        for start, stop in zip([0, *stops], stops, strict=False):
            assert int(mask[:, :stop].sum()) == int(share * rows * stop)
            assert int(mask[:, start:stop].sum()) - int(share * rows * (stop - start)) in (0, 1)
    for name in ("2:4", "4:8", "3:7"):
        pattern = Pattern.parse(name)
        mask = eliminate(weight, Hessian(gram), pattern, 56)[1]
        for group in (~mask).split(pattern.of, dim=1):
            assert (group.sum(1) == min(pattern.keep, group.shape[1])).all()


@pytest.mark.parametrize("pattern", [0.5, "2:4"])
@pytest.mark.parametrize("variant", ["improved", "paper", "official"])
def test_output_error_beside_magnitude(variant, pattern):
    step = SparseGPT(variant=variant, sparsity=pattern, allocation="uniform")
    for white, bound in ((False, 0.5), (True, 1.0)):
        for seed in range(5):
            weight, gram = problem(64, 128, seed, white)
            pruned, mask = step.prune(weight, gram if variant == "official" else Hessian(gram))
            baseline = weight.masked_fill(select(weight.abs(), Pattern.parse(pattern)), 0)
            assert (pruned[mask] == 0).all()
            assert output_error(pruned, weight, gram) < bound * output_error(baseline, weight, gram)


def test_each_improvement_lowers_the_output_error():
    for seed in range(4):
        weight, gram = problem(64, 128, seed)
        hessian = Hessian(gram)
        for pattern in (0.5, 0.7, "2:4"):
            step = SparseGPT(sparsity=pattern, allocation="uniform", variant="paper")
            errors = [
                output_error(dataclasses.replace(step, **fields).prune(weight, hessian)[0], weight, hessian.matrix)
                for fields in ({}, {"refit": 10}, {"pursuit": 5, "refit": 10})
            ]
            assert errors[0] > errors[1] > errors[2]


def test_against_every_mask_of_a_small_row():
    """3 of 6 weights of a row: never better than the best of all 20 masks, and mostly not far from it."""
    masks = torch.tensor([[n >> j & 1 for j in range(6)] for n in range(64)]).bool()
    masks = masks[masks.sum(1) == 3]
    ratios = []
    for seed in range(60):
        torch.manual_seed(seed)
        x = torch.randn(40, 6) @ torch.randn(6, 6)
        weight, hessian = torch.randn(1, 6), Hessian(x.T @ x / 40)
        matrix, best = hessian.matrix.double(), float("inf")
        for mask in masks:
            solution = torch.zeros(1, 6, dtype=torch.float64)
            right = (weight.double() @ matrix)[:, ~mask]
            solution[:, ~mask] = torch.linalg.solve(matrix[~mask][:, ~mask], right, left=False)
            best = min(best, output_error(solution, weight, matrix))
        for fields in ({}, {"pursuit": 5, "refit": 10}):
            step = SparseGPT(variant="paper", **fields)
            ratios.append(output_error(step.prune(weight, hessian)[0], weight, matrix) / best)
    assert min(ratios) > 1 - 1e-4
    assert sorted(ratios[::2])[30] < 4 and sorted(ratios[1::2])[30] < 2


@pytest.mark.parametrize("variant", ["improved", "paper", "official"])
def test_dead_inputs_are_dropped_first_and_their_weights_do_not_matter(variant):
    weight, gram = problem()
    gram[:, ::9] = gram[::9] = 0
    changed = weight.clone()
    changed[:, ::9] = 1e3
    step, shared = SparseGPT(variant=variant, allocation="uniform"), gram if variant == "official" else Hessian(gram)
    pruned, mask = step.prune(weight, shared)
    assert mask[:, ::9].all() and (pruned[:, ::9] == 0).all()
    assert torch.equal(step.prune(changed, shared)[0], pruned)


def joint(step, weight, shared):
    codes, mask, grid = step.prune_to_codes(weight, shared)
    return grid.values(codes).masked_fill(mask, 0), mask, grid


@pytest.mark.parametrize("pattern", [0.5, "2:4"])
@pytest.mark.parametrize("variant", ["improved", "paper", "official"])
def test_joint_bits(variant, pattern):
    weight, gram = problem()
    shared = gram if variant == "official" else Hessian(gram)
    plain = SparseGPT(variant=variant, sparsity=pattern, allocation="uniform")
    alone = output_error(plain.prune(weight, shared)[0], weight, gram)
    for bits, bound in ((8, 1.05 if variant == "improved" else 1.2), (4, 3.0)):  # updates outgrow the dense range
        step = dataclasses.replace(plain, bits=bits)
        dense, mask, grid = joint(step, weight, shared)
        assert ((grid.zero >= 0) & (grid.zero < 2**bits)).all() and (dense[mask] == 0).all()
        assert output_error(dense, weight, gram) < bound * alone
        pruned = plain.prune(weight, shared)[0]
        rounded = grid.values(grid.codes(pruned)).masked_fill(mask, 0)
        assert output_error(dense, weight, gram) <= output_error(rounded, weight, gram) * (1.001 if bits == 8 else 1)


def test_rounding_in_a_second_pass_is_better():
    for seed in range(3):
        weight, gram = problem(seed=seed)
        hessian = Hessian(gram)
        for bits in (3, 4):
            errors = [
                output_error(joint(SparseGPT(variant=v, bits=bits, group_size=32), weight, hessian)[0], weight, gram)
                for v in ("paper", "improved")
            ]
            assert errors[1] < errors[0]


def test_the_arguments_are_left_alone():
    weight, gram = problem()
    hessian = Hessian(gram)
    before = weight.clone(), gram.clone(), hessian.matrix.clone()
    SparseGPT(bits=4).compress(weight, hessian)
    SparseGPT(bits=4, variant="official").compress(weight, gram)
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, gram, hessian.matrix), strict=True))


def reference(weight, gram, share, keep, of, blocksize, grid=None):
    """The formulae of the authors' code in float64: threshold by rank, ties and all, and groups by topk."""
    weight, hessian = weight.double().clone(), 2 * gram.double()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(hessian.inverse(), upper=True)
    for first in range(0, weight.shape[1], blocksize):
        last = min(first + blocksize, weight.shape[1])
        scores = weight[:, first:last] ** 2 / upper.diagonal()[first:last] ** 2
        mask = torch.zeros_like(weight, dtype=torch.bool)
        if not of:
            mask[:, first:last] = scores <= scores.flatten().sort()[0][int(scores.numel() * share)]
        for j in range(first, last):
            if of and j % of == 0:
                now = weight[:, j : j + of] ** 2 / upper.diagonal()[j : j + of] ** 2
                mask.scatter_(1, j + now.topk(of - keep, dim=1, largest=False)[1], True)
            kept = weight[:, j].masked_fill(mask[:, j], 0)
            if grid is not None:
                scale, zero = (value.double() for value in grid.column(j))
                kept = scale * ((kept / scale).round().add(zero).clamp(0, 2**grid.bits - 1) - zero)
            weight[:, j:] -= ((weight[:, j] - kept) / upper[j, j])[:, None] * upper[j, j:]
            weight[:, j] = kept
    return weight


@pytest.mark.parametrize("columns", [48, 40], ids=["whole blocks", "short block"])
@pytest.mark.parametrize("pattern", [0.5, 0.75, "2:4", "4:8", "1:4"])
def test_official_is_the_reference(pattern, columns):
    chosen = Pattern.parse(pattern)
    for seed in range(4):
        weight, gram = problem(12, columns, seed)
        gram[:, 5] = gram[5] = 0
        expected = reference(weight, gram, chosen.share, chosen.keep, chosen.of, 16)
        found, mask = official(weight, gram, chosen, 16)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(mask | (found == 0), expected == 0)
        if not chosen.of:
            sizes = [min(16, columns - start) for start in range(0, columns, 16)]
            assert int(mask.sum()) == sum(int(12 * size * chosen.share) + 1 for size in sizes)


def test_official_drops_all_ties_and_rounds_as_the_reference():
    weight, gram = torch.ones(12, 48), torch.eye(48)
    assert official(weight, gram, HALF, 16)[1].all()
    weight, gram = problem(12, 48)
    grid = AffineGrid.fit(weight, 4)
    found = official(weight, gram, HALF, 16, grid=grid)[0]
    expected = reference(weight, gram, 0.5, 0, 0, 16, grid)
    assert ((found.double() - expected).abs() < 1e-4).all(dim=1).float().mean() > 0.7
    state = SparseGPT(variant="official", blocksize=16).compress(weight, gram)
    assert state["weight_values"].numel() == 12 * 48 // 2
    assert int((state["weight_values"] == 0).sum()) == 3  # one zero more in each block, stored as a kept one


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_a_matrix_that_cannot_be_factorized_is_refused_with_the_name_of_the_layer(variant):
    weight, _ = problem()
    step = SparseGPT(variant=variant, allocation="uniform")
    gram = torch.ones(64, 64).fill_diagonal_(0.01)
    with pytest.raises(ValueError, match="positive definite"):
        step.pack("layer", weight, step.share(Group(["layer"], gram, 500)))


@pytest.mark.parametrize(
    "fields",
    [
        {"variant": "best"},
        {"blocksize": 0},
        {"blocksize": 130, "sparsity": "2:4"},
        {"dampening": 0},
        {"dampening": 2},
        {"pursuit": -1},
        {"refit": 1.5},
        {"asymmetric": 2},
        {"asymmetric": -0.1},
    ],
    ids=str,
)
def test_bad_fields_are_named(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        SparseGPT(**fields)


def test_what_the_variants_decide():
    improved, paper = SparseGPT(), SparseGPT(variant="paper")
    assert (improved.pursuit, improved.refit, improved.sequential, improved.allocation) == (5, 10, True, "owl")
    assert (paper.pursuit, paper.refit, paper.sequential, paper.asymmetric) == (0, 0, False, 0.0)
    assert SparseGPT(sparsity="2:4").allocation == "uniform" and SparseGPT(variant="paper", refit=3).refit == 3
    with pytest.raises(ValueError, match="NaN or infinite"):
        SparseGPT().share(Group(["layer"], torch.full((4, 4), torch.nan), 500))


def plain_loop(weight, hessian, pattern, blocksize):
    """The paper's algorithm with U, one column after the other, in float64."""
    weight, upper = weight.double().clone(), torch.linalg.inv(hessian.factor.double())
    dropped = torch.zeros_like(weight, dtype=torch.bool)
    for j in range(weight.shape[1]):
        step = pattern.of or blocksize
        if j % step == 0:
            block = slice(j, min(j + step, weight.shape[1]))
            scores = (weight[:, block] / upper.diagonal()[block]).square()
            count = pattern.dropped(len(weight), block.stop) - pattern.dropped(len(weight), block.start)
            whole = lowest_in_groups(scores, pattern.keep, pattern.of) if pattern.of else lowest(scores, count)
            dropped[:, block] = whole
        error = weight[:, j] * dropped[:, j] / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:]
        weight[dropped[:, j], j] = 0
    return weight, dropped


@pytest.mark.parametrize("sparsity", [0.5, 0.7, "2:4", "3:8"])
def test_masks_and_weights_over_many_blocks_are_those_of_the_plain_loop(sparsity):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(800, 24, generator=generator) @ torch.randn(24, 192, generator=generator)
    inputs += torch.randn(800, 192, generator=generator)
    weight, pattern = torch.randn(24, 192, generator=generator), Pattern.parse(sparsity)
    hessian = Hessian(inputs.T @ inputs / len(inputs))
    hessian.matrix, hessian.factor = hessian.matrix.double(), hessian.factor.double()
    found, mask, _ = eliminate(weight.double(), hessian, pattern, 32)
    expected, dropped = plain_loop(weight, hessian, pattern, 32)
    assert torch.equal(mask, dropped)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
