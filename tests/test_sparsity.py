"""Patterns, exact counts, and OWL's shares."""

import pytest
import torch

from optimum_slim import Magnitude
from optimum_slim.sparsity import (
    Pattern,
    lowest,
    lowest_in_groups,
    lowest_in_rows,
    outlier_ratio,
    owl_shares,
    select,
)


def scores(rows=7, columns=13, seed=0):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_patterns():
    assert Pattern.parse(0.3) == Pattern(0.3)
    assert Pattern.parse("2:4") == Pattern(0.5, 2, 4) and Pattern.parse("3:8") == Pattern(0.625, 3, 8)
    assert [p for p in ("1:4", "2:4", "3:4", "4:8", "1:2") if Pattern.parse(p).has_positions] == ["1:4", "2:4"]


@pytest.mark.parametrize(
    "sparsity",
    [0, 1, 1.0, -0.1, True, None, float("nan"), "0.5", "4:4", "5:4", "0:4", "2:4:8", "2:65", "-2:4", "", ":", [0.5]],
    ids=repr,
)
def test_what_is_no_pattern_is_named(sparsity):
    with pytest.raises(ValueError, match=r"above 0 and below 1, or 'n:m'.*found"):
        Pattern.parse(sparsity)


@pytest.mark.parametrize(("columns", "expected"), [(8, 4), (9, 5), (10, 6), (11, 6), (3, 2), (1, 1)])
def test_a_short_group_keeps_as_many_or_all_it_has(columns, expected):
    pattern = Pattern.parse("2:4")
    mask = select(scores(5, columns), pattern)
    assert pattern.kept_in_row(columns) == expected
    assert ((~mask).sum(1) == expected).all()


@pytest.mark.parametrize("sparsity", ["1:4", "2:4", "3:4", "4:8", "1:2", "5:7"])
@pytest.mark.parametrize("columns", [8, 13, 3], ids=lambda n: f"in{n}")
def test_every_group_keeps_its_highest(sparsity, columns):
    keep, of = map(int, sparsity.split(":"))
    values = scores(6, columns)
    mask = lowest_in_groups(values, keep, of)
    assert mask.shape == values.shape and mask.dtype == torch.bool
    for group, dropped in zip(values.split(of, dim=1), mask.split(of, dim=1), strict=True):
        stays = min(keep, group.shape[1])
        assert ((~dropped).sum(1) == stays).all()
        for row, gone in zip(group, dropped, strict=True):
            assert sorted(row[~gone].tolist()) == sorted(row.tolist())[-stays:]


@pytest.mark.parametrize("count", [0, 1, 17, 45, 90, 91])
@pytest.mark.parametrize("kind", ["distinct", "ties", "constant", "zero"])
def test_lowest_is_exact_whatever_ties_there_are(kind, count):
    values = {"distinct": scores(), "ties": scores().mul(4).round(), "constant": torch.ones(7, 13)}
    values = values.get(kind, torch.zeros(7, 13))
    mask = lowest(values, count)
    assert int(mask.sum()) == count
    expected = torch.zeros(91, dtype=torch.bool)
    expected[values.flatten().sort(stable=True).indices[:count]] = True
    assert torch.equal(mask.flatten(), expected)


@pytest.mark.parametrize("pattern", [0.3, "2:4"])
def test_transposed_scores_give_the_same_mask(pattern):
    """The weight of a `Conv1D` is a transposed view."""
    values = scores().mul(4).round()
    mask = select(values.T.contiguous().T, Pattern.parse(pattern))
    assert torch.equal(mask, select(values, Pattern.parse(pattern)))


@pytest.mark.parametrize(
    "values", [scores(), scores().mul(3).round(), torch.zeros(7, 13)], ids=["any", "ties", "zero"]
)
def test_lowest_in_rows_is_exact(values):
    mask = lowest_in_rows(values, 6)
    assert (mask.sum(1) == 6).all()
    for row, gone in zip(values, mask, strict=True):
        assert row[gone].max() <= row[~gone].min()


def test_whole_matrices_and_rows_are_compared_as_asked():
    values = scores() + 10 * torch.arange(7)[:, None]
    assert int(select(values, Pattern.parse(0.5)).sum()) == int(0.5 * 91)
    assert select(values, Pattern.parse(0.5))[:3].all()
    assert (select(values, Pattern.parse(0.5), by_row=True).sum(1) == 6).all()


@pytest.mark.parametrize(("share", "rows", "columns"), [(0.57, 3, 100), (0.7, 3, 10), (0.6, 3, 15), (0.35, 3, 20)])
def test_counts_do_not_depend_on_how_a_product_is_rounded(share, rows, columns):
    """0.57 * 3 * 100 is 171 and 0.57 * (3 * 100) a little less: what is dropped must be what the layout reserves."""
    state = Magnitude(sparsity=share).compress(scores(rows, columns))
    kept = Magnitude(sparsity=share).layout(rows, columns)[1]
    assert int(select(scores(rows, columns), Pattern.parse(share)).sum()) == rows * columns - kept
    assert state["weight_values"].shape == (kept,)


def test_outlier_ratio_by_hand():
    parts = [torch.ones(3, 4), torch.tensor([[1.0, 1.0, 1.0, 20.0]])]  # mean 35 / 16
    assert outlier_ratio(parts, 5.0) == 1 / 16
    assert outlier_ratio(parts, 10.0) == 0
    assert outlier_ratio([torch.zeros(2, 2)], 5.0) == 0


def test_owl_closed_form():
    """shares = sparsity - (2 band (r - min) / (max - min) - their mean)"""
    assert owl_shares([0.0, 0.5, 1.0], [1, 1, 1], 0.5, 0.08) == (0.58, 0.5, 0.42)
    assert owl_shares([0.0, 1.0], [3, 1], 0.7, 0.1) == (0.75, 0.55)


def test_owl_keeps_the_mean_over_weights_and_the_order():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ratios = torch.rand(9, generator=generator).tolist()
        sizes = torch.randint(1, 50, (9,), generator=generator).tolist()
        shares = owl_shares(ratios, sizes, 0.6, 0.08)
        mean = sum(s * n for s, n in zip(shares, sizes, strict=True)) / sum(sizes)
        assert mean == pytest.approx(0.6, abs=1e-4)
        assert max(shares) - min(shares) == pytest.approx(0.16, abs=2e-4)
        assert all(abs(share - 0.6) <= 0.16 for share in shares)
        by_ratio = [share for _, share in sorted(zip(ratios, shares, strict=True))]
        assert by_ratio == sorted(shares, reverse=True)


def test_owl_without_differences_is_uniform():
    assert owl_shares([0.02] * 4, [5, 6, 7, 8], 0.5, 0.08) == (0.5,) * 4
    assert owl_shares([0.1], [5], 0.3, 0.2) == (0.3,)


def test_owl_shares_stay_shares():
    assert all(0 < share < 1 for share in owl_shares([0.0, 0.5, 1.0], [1, 1, 1], 0.95, 0.2))
    assert all(0 < share < 1 for share in owl_shares([0.0, 0.5, 1.0], [1, 1, 1], 0.05, 0.2))
