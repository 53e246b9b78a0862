"""The search of shapes: what is measured, that the model is left alone, and that a killed search goes on."""

import copy
import gc
import math
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import tiny_llama, token_ids

from optimum_slim import Minitron, perplexity, shape_search
from optimum_slim.importance import importance
from optimum_slim.methods.heal import Heal
from optimum_slim.shape_search import rank_shapes
from optimum_slim.shapes import Counter, Shape


TOKENS = token_ids(16, 16)


@pytest.fixture(scope="module")
def searched():
    """A model, three shapes of it (the first shares all its tensors), and what cuts a copy of it to one."""
    model = tiny_llama(num_hidden_layers=4)
    counter = Counter(model)
    sizes = [(counter.old, 3), (replace(counter.old, channels=48), 4), (replace(counter.old, neurons=64, heads=2), 4)]
    shapes = [Shape(widths, layers, counter.count(widths, layers)) for widths, layers in sizes]
    return model, shapes, partial(Minitron(ratio=0.75)._cut, scores=importance(model, TOKENS))


def snapshot(model):
    return {name: (tensor, tensor.clone()) for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], value) for name, (_, value) in before.items())
    assert all(now[name].data_ptr() == tensor.data_ptr() for name, (tensor, _) in before.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_shapes_are_ranked_by_the_perplexity_of_models_cut_apart(searched):
    model, shapes, cut = searched
    before, config = snapshot(model), model.config.to_dict()
    found = rank_shapes(model, TOKENS, shapes, cut)
    assert [row["rank"] for row in found.values()] == [1, 2, 3] and set(found) == set(shapes)
    values = [row["perplexity"] for row in found.values()]
    assert values == sorted(values)
    for shape, row in found.items():
        apart = copy.deepcopy(model)
        cut(apart, shape)
        assert row["perplexity"] == perplexity(apart, TOKENS[:2].flatten(), 16)
        assert row["parameters"] == apart.num_parameters() and row["perplexity_healed"] is None
    assert_unchanged(model, before)
    assert model.config.to_dict() == config


@pytest.mark.slow
def test_trained_shapes_are_ranked_by_what_training_made_of_them(searched):
    model, shapes, cut = searched
    before = snapshot(model)
    found = rank_shapes(model, TOKENS, shapes, cut, steps=3)
    values = [row["perplexity_healed"] for row in found.values()]
    assert values == sorted(values)
    shape, row = next(iter(found.items()))
    apart = copy.deepcopy(model)
    cut(apart, shape)
    assert row["perplexity"] == perplexity(apart, TOKENS[:2].flatten(), 16)
    Heal(method="full", steps=3).apply(apart, TOKENS[2:], teacher=model)
    assert row["perplexity_healed"] == pytest.approx(perplexity(apart, TOKENS[:2].flatten(), 16), rel=1e-5)
    assert_unchanged(model, before)


@pytest.mark.parametrize("steps", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_candidate_is_in_memory_at_a_time(searched, steps):
    model, shapes, cut = searched
    own, seen = {parameter.data_ptr() for parameter in model.parameters()}, []

    def watched(copied, shape):
        assert not any(alive() is not None for alive in seen)
        cut(copied, shape)
        seen.extend(weakref.ref(p) for p in copied.parameters() if p.data_ptr() not in own)

    gc.disable()
    try:
        rank_shapes(model, TOKENS, shapes, watched, steps=steps)
    finally:
        gc.enable()
    assert len(seen) > 3


def test_what_is_not_a_number_comes_last(searched):
    model, shapes, cut = searched

    def broken(copied, shape):
        cut(copied, shape)
        if shape == shapes[0]:
            copied.lm_head.weight = torch.nn.Parameter(torch.full_like(copied.lm_head.weight, math.nan))

    ranked = list(rank_shapes(model, TOKENS, shapes, broken))
    assert ranked[-1] == shapes[0]


def test_a_killed_search_measures_only_what_is_left(searched, tmp_path):
    model, shapes, cut = searched
    expected, done = rank_shapes(model, TOKENS, shapes, cut), []

    def once(copied, shape, most):
        if len(done) == most:
            raise KeyboardInterrupt
        done.append(shape)
        cut(copied, shape)

    search = partial(rank_shapes, model, TOKENS, shapes, journal=tmp_path, settings={"ratio": 0.75})
    with pytest.raises(KeyboardInterrupt):
        search(cut=partial(once, most=2))
    assert list(search(cut=partial(once, most=3)).items()) == list(expected.items()) and done == shapes
    assert list(search(cut=partial(once, most=3)).items()) == list(expected.items()) and done == shapes
    for changes in ({"settings": {"ratio": 0.5}}, {"steps": 2}):
        with pytest.raises(ValueError, match="belongs to another run"):
            search(cut=cut, **changes)
    with pytest.raises(ValueError, match="other tokens"):
        rank_shapes(model, TOKENS + 1, shapes, cut, journal=tmp_path, settings={"ratio": 0.75})
    with pytest.raises(ValueError, match="other shapes"):
        rank_shapes(model, TOKENS, shapes[::-1], cut, journal=tmp_path, settings={"ratio": 0.75})


@pytest.mark.slow
def test_a_search_killed_inside_a_training_goes_on_inside_it(searched, tmp_path, monkeypatch):
    model, shapes, cut = searched
    passes = []

    def fails(module, arguments):
        passes.extend([1] * (module is model))  # the teacher; copies of it have the hook as well
        if len(passes) == 54:
            raise KeyboardInterrupt

    monkeypatch.setattr(shape_search, "Heal", partial(Heal, batch_size=2, evaluate_every=50))
    search = partial(rank_shapes, model, TOKENS, shapes[:1], cut, steps=56)
    whole = search()
    handle = model.register_forward_pre_hook(fails)
    try:
        with pytest.raises(KeyboardInterrupt):
            search(journal=tmp_path)
        assert (tmp_path / "shape-00" / "fit.pt").is_file()
        passes.clear()
        again = search(journal=tmp_path)
    finally:
        handle.remove()
    assert again == whole and 0 < len(passes) < 20
    assert [folder.name for folder in tmp_path.iterdir()] == ["shapes"]


def test_one_sample_cannot_be_trained_on_and_compared_on(searched):
    with pytest.raises(ValueError, match="pass at least 3"):
        rank_shapes(searched[0], TOKENS[:1], searched[1], searched[2], steps=1)
