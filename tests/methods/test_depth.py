"""Depth pruning: which layers go, that nothing else changes, and that what is left is an ordinary model."""

import subprocess
import sys

import pytest
import torch
from helpers import tiny_llama, token_ids
from transformers import AutoModelForCausalLM

from optimum_slim import BitNet, Calibration, Depth, SlimConfig, perplexity, save, slim
from optimum_slim.distance import angular_distances, block_influence, last_token_states
from optimum_slim.methods.depth import greedy_order, runs


LAYERS = 6


def silence(model, *layers):
    """Make decoder layers do nothing, exactly."""
    for layer in layers:
        model.model.layers[layer].self_attn.o_proj.weight.data.zero_()
        model.model.layers[layer].mlp.down_proj.weight.data.zero_()
    return model


def dropped(model):
    return tuple(model.config.slim[0]["layers"])


def logits(model, ids=None):
    with torch.no_grad():
        return model(token_ids() if ids is None else ids).logits


def generated(model):
    return model.generate(token_ids(1), max_new_tokens=12, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("first", range(LAYERS - 2))
@pytest.mark.parametrize("metric", ["angular", "block_influence", "perplexity"])
def test_planted_identity_layers_are_found_and_leave_logits_and_generation_bit_identical(metric, first):
    model = silence(tiny_llama(num_hidden_layers=LAYERS), first, first + 1)
    before, text = logits(model), generated(model)
    data = token_ids(8, 16)
    if metric == "perplexity":  # on what the model itself says, no other removal is better than none
        data = model.generate(token_ids(8, 1), max_new_tokens=15, do_sample=False, pad_token_id=0)
    report = slim(model, Depth(drop=2, metric=metric), data=data)
    assert dropped(model) == (first, first + 1)
    assert len(model.model.layers) == model.config.num_hidden_layers == LAYERS - 2
    assert torch.equal(logits(model), before) and torch.equal(generated(model), text)
    if metric == "angular":
        table = report.steps[0].tables["angular_distance"]
        assert table[first][first + 2] == 0 and len(table) == LAYERS + 1


@pytest.mark.parametrize("count", range(1, LAYERS))
@pytest.mark.parametrize("metric", ["angular", "deepest"])
def test_the_last_layer_is_kept(metric, count):
    model = tiny_llama(num_hidden_layers=LAYERS)
    last = model.model.layers[-1]
    slim(model, Depth(drop=count, metric=metric), data=token_ids(4))
    assert model.model.layers[-1] is last and len(model.model.layers) == LAYERS - count
    if metric == "deepest":
        assert dropped(model) == tuple(range(LAYERS - 1 - count, LAYERS - 1))


def test_angular_takes_the_block_of_least_distance():
    model, ids = tiny_llama(num_hidden_layers=LAYERS), token_ids(6, 12)
    table = angular_distances(last_token_states(model, ids))
    best = min(range(LAYERS - 3), key=lambda start: table[start, start + 3].item())
    slim(model, Depth(drop=3), data=ids)
    assert dropped(model) == (best, best + 1, best + 2)


def test_block_influence_takes_the_layers_of_least_influence():
    model, ids = tiny_llama(num_hidden_layers=LAYERS), token_ids(6, 12)
    expected = sorted(block_influence(model, ids).argsort()[:2].tolist())
    slim(model, Depth(drop=2, metric="block_influence"), data=ids)
    assert dropped(model) == tuple(expected)


def test_greedy_perplexity_is_that_of_the_model_really_cut():
    ids = token_ids(3, 16)
    order, values = greedy_order(tiny_llama(num_hidden_layers=4), ids, 2, range(4))
    singles = []
    for layer in range(4):
        model = tiny_llama(num_hidden_layers=4)
        slim(model, Depth(layers=(layer,)))
        singles.append(perplexity(model, ids.flatten(), window=16))
    assert order[0] == min(range(4), key=singles.__getitem__)
    assert values[0] == pytest.approx(min(singles), rel=1e-5)
    model = tiny_llama(num_hidden_layers=4)
    slim(model, Depth(drop=2, metric="perplexity"), data=ids)
    assert dropped(model) == tuple(sorted(order))
    assert values[1] == pytest.approx(perplexity(model, ids.flatten(), window=16), rel=1e-5)


def test_a_fraction_is_a_number_of_layers():
    model = tiny_llama(num_hidden_layers=LAYERS)
    slim(model, Depth(drop=0.5, metric="deepest"))
    assert dropped(model) == (2, 3, 4)


def test_runs_of_neighbours():
    assert runs((3, 4, 7)) == [(3, 5), (7, 8)] and runs((0,)) == [(0, 1)] and runs((1, 2, 3)) == [(1, 4)]


@pytest.mark.parametrize("layers", [(0,), (1, 3), (3, 4), (2, 5)])
def test_known_layers_are_never_read_from_disk(tmp_path, monkeypatch, layers):
    tiny_llama(num_hidden_layers=LAYERS).save_pretrained(tmp_path / "dense")
    expected = tiny_llama(num_hidden_layers=LAYERS)
    slim(expected, Depth(layers=layers))
    read = []
    from transformers import core_model_loading

    def watched(tensor, *args, **kwargs):
        read.append(tuple(tensor.get_shape()) if hasattr(tensor, "get_shape") else tuple(tensor.shape))
        return materialize(tensor, *args, **kwargs)

    materialize = core_model_loading._materialize_copy
    monkeypatch.setattr(core_model_loading, "_materialize_copy", watched)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=SlimConfig(Depth(layers=layers)), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert len(read) == len(list(model.parameters()))
    assert torch.equal(logits(model), logits(expected)) and torch.equal(generated(model), generated(expected))
    assert not hasattr(model.config, "quantization_config") and not hasattr(model, "hf_quantizer")
    assert dropped(model) == layers and "dropped" in str(model.slim_report)


def test_known_layers_and_packing_while_loading(tmp_path):
    tiny_llama(num_hidden_layers=LAYERS).save_pretrained(tmp_path / "dense")
    recipe = [Depth(layers=(1, 3)), BitNet(force=True)]
    expected = tiny_llama(num_hidden_layers=LAYERS)
    slim(expected, recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=SlimConfig(recipe))
    assert torch.equal(logits(model), logits(expected))
    rows = model.slim_report.steps[1].layers
    assert {row["name"].split(".")[2] for row in rows} == {"0", "1", "2", "3"}
    model.save_pretrained(tmp_path / "slim")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert torch.equal(logits(again), logits(expected))


def test_the_layers_stay_readable_when_a_later_step_learns_from_the_whole_model(tmp_path):
    from optimum_slim import PT2LLM

    tiny_llama(num_hidden_layers=LAYERS).save_pretrained(tmp_path / "dense")
    calibration = Calibration(samples=4, length=12)
    whole = calibration.tokens(tiny_llama(num_hidden_layers=LAYERS))
    recipe = [Depth(layers=(1, 2)), PT2LLM(group_size=32)]
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=SlimConfig(recipe, calibration=calibration)
    )
    expected = tiny_llama(num_hidden_layers=LAYERS)
    slim(expected, recipe, data=whole)
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.slow
def test_a_fresh_process_without_the_package_gives_the_same_logits(tmp_path):
    model = tiny_llama(num_hidden_layers=LAYERS)
    slim(model, Depth(drop=2), data=token_ids(4))
    save(model, tmp_path / "cut")
    torch.save(logits(model), tmp_path / "logits.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM;"
        f"model, info = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'cut')!r}, output_loading_info=True);"
        "assert not any(info.values()), info; assert 'optimum_slim' not in sys.modules;"
        "ids = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(0));"
        f"assert torch.equal(model(ids).logits, torch.load({str(tmp_path / 'logits.pt')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_parameter_count():
    model = tiny_llama(num_hidden_layers=LAYERS)
    one = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    before = model.num_parameters()
    report = slim(model, Depth(drop=2, metric="deepest"))
    assert model.num_parameters() == before - 2 * one
    assert [row["parameters"] for row in report.steps[0].layers] == [one, one]
    assert report.sizes["before"] - report.sizes["after"] == 2 * one * 4


def test_a_cut_model_has_no_name_until_it_is_saved(tmp_path):
    tiny_llama(num_hidden_layers=LAYERS).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=SlimConfig(Depth(layers=(1,)))
    )
    assert model.name_or_path == "" and model.slim_report.model == "dense"
    out = save(model, tmp_path / "cut")
    assert model.name_or_path == str(out)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "what to drop"),
        ({"drop": 0}, "number of layers or a fraction"),
        ({"drop": 1.5}, "number of layers or a fraction"),
        ({"drop": True}, "number of layers or a fraction"),
        ({"drop": 2, "metric": "cosine"}, "angular, deepest, block_influence, perplexity"),
        ({"layers": (1, 1)}, "different 0-based"),
        ({"layers": (-1,)}, "different 0-based"),
        ({"layers": ()}, "different 0-based"),
        ({"drop": 3, "layers": (1, 2)}, "pass one of the two"),
    ],
)
def test_wrong_fields(fields, says):
    with pytest.raises(ValueError, match=says):
        Depth(**fields)


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (Depth(drop=LAYERS, metric="deepest"), "at least one must stay"),
        (Depth(layers=(LAYERS,)), "layers 0 to 5"),
        (Depth(drop=0.01, metric="deepest"), "less than one layer"),
        (Depth(drop=LAYERS - 1, linear_patch=True), "drop fewer layers"),
        (Depth(layers=(0,), linear_patch=True), "layer 0 has none before it"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_and_nothing_changes(step, says):
    model = tiny_llama(num_hidden_layers=LAYERS)
    before = logits(model)
    with pytest.raises(ValueError, match=says):
        slim(model, step, data=token_ids())
    assert model.config.num_hidden_layers == LAYERS and torch.equal(logits(model), before)


def test_packing_comes_after_cutting():
    with pytest.raises(ValueError, match="put depth before bitnet"):
        SlimConfig([BitNet(force=True), Depth(drop=1)])


def test_the_saved_folder_shows_the_heat_map(tmp_path):
    pytest.importorskip("matplotlib")
    model = tiny_llama(num_hidden_layers=LAYERS)
    slim(model, Depth(drop=2), data=token_ids(4))
    out = save(model, tmp_path / "cut")
    assert (out / "angular_distance.png").read_bytes().startswith(b"\x89PNG")
    assert "![angular_distance](angular_distance.png)" in (out / "README.md").read_text()
