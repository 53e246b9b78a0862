"""The step that packs ternary blocks with a scale each."""

import pytest
import torch
from helpers import tiny_llama, token_ids

from optimum_slim import TQ, slim
from optimum_slim._kernels import unpack_ternary


def blocks(rows=6, columns=600, size=256, seed=0):
    """Ternary weights with a scale for each group, and the codes and scales they are made of."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (rows, columns), generator=generator)
    scale = (torch.rand(rows, -(-columns // size), generator=generator) + 0.1).half()
    return codes * scale.float().repeat_interleave(size, 1)[:, :columns], codes, scale


@pytest.mark.parametrize("columns", [600, 512, 100])
def test_ternary_weights_are_kept_as_they_are(columns):
    weight, codes, scale = blocks(columns=columns)
    layer = TQ().empty(torch.nn.Linear(columns, 6))
    layer.load_packed(TQ().pack("layer", weight))
    assert torch.equal(unpack_ternary(layer.weight, 6), codes.to(torch.int8))
    assert torch.equal(layer.weight_scale, scale) and torch.equal(layer.dense(), weight)


def test_groups_of_zeros():
    state = TQ().pack("layer", torch.zeros(4, 256))
    assert not unpack_ternary(state["weight"], 4).any() and not state["weight_scale"].any()


def test_ordinary_weights_are_refused_naming_the_way_out():
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"layer: rounding to the largest magnitude of 256 columns loses .*PT2LLM"):
        TQ().pack("layer", weight)
    assert TQ(force=True).pack("layer", weight)["weight"].dtype == torch.uint8


@pytest.mark.parametrize("field", [{"group_size": 0}, {"group_size": 2.0}, {"activation_bits": 4}])
def test_fields_are_checked(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        TQ(**field)


def test_as_a_step():
    model = tiny_llama()
    report = slim(model, TQ(force=True))
    assert len(report.steps[0].layers) == 14 and torch.isfinite(model(token_ids()).logits).all()
