"""What follows from the number of the step: learning rates, weight decay, lambda."""

import math

import pytest
from helpers import tiny_llama, token_ids

from optimum_slim.schedules import quantized_share, two_stages
from optimum_slim.train import fit


def test_lambda_schedules():
    for name in ("linear", "exponential", "sigmoid"):
        shares = [quantized_share(step, 100, name) for step in range(150)]
        assert shares == sorted(shares) and all(0 <= share <= 1 for share in shares)
        assert set(shares[100:]) == {1.0} and shares[0] < 1e-20
    assert quantized_share(25, 100) == 0.25
    assert quantized_share(25, 100, "exponential", 6) == pytest.approx(1 - 0.75**6)
    assert quantized_share(60, 100, "sigmoid", 20) == pytest.approx(1 / (1 + math.exp(-2)))
    assert quantized_share(0, 0) == 1


def test_the_second_stage_learns_at_two_thirds_and_nothing_decays():
    rates = [two_stages(step, 10, 100) for step in range(101)]
    assert rates[:10] == [step / 10 for step in range(10)] and rates[100] == 0
    assert rates[49] == pytest.approx(51 / 90) and rates[50] == pytest.approx(2 / 3 * 50 / 90)
    model, sizes = tiny_llama(), []
    unused = model.model.layers[0].mlp.up_proj.weight

    def loss(model, ids):
        model(ids)
        return 0 * model.model.layers[0].mlp.up_proj.weight.sum()

    model.requires_grad_(False)
    unused.requires_grad_(True)
    settings = {"steps": 8, "learning_rate": 0.1, "held_out": 0, "weight_decay": 0.5, "schedule": "two_stage"}
    fit(
        model, token_ids(24, 8), loss, **settings, before_step=lambda step: sizes.append(float(unused.detach().norm()))
    )
    assert sizes[1] > sizes[2] > sizes[3] > sizes[4]
    assert sizes[4] == sizes[5] == sizes[6] == sizes[7]
