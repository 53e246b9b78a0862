"""PT2-LLM: each piece against its equation, and the whole against rounding to nearest."""

from itertools import pairwise

import pytest
import torch
from helpers import tiny_llama, token_ids

from optimum_slim import slim
from optimum_slim._kernels import dequantize, unpack_ternary
from optimum_slim.grid import Grid, solve_grids, sweep_codes
from optimum_slim.methods.pt2llm import PT2LLM, align_grid, feedback, fit_ternary, nearest_codes, prepare
from optimum_slim.walk import walk


GRID = Grid(16, torch.float32)


def problem(rows=24, columns=56, seed=0):
    """A Gaussian weight and the Gram matrix of strongly correlated inputs."""
    torch.manual_seed(seed)
    x = torch.randn(400, 6) @ torch.randn(6, columns) + 0.3 * torch.randn(400, columns)
    return torch.randn(rows, columns) / 8, x.T @ x / len(x)


def output_error(weight, dense, gram):
    delta = (dense - weight).double()
    return ((delta @ gram.double()) * delta).sum().item()


def dense(state, rows, group_size):
    return dequantize(state["weight"], state["weight_scale"], state["weight_offset"], rows, group_size)


def rounded(weight, group_size):
    """Ternary rounding to nearest without data: ITF for each group."""
    parts = []
    for block in weight.split(group_size, dim=1):
        scale, offset, codes = fit_ternary(block, torch.ones(block.shape[1]), 20)
        parts.append(scale * codes + offset)
    return torch.cat(parts, dim=1)


def ternary_weight(rows=8, columns=40, group_size=16):
    torch.manual_seed(0)
    codes = torch.randint(-1, 2, (rows, columns)).float()
    groups = -(-columns // group_size)
    grid = Grid(group_size, torch.float16)
    scale, offset = (torch.rand(rows, groups) / 4 + 0.25).half(), (torch.randn(rows, groups) / 8).half()
    return grid.weight(scale.float(), offset.float(), codes), scale, offset, codes


def test_itf_error_never_grows():
    weight, _ = problem()
    importance = torch.rand(56) + 0.1
    errors = []
    for iterations in range(1, 12):
        scale, offset, codes = fit_ternary(weight, importance, iterations)
        errors.append(((weight - scale * codes - offset).square() * importance).sum().item())
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    assert errors[-1] < 0.99 * errors[0]
    assert torch.equal(codes, nearest_codes(weight, scale, offset))


@pytest.mark.parametrize("variant", ["refined", "paper"])
@pytest.mark.parametrize("group_size", [16, 64])
def test_ternary_weights_with_offsets_are_recovered_exactly(variant, group_size):
    weight, scale, offset, codes = ternary_weight(columns=40, group_size=group_size)
    _, gram = problem(columns=40)
    state = PT2LLM(group_size=group_size, variant=variant).compress(weight, gram)
    assert torch.equal(unpack_ternary(state["weight"], 8).float(), codes)
    assert torch.equal(state["weight_scale"], scale) and torch.equal(state["weight_offset"], offset)


def test_align_grid_is_the_least_squares_solution():
    weight, gram = problem(rows=5, columns=16)
    codes = torch.randint(-1, 2, weight.shape, generator=torch.Generator().manual_seed(3)).float()
    scale, offset = align_grid(weight, codes, gram)
    root = torch.linalg.cholesky(gram.double())
    for row in range(5):
        basis = root.T @ torch.stack([codes[row], torch.ones(16)], dim=1).double()
        best = torch.linalg.lstsq(basis, root.T @ weight[row].double()).solution
        torch.testing.assert_close(torch.cat([scale[row], offset[row]]).double(), best, rtol=1e-5, atol=1e-6)


def test_align_grid_of_equal_codes():
    weight, gram = problem(rows=3, columns=16)
    codes = torch.tensor([-1.0, 0.0, 1.0])[:, None].expand(3, 16)
    scale, offset = align_grid(weight, codes, gram)
    assert (scale == 0).all()
    torch.testing.assert_close(offset[:, 0], weight @ gram.sum(0) / gram.sum())


def test_solve_grids_is_the_joint_least_squares_solution():
    weight, gram = problem(rows=4)
    weight, hessian, _ = prepare(weight, gram, 0.01)
    codes = torch.randint(-1, 2, weight.shape, generator=torch.Generator().manual_seed(3)).float()
    scale, offset, signed = solve_grids(weight, hessian, codes, GRID)
    member = torch.eye(4).repeat_interleave(16, dim=1)[:, :56].T.double()
    root = torch.linalg.cholesky(hessian.double())
    for row in range(4):
        basis = root.T @ torch.cat([member * signed[row].double()[:, None], member], dim=1)
        best = torch.linalg.lstsq(basis, root.T @ weight[row].double()).solution
        torch.testing.assert_close(torch.cat([scale[row], offset[row]]).double(), best, rtol=1e-3, atol=1e-4)
    assert (scale >= 0).all()


@pytest.mark.parametrize("by_column", [False, True], ids=["paper", "refined"])
def test_residuals_add_up_to_the_output_error(by_column):
    weight, gram = problem()
    weight, hessian, factor = prepare(weight, gram, 0.01)
    scale, offset, codes, error = feedback(weight, hessian, factor, GRID, iterations=10, by_column=by_column)
    expected = output_error(weight, GRID.weight(scale, offset, codes), hessian)
    assert error == pytest.approx(expected, rel=1e-4)


def test_each_refinement_lowers_the_output_error():
    weight, gram = problem()
    weight, hessian, factor = prepare(weight, gram, 0.01)
    scale, offset, codes, error = feedback(weight, hessian, factor, GRID, iterations=10, by_column=True)
    errors = [error]
    for _ in range(3):
        scale, offset, codes = solve_grids(weight, hessian, codes, GRID)
        errors.append(output_error(weight, GRID.weight(scale, offset, codes), hessian))
        codes = sweep_codes(weight, hessian, scale, offset, codes, GRID)
        errors.append(output_error(weight, GRID.weight(scale, offset, codes), hessian))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_codes_after_many_sweeps_cannot_be_improved_one_by_one():
    weight, gram = problem(rows=3, columns=20)
    weight, hessian, factor = prepare(weight, gram, 0.01)
    scale, offset, codes, _ = feedback(weight, hessian, factor, GRID, iterations=10, by_column=False)
    codes = sweep_codes(weight, hessian, scale, offset, codes, GRID, sweeps=30)
    for row in range(3):
        best = output_error(weight[row : row + 1], GRID.weight(scale, offset, codes)[row : row + 1], hessian)
        for column in range(20):
            for value in (-1, 0, 1):
                other = codes.clone()
                other[row, column] = value
                error = output_error(weight[row : row + 1], GRID.weight(scale, offset, other)[row : row + 1], hessian)
                assert error >= best * (1 - 1e-5)


def test_feedback_without_correlations_is_rounding():
    """A diagonal H leaves nothing to compensate."""
    weight, _ = problem()
    weight, hessian, factor = prepare(weight, torch.eye(56), 0.01)
    for by_column in (False, True):
        scale, offset, codes, _ = feedback(weight, hessian, factor, GRID, iterations=20, by_column=by_column)
        torch.testing.assert_close(GRID.weight(scale, offset, codes), rounded(weight, 16), rtol=1e-4, atol=1e-5)


def test_factor():
    weight, gram = problem()
    _, hessian, factor = prepare(weight, gram, 0.01)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor @ factor.T, hessian)


@pytest.mark.parametrize("variant", ["refined", "paper"])
def test_output_error_is_far_below_rounding(variant):
    ratios = []
    for seed in range(5):
        weight, gram = problem(seed=seed)
        state = PT2LLM(group_size=16, variant=variant).compress(weight, gram)
        ratios.append(
            output_error(weight, dense(state, 24, 16), gram) / output_error(weight, rounded(weight, 16), gram)
        )
    assert max(ratios) < {"refined": 0.2, "paper": 0.5}[variant]


def test_refined_is_better_than_the_paper_and_rounds_help():
    weight, gram = problem(rows=64)
    errors = [
        output_error(weight, dense(PT2LLM(group_size=16, **fields).compress(weight, gram), 64, 16), gram)
        for fields in ({"variant": "paper"}, {"rounds": 0}, {"rounds": 2})
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("variant", ["refined", "paper"])
def test_scaling_the_inputs_changes_nothing(variant):
    weight, gram = problem()
    step = PT2LLM(group_size=16, variant=variant)
    first, second = step.compress(weight, gram), step.compress(weight, 1024 * gram)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("rows", "columns", "group_size"), [(7, 33, 16), (4, 128, 128), (5, 20, 64), (1, 1, 128)])
def test_shapes_of_the_packed_state(rows, columns, group_size):
    weight, gram = problem(rows=rows, columns=columns)
    state = PT2LLM(group_size=group_size).compress(weight, gram)
    groups = -(-columns // group_size)
    assert state["weight"].dtype == torch.uint8 and state["weight"].shape == (-(-rows // 4), columns)
    for name in ("weight_scale", "weight_offset"):
        assert state[name].dtype == torch.float16 and state[name].shape == (rows, groups)
    linear = torch.nn.Linear(columns, rows, bias=False)
    packed = PT2LLM(group_size=group_size).empty(linear)
    packed.load_packed(state)
    assert torch.equal(packed.dense(), dense(state, rows, group_size))


def test_the_inputs_are_left_alone():
    weight, gram = problem()
    copies = weight.clone(), gram.clone()
    PT2LLM(group_size=16).compress(weight, gram)
    assert torch.equal(weight, copies[0]) and torch.equal(gram, copies[1])


def test_dead_inputs():
    weight, gram = problem()
    gram[:, 7] = gram[7] = 0
    prepared, hessian, _ = prepare(weight, gram, 0.01)
    assert (prepared[:, 7] == 0).all() and hessian[7, 7] > 0.9
    changed = weight.clone()
    changed[:, 7] = 1e4
    step = PT2LLM(group_size=16)
    first, second = step.compress(weight, gram), step.compress(changed, gram)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_singular_gram_matrix_is_dampened():
    weight, _ = problem()
    state = PT2LLM(group_size=16).compress(weight, torch.ones(56, 56))
    assert torch.isfinite(dense(state, 24, 16)).all()


def test_dampening_is_raised_until_it_suffices():
    weight, gram = problem()
    values, vectors = torch.linalg.eigh(gram)
    values[0] = -0.05 * gram.diagonal().mean()
    indefinite = vectors @ torch.diag(values) @ vectors.T
    _, hessian, _ = prepare(weight, indefinite, 0.001)
    assert hessian.diagonal().mean().item() == pytest.approx(1.1, rel=1e-3)


def test_an_indefinite_gram_matrix_is_refused():
    weight, _ = problem()
    with pytest.raises(ValueError, match=r"not positive definite, even with a dampening of 1\.0"):
        PT2LLM().compress(weight, torch.ones(56, 56).fill_diagonal_(0.1))


def test_no_tokens_and_no_data_are_refused():
    weight, gram = problem()
    with pytest.raises(ValueError, match="no calibration token reached"):
        PT2LLM().compress(weight, torch.zeros_like(gram))
    with pytest.raises(ValueError, match="needs the Gram matrix"):
        PT2LLM().compress(weight, None)
    with pytest.raises(ValueError, match=r"shape \(3, 3\), expected \(56, 56\)"):
        PT2LLM().compress(weight, torch.eye(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(value):
    weight, gram = problem()
    weight[3, 4] = value
    with pytest.raises(ValueError, match="the weight holds NaN or infinite"):
        PT2LLM().compress(weight, gram)
    weight[3, 4], gram[1, 2] = 0, value
    with pytest.raises(ValueError, match="the Gram matrix of the layer's inputs holds NaN"):
        PT2LLM().compress(weight, gram)


@pytest.mark.parametrize("factor", [1e7, 1e-8], ids=["overflow", "underflow"])
def test_scales_out_of_range_name_the_dtype_to_use(factor):
    weight, gram = problem()
    with pytest.raises(ValueError, match=r'out of the range of torch\.float16; pass scale_dtype="bfloat16"'):
        PT2LLM(group_size=16).compress(factor * weight, gram)
    for name in ("bfloat16", "float32"):
        state = PT2LLM(group_size=16, scale_dtype=name).compress(factor * weight, gram)
        assert state["weight_scale"].dtype == getattr(torch, name)
        error = output_error(weight, dense(state, 24, 16) / factor, gram)
        assert error < 0.2 * output_error(weight, rounded(weight, 16), gram)


def test_constant_and_zero_rows():
    weight, gram = problem()
    weight[0], weight[1] = 0, 0.5
    restored = dense(PT2LLM(group_size=16).compress(weight, gram), 24, 16)
    torch.testing.assert_close(restored[:2], weight[:2], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "fields",
    [
        {"group_size": 0},
        {"iterations": 1.5},
        {"rounds": -1},
        {"dampening": 0},
        {"dampening": 2},
        {"asymmetric": 2},
        {"variant": "best"},
        {"activation_bits": 4},
        {"scale_dtype": "float8"},
    ],
    ids=str,
)
def test_bad_fields_are_named(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        PT2LLM(**fields)


def test_only_the_refined_variant_makes_up_for_earlier_layers():
    assert (PT2LLM().asymmetric, PT2LLM(variant="paper").asymmetric, PT2LLM(asymmetric=0).asymmetric) == (0.25, 0, 0)


def test_asymmetric_calibration_comes_closer_to_the_dense_model():
    tokens, errors = token_ids(24, 32), []
    dense = [block.inputs[0] for block in walk(wide_llama(), tokens)][3]
    for strength in (0.0, 0.25):
        model = wide_llama()
        slim(model, PT2LLM(group_size=32, asymmetric=strength), data=tokens)
        errors.append(float(([block.inputs[0] for block in walk(model, tokens)][3] - dense).square().mean()))
    assert errors[1] < errors[0]


def wide_llama():
    return tiny_llama(num_hidden_layers=4, initializer_range=0.12)
