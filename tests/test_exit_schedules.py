"""LayerSkip's schedules against numbers worked out by hand."""

import pytest

from optimum_slim.exit_schedules import dropout_rates, dropout_share, exit_scales, exit_weights, exits_trained


def test_the_shares_begin_at_0_end_at_1_and_are_2_to_the_power_less_1():
    assert dropout_share(0.0) == 0.0
    assert dropout_share(0.5) == pytest.approx(2**0.5 - 1, abs=1e-15)
    assert dropout_share(1.0) == pytest.approx(1.0, abs=1e-15)


def test_rates_grow_with_the_layer_up_to_p_max():
    rates = dropout_rates(32, 1.0)
    assert rates[0] == 0.0 and rates[-1] == pytest.approx(1.0) and rates == sorted(rates)
    assert sum(rates) / 32 == pytest.approx(0.4445, abs=5e-5)
    assert rates[8] == pytest.approx(2 ** (8 / 31) - 1)


def test_rates_are_proportional_to_p_max_and_to_the_share_of_the_step():
    whole = dropout_rates(5, 1.0)
    assert dropout_rates(5, 0.2) == pytest.approx([0.2 * rate for rate in whole])
    assert dropout_rates(5, 0.2, 0.5) == pytest.approx([0.1 * rate for rate in whole])
    assert dropout_rates(5, 0.0) == [0.0] * 5
    assert dropout_rates(1, 0.3) == [0.0]


def test_scales_of_four_layers():
    assert exit_scales(4, 0.5) == [0.0, 0.5, 1.5, 3 + 0.5 * 3]
    assert exit_scales(4, 1.0) == [0.0, 1.0, 3.0, 6.0]
    assert exit_scales(4, 0.5, "linear") == pytest.approx([0.0, 0.5 / 3, 1 / 3, 1.0])
    assert exit_scales(4, 0.5, "uniform") == [0.5, 0.5, 0.5, 1.0]


@pytest.mark.parametrize("kind", ["sum", "linear", "uniform"])
def test_without_a_scale_the_last_layer_has_all_the_weight(kind):
    assert exit_weights(exit_scales(6, 0.0, kind), [True] * 6) == {5: 1.0}


def test_the_paper_s_weights_of_32_layers():
    weights = exit_weights(exit_scales(32, 0.2), [True] * 32)
    assert list(weights) == list(range(1, 32))  # e(0) = 0
    assert weights[31] == pytest.approx(0.111, abs=5e-4) and weights[30] == pytest.approx(0.083, abs=5e-4)
    assert sum(weights.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["sum", "linear", "uniform"])
@pytest.mark.parametrize("curriculum", ["rotational", "gradual", "none"])
def test_weights_sum_to_1_at_every_step(kind, curriculum):
    for layers in (1, 2, 5, 12):
        for step in range(10):
            weights = exit_weights(exit_scales(layers, 0.3, kind), exits_trained(curriculum, layers, step, 10, 4))
            assert sum(weights.values()) == pytest.approx(1.0) and min(weights.values()) > 0


@pytest.mark.parametrize(("layers", "rotation"), [(32, 8), (12, 5), (3, 1), (4, 6)])
def test_the_rotation_trains_each_exit_once_in_a_round(layers, rotation):
    for first in (0, 7):
        steps = [exits_trained("rotational", layers, first + step, 100, rotation) for step in range(rotation)]
        assert [sum(step[layer] for step in steps) for layer in range(layers)] == [1] * layers
        assert {sum(step) for step in steps} <= {layers // rotation, -(-layers // rotation)}
        shifted = [layer + 1 for layer, on in enumerate(steps[0]) if on and layer + 1 < layers]
        assert rotation == 1 or all(exits_trained("rotational", layers, first + 1, 100, rotation)[i] for i in shifted)


def test_exits_are_added_from_the_last_to_the_first_over_half_of_the_run():
    layers, steps = 4, 80  # one every 80 / 8 = 10 steps
    for step in range(steps):
        trained = exits_trained("gradual", layers, step, steps, 8)
        assert trained == [step >= 30, step >= 20, step >= 10, True]
    assert all(exits_trained("gradual", 12, 50, 100, 8)) and not all(exits_trained("gradual", 12, 45, 100, 8))


def test_all_exits_are_trained_without_a_curriculum():
    assert exits_trained("none", 3, 5, 10, 2) == [True] * 3


def test_the_last_layer_is_trained_where_no_exit_has_a_weight():
    assert exit_weights([0.0, 1.0, 3.0], [True, False, False]) == {2: 1.0}
    assert exit_weights([0.0, 1.0, 3.0], [True, True, False]) == {1: 1.0}
