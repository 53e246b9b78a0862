"""Wanda: scores by hand, counts in every row, and least squares after it."""

import pytest
import torch

from optimum_slim import Wanda
from optimum_slim.affine import AffineGrid
from optimum_slim.block import Group
from optimum_slim.hessian import Hessian
from optimum_slim.sparsity import lowest_in_groups, lowest_in_rows


def problem(rows=12, columns=40, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(300, 5) @ torch.randn(5, columns) + torch.randn(300, columns)
    return torch.randn(rows, columns), Group(["layer"], x.T @ x / 300, 300)


def output_error(weight, dense, gram):
    delta = (dense - weight).double()
    return float(((delta @ gram.double()) * delta).sum())


def test_scores_by_hand():
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    group = Group(["layer"], torch.diag(torch.tensor([100.0, 25.0, 1.0, 0.25])), 10)
    # |w| * norm: [10, 10, 3, 2] and [40, 15, 2, 0.5]
    assert Wanda().prune(weight, group)[0].tolist() == [[1, -2, 0, 0], [4, 3, 0, 0]]
    assert Wanda(sparsity="1:4").prune(weight, group)[1].tolist() == [[True, False, True, True], [False] + 3 * [True]]


@pytest.mark.parametrize(("share", "columns"), [(0.5, 40), (0.3, 41), (0.77, 13)])
def test_every_row_loses_the_same_count_and_keeps_its_values(share, columns):
    weight, group = problem(columns=columns)
    pruned, mask = Wanda(sparsity=share).prune(weight, group)
    assert torch.equal(mask, lowest_in_rows(weight.abs() * group.gram.diagonal().sqrt(), int(share * columns)))
    assert torch.equal(pruned, weight.masked_fill(mask, 0))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "2:3"])
def test_groups(pattern):
    weight, group = problem(columns=41)
    keep, of = map(int, pattern.split(":"))
    mask = Wanda(sparsity=pattern).prune(weight, group)[1]
    assert torch.equal(mask, lowest_in_groups(weight.abs() * group.gram.diagonal().sqrt(), keep, of))


@pytest.mark.parametrize("pattern", [0.5, "2:4"])
def test_better_than_magnitude_where_inputs_differ_and_refit_is_better_still(pattern):
    for seed in range(5):
        weight, group = problem(seed=seed)
        scale = torch.rand(40) * 3 + 0.1
        group = Group(["layer"], group.gram * scale * scale[:, None], 300)
        unseen = Group(["layer"], torch.zeros(40, 40), 0)
        errors = [
            output_error(step.prune(weight, shared)[0], weight, group.gram)
            for step, shared in (
                (Wanda(sparsity=pattern), unseen),
                (Wanda(sparsity=pattern), group),
                (Wanda(sparsity=pattern, refit=10), group),
            )
        ]
        assert errors[0] > errors[1] > 2 * errors[2]


def test_refit_is_least_squares_on_the_mask():
    weight, group = problem(rows=4)
    pruned, mask = Wanda(refit=200).prune(weight, group)
    assert torch.equal(mask, Wanda().prune(weight, group)[1])
    hessian = Hessian(group.gram).matrix.double()
    for row in range(4):
        kept = ~mask[row]
        best = torch.linalg.solve(hessian[kept][:, kept], (weight[row].double() @ hessian)[kept])
        torch.testing.assert_close(pruned[row, kept].double(), best, rtol=1e-3, atol=1e-3)
    assert (pruned[mask] == 0).all()


def test_dead_inputs_go_first_and_no_tokens_means_magnitude():
    weight, group = problem()
    gram = group.gram.clone()
    gram[:, 3] = gram[3] = 0
    mask = Wanda(sparsity=0.1).prune(weight, Group(["layer"], gram, 300))[1]
    assert mask[:, 3].all() and (mask.sum(1) == 4).all()
    unseen = Group(["layer"], torch.zeros(40, 40), 0)
    for step in (Wanda(), Wanda(refit=3)):
        assert torch.equal(step.prune(weight, unseen)[1], lowest_in_rows(weight.abs(), 20))


@pytest.mark.parametrize("pattern", [0.5, "2:4", "4:8"])
def test_packed_state(pattern):
    weight, group = problem(columns=41)
    for bits in (None, 4):
        step = Wanda(sparsity=pattern, bits=bits)
        packed = step.empty(torch.nn.Linear(41, 12, bias=False))
        packed.load_packed(step.compress(weight, group))
        packed.validate()
        pruned, mask = step.prune(weight, group)
        if bits:
            grid = AffineGrid.fit(weight, bits)
            pruned = grid.values(grid.codes(pruned))
        assert torch.equal(packed.dense(), pruned.masked_fill(mask, 0))
        assert packed.layout == ("positions" if pattern == "2:4" else "rows") and torch.equal(packed.mask(), ~mask)
