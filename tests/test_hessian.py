"""The factor of H⁻¹, dampening, and the target of asymmetric calibration."""

import pytest
import torch

from optimum_slim.hessian import Hessian, asymmetric_map


def gram(columns=24, seed=0, samples=200):
    torch.manual_seed(seed)
    x = torch.randn(samples, 4) @ torch.randn(4, columns) + 0.3 * torch.randn(samples, columns)
    return x.T @ x / samples


def indefinite(share):
    values, vectors = torch.linalg.eigh(gram())
    values[0] = -share * gram().diagonal().mean()
    return vectors @ torch.diag(values) @ vectors.T


def test_upper_factor_of_the_inverse():
    hessian = Hessian(gram())
    upper = torch.linalg.inv(hessian.factor.double())
    assert torch.equal(upper, upper.triu())
    identity = torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(upper.T @ upper @ hessian.matrix.double(), identity, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hessian.factor @ hessian.factor.T, hessian.matrix)


def test_squares_of_the_diagonal_and_rows_of_the_factor():
    """U[j, j]² = [H[j:, j:]⁻¹]_11, and U[j, j:] / U[j, j] is the first row of that inverse over its first entry."""
    hessian = Hessian(gram())
    for j in range(24):
        inverse = hessian.matrix[j:, j:].double().inverse()
        upper = torch.linalg.inv(hessian.factor.double())[j, j:]
        assert float(upper[0] ** 2) == pytest.approx(float(inverse[0, 0]), rel=1e-4)
        torch.testing.assert_close(upper / upper[0], inverse[0] / inverse[0, 0], rtol=1e-3, atol=1e-4)


def test_the_mean_diagonal_is_one_plus_dampening_whatever_the_scale():
    for scale in (1.0, 1024.0, 2.0**-20):
        hessian = Hessian(scale * gram(), 0.05)
        assert hessian.matrix.diagonal().mean().item() == pytest.approx(1.05, rel=1e-5)
        assert torch.equal(hessian.matrix, Hessian(gram(), 0.05).matrix)
        assert hessian.dampening == 0.05


def test_the_gram_matrix_is_not_changed():
    matrix = gram()
    matrix[3] = matrix[:, 3] = 0
    before = matrix.clone()
    Hessian(matrix)
    asymmetric_map(matrix, matrix, 0.5)
    assert torch.equal(matrix, before)


def test_dead_inputs_stand_alone():
    matrix = gram()
    matrix[3] = matrix[:, 3] = 0
    hessian = Hessian(matrix)
    assert hessian.dead.tolist() == [j == 3 for j in range(24)]
    assert hessian.matrix[3, 3] > 0.9 and hessian.matrix[3].count_nonzero() == 1
    assert torch.isfinite(hessian.factor).all()


def test_divide_and_error():
    hessian = Hessian(gram())
    torch.manual_seed(1)
    delta = torch.randn(5, 24)
    torch.testing.assert_close(hessian.divide(delta) @ hessian.matrix, delta, rtol=1e-3, atol=1e-4)
    expected = torch.trace(delta.double() @ hessian.matrix.double() @ delta.double().T)
    assert hessian.error(delta) == pytest.approx(float(expected), rel=1e-5)


def test_a_singular_matrix_is_dampened():
    hessian = Hessian(torch.ones(24, 24))
    assert hessian.dampening == 0.01 and torch.isfinite(hessian.factor).all()


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.001), (0.005, 0.01), (0.05, 0.1), (0.5, 1.0)])
def test_dampening_is_raised_tenfold_until_it_suffices(share, expected):
    hessian = Hessian(indefinite(share), 0.001)
    assert hessian.dampening == pytest.approx(expected)
    mean = indefinite(share).diagonal().mean()
    undampened = indefinite(share) / mean
    torch.testing.assert_close(hessian.matrix, undampened + expected * torch.eye(24), rtol=1e-4, atol=1e-4)


def test_inputs_that_were_always_zero_are_all_dead():
    hessian = Hessian(torch.zeros(4, 4))
    assert hessian.dead.all() and torch.isfinite(hessian.factor).all()


def test_what_cannot_be_dampened_or_measured_is_refused():
    with pytest.raises(ValueError, match=r"not positive definite, even with a dampening of 1\.0"):
        Hessian(indefinite(1.5))
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinite"):
            Hessian(gram().fill_diagonal_(value))


def streams(columns=16, samples=400, seed=0):
    """Inputs of a layer behind slimmed layers, and those of the unslimmed model, in float64."""
    torch.manual_seed(seed)
    reference = torch.randn(samples, 4) @ torch.randn(4, columns) + 0.5 * torch.randn(samples, columns)
    seen = 0.8 * reference + 0.3 * torch.randn(samples, columns) @ torch.randn(columns, columns) / 4
    return seen.double(), reference.double()


def moments(seen, reference):
    return (seen.T @ seen / len(seen)).float(), (reference.T @ seen / len(seen)).float()


def test_equal_streams_move_nothing():
    seen, _ = streams()
    for strength in (0.0, 0.25, 1.0):
        assert torch.equal(asymmetric_map(*moments(seen, seen), strength), torch.eye(16))
    assert torch.equal(asymmetric_map(*moments(*streams()), 0.0), torch.eye(16))


def test_full_strength_is_the_least_squares_target():
    """||W R - W' X||² is least, with the dampening of `Hessian` as a pull towards W."""
    seen, reference = streams()
    weight = torch.randn(6, 16, dtype=torch.float64)
    found = weight @ asymmetric_map(*moments(seen, reference), 1.0).double()
    ridge = (0.01 * len(seen) * seen.square().mean()).sqrt() * torch.eye(16, dtype=torch.float64)
    left = torch.cat([seen, ridge])
    right = torch.cat([reference @ weight.T, ridge @ weight.T])
    best = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-5)


def test_strength_goes_part_of_the_way_and_lowers_the_error():
    seen, reference = streams()
    weight = torch.randn(6, 16, dtype=torch.float64)
    maps = {s: asymmetric_map(*moments(seen, reference), s).double() for s in (0.0, 0.25, 0.5, 1.0)}
    torch.testing.assert_close(maps[0.25], 0.75 * maps[0.0] + 0.25 * maps[1.0])
    errors = [float((reference @ weight.T - seen @ (weight @ m).T).square().sum()) for m in maps.values()]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]


def test_dead_inputs_are_not_moved():
    seen, reference = streams()
    seen[:, 5] = 0
    found = asymmetric_map(*moments(seen, reference), 1.0)
    assert torch.isfinite(found).all()
    assert torch.equal(found[:, 5], torch.eye(16)[:, 5])
