"""Shapes near a number of parameters: counted without building them, and never far off."""

from dataclasses import replace

import pytest
import torch
from helpers import tiny_llama
from test_width import WHOLE, tiny

from optimum_slim.shapes import MOST, Counter, candidates, number_of
from optimum_slim.width import narrow


@pytest.mark.parametrize("kind", WHOLE)
def test_parameters_are_those_of_the_narrow_model(kind):
    model = tiny(kind, **WHOLE[kind])
    counter = Counter(model)
    assert counter.count(counter.old, 2) == model.num_parameters()
    sizes = replace(counter.old, channels=48, neurons=40, heads=2, groups=2)
    wanted = counter.count(sizes, 2)
    narrow(model, channels=torch.arange(48), neurons=[torch.arange(40)] * 2, heads=[torch.tensor([0, 2])] * 2)
    assert model.num_parameters() == wanted


def test_fewer_layers_count_less_and_embeddings_are_apart():
    counter = Counter(tiny_llama())
    whole, half = (counter.count(counter.old, layers) for layers in (2, 1))
    assert whole - half == half - counter.embeddings and counter.embeddings == 2 * 128 * 64 + 64


def test_candidates_are_near_the_target_different_and_begin_with_the_most_even_cut():
    model = tiny_llama(num_hidden_layers=10)
    counter = Counter(model)
    target = round(counter.embeddings + 0.6 * (model.num_parameters() - counter.embeddings))
    found = candidates(model, target)
    assert 1 < len(found) <= MOST and len(set(found)) == len(found)
    for shape in found:
        assert abs(shape.parameters - target) <= 0.05 * target
        assert shape.parameters == counter.count(shape.sizes, shape.layers) and shape.layers >= 8
        assert shape.sizes.heads % shape.sizes.groups == 0
    assert found[0].sizes.channels < 64 and found[0].sizes.neurons < 96


def test_a_model_without_separate_heads_keeps_them():
    model = tiny("gpt2", n_inner=96)
    with pytest.raises(ValueError, match="no shape"):
        candidates(model, 1000)
    assert Counter(model).count(Counter(model).old, 2) == model.num_parameters()


def test_what_cannot_be_reached_is_said_with_the_nearest():
    with pytest.raises(ValueError, match="the nearest to be had"):
        candidates(tiny_llama(), 100)


def test_only_widths_that_the_config_takes_are_candidates():
    """Llama's config wants hidden_size to be a multiple of the number of heads."""
    model = tiny_llama(num_hidden_layers=4, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=8)
    found = candidates(model, round(0.75 * model.num_parameters()))
    assert {shape.sizes.channels % shape.sizes.heads for shape in found} == {0}
    assert any(shape.sizes.channels == 504 for shape in found)


@pytest.mark.parametrize(
    ("value", "count"), [(4e9, 4_000_000_000), ("4B", 4_000_000_000), (" 1.5m ", 1_500_000), ("70k", 70_000), (10, 10)]
)
def test_numbers_of_parameters(value, count):
    assert number_of(value) == count


@pytest.mark.parametrize("value", ["B", "four", 0, -1, float("nan"), None])
def test_what_is_no_number_of_parameters_is_refused(value):
    with pytest.raises(ValueError, match="params"):
        number_of(value)
