"""Minitron: what is least important goes, exactly where it is dead, and the result is an ordinary checkpoint."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from helpers import tiny_llama, token_ids
from test_width import SOME, tiny
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from optimum_slim import PT2LLM, Heal, Magnitude, Minitron, SlimConfig, save, shape_search, slim
from optimum_slim.axes import Sizes
from optimum_slim.evaluate import perplexity
from optimum_slim.importance import importance
from optimum_slim.layer_loss import LAYER_METRICS, loss_increase
from optimum_slim.methods.minitron import FIELDS
from optimum_slim.ranking import kept_widths, merge_heads


TOKENS = token_ids(8, 16)
SIZES = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_the_model_gets_the_sizes_asked_for_and_the_report_says_so():
    model = tiny_llama()
    report = slim(model, Minitron(**SIZES), data=TOKENS)
    assert {name: getattr(model.config, name) for name in SIZES} == SIZES
    assert model.config.num_key_value_heads == 2 and model.config.head_dim == 16
    h, i, v = 48, 64, 128
    attention, mlp = h * 16 * (2 + 2 + 2) + 16 * 2 * h, 3 * h * i
    assert model.num_parameters() == 2 * v * h + h + 2 * h + attention + mlp
    notes = " ".join(report.notes)
    assert "hidden_size 64 to 48" in notes and "dropped layers" in notes and "energy" in notes
    assert model.config.slim[0]["step"] == "minitron"


def test_dead_neurons_and_heads_go_first_and_nothing_changes():
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[10:42] = 0
        for head in (0, 3):  # one of each group: nothing of it is ever seen if its values are 0
            layer.self_attn.o_proj.weight.data.view(64, 4, 16)[:, head] = 0
    expected = logits(model)
    slim(model, Minitron(intermediate_size=64), data=TOKENS)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert model.config.intermediate_size == 64


def test_every_group_keeps_as_many_heads():
    old, layers = Sizes(64, 96, 8, 2, 8), 2

    class Scores:
        heads = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1], [1, 8, 2, 7, 3, 6, 4, 5]])

    kept = kept_widths(old, Sizes(64, 96, 4, 2, 8), layers, Scores())
    assert [k.tolist() for k in kept["heads"]] == [[0, 1, 4, 5], [1, 3, 5, 7]] and "groups" not in kept
    kept = kept_widths(old, Sizes(64, 96, 2, 1, 8), layers, Scores())
    assert [k.tolist() for k in kept["groups"]] == [[0], [0]]
    assert [k.tolist() for k in kept["heads"]] == [[0, 1], [1, 3]]


def test_the_corrected_norms_come_closer():
    errors = []
    for correction in (False, True):
        model = tiny_llama(initializer_range=0.2)
        expected = logits(model)
        model.model.embed_tokens.weight.data[:, 48:] *= 0.01  # channels that carry little
        slim(model, Minitron(hidden_size=48, norm_correction=correction), data=TOKENS)
        errors.append(float((logits(model) - expected).norm()))
    assert errors[1] < errors[0]


def test_norms_are_corrected_by_default_where_they_can_be():
    for kind, possible in (("llama", True), ("cohere", False)):
        models = []
        for settings in ({}, {"norm_correction": possible}):
            model = tiny(kind)
            slim(model, Minitron(hidden_size=48, **settings), data=TOKENS)
            models.append(logits(model))
        assert torch.equal(*models)
    with pytest.raises(ValueError, match="norm_correction=False"):
        slim(tiny("cohere"), Minitron(hidden_size=48, norm_correction=True), data=TOKENS)


@pytest.mark.parametrize("sizes", [{"intermediate_size": 40}, {"num_attention_heads": 2, "num_hidden_layers": 2}])
def test_compensation_comes_closer_on_other_data(sizes):
    errors, other = [], token_ids(8, 16, seed=1)
    for compensate in (False, True):
        model = tiny_llama(num_hidden_layers=3, initializer_range=0.2)
        with torch.no_grad():
            expected = model(other).logits
            report = slim(model, Minitron(**sizes, compensate=compensate), data=token_ids(64, 16))
            assert any("projections" in note for note in report.notes) == compensate
            errors.append((model(other).logits - expected).norm())
    assert errors[1] < errors[0]


def test_a_chain_goes_on_from_what_was_healed_with_the_first_model_as_teacher():
    model = tiny_llama(num_hidden_layers=3, initializer_range=0.1)
    heal = Heal(method="full", steps=20, batch_size=8, learning_rate=5e-4, evaluate_every=5, held_out=0.2)
    text = (torch.arange(12)[None] * 3 + torch.arange(32)[:, None]) % 100  # which a random model can learn
    chain = [Minitron(hidden_size=48), heal, Minitron(intermediate_size=48, num_hidden_layers=2), heal]
    report = slim(model, chain, data=text)
    assert model.config.intermediate_size == 48 and len(model.model.layers) == 2
    assert [step["step"] for step in model.config.slim] == ["minitron", "heal"] * 2
    for number in (1, 3):
        history = [row["held_out"] for row in report.steps[number].tables["healing"]]
        assert min(history) < history[0]


@pytest.mark.parametrize("groups", [2, 8], ids=["grouped", "multi-head"])
def test_merged_heads_are_the_formula(groups):
    model = tiny_llama(num_attention_heads=8, num_key_value_heads=groups)
    attention = model.model.layers[0].self_attn
    scores = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    before = {key: getattr(attention, key).weight.clone().view(-1, 8, 64) for key in ("q_proj", "k_proj", "v_proj")}
    whole = 8 // groups if groups < 8 else 8
    stay = whole * 3 // 4
    merge_heads(model, Sizes(64, 96, 8 // whole * stay, groups if groups < 8 else stay, 8), scores)
    for key, old in before.items():
        new = getattr(attention, key).weight.view(-1, 8, 64)
        if key != "q_proj" and groups < 8:
            assert torch.equal(new, old)
            continue
        expected = old.clone()
        for first in range(0, 8, whole):
            ranks = (first + scores[0, first : first + whole].argsort(descending=True)).tolist()
            for i in range(2 * stay - whole + 1, stay + 1):  # from 1, as in the paper
                expected[ranks[i - 1]] = 2 * old[ranks[i - 1]] - old[ranks[2 * stay - i + 1 - 1]]
        torch.testing.assert_close(new, expected)


def test_heads_that_cannot_go_are_not_merged_either():
    model = tiny("gpt2", **SOME["gpt2"][0])
    expected = logits(model)
    with pytest.raises(ValueError, match="cannot be made narrower by its heads"):
        slim(model, Minitron(num_attention_heads=2, merge_heads=True), data=TOKENS)
    assert torch.equal(logits(model), expected)


def test_equal_heads_merge_into_themselves():
    model = tiny_llama(num_key_value_heads=1)
    for layer in model.model.layers:
        heads = layer.self_attn.q_proj.weight.data.view(4, 16, 64)
        heads[:] = heads[:1].clone()
    plain, merged = (tiny_llama(num_key_value_heads=1) for _ in range(2))
    for copied, merge in ((plain, False), (merged, True)):
        copied.load_state_dict(model.state_dict())
        slim(copied, Minitron(num_attention_heads=2, merge_heads=merge, compensate=False), data=TOKENS)
    torch.testing.assert_close(logits(plain), logits(merged))


@pytest.mark.parametrize("metric", LAYER_METRICS)
def test_the_layers_that_do_nothing_go(metric):
    model = tiny_llama(num_hidden_layers=5)
    for layer in model.model.layers[2:4]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    data = model.generate(TOKENS[:, :1], max_new_tokens=15, do_sample=False, pad_token_id=0)
    expected = logits(model)
    report = slim(model, Minitron(num_hidden_layers=3, layer_metric=metric), data=data)
    assert torch.equal(logits(model), expected)
    assert f"dropped layers 2, 3 of 5 by {LAYER_METRICS[metric]}" in report.notes
    losses = [row.get("loss_increase") for row in report.steps[0].layers]
    assert losses[2:4] == ([0, 0] if metric == "loss" else [None, None])
    assert model.config.slim[0]["layer_metric"] == metric


def test_a_block_goes_where_single_layers_would_be_others():
    data, layers = token_ids(16, 32), 7
    kept = {}
    for metric in LAYER_METRICS:
        model = tiny_llama(num_hidden_layers=layers, initializer_range=0.3)
        whole = list(model.model.layers)
        slim(model, Minitron(num_hidden_layers=4, layer_metric=metric), data=data)
        kept[metric] = [whole.index(layer) for layer in model.model.layers]
    dropped = [i for i in range(layers) if i not in kept["contiguous"]]
    assert dropped == list(range(dropped[0], dropped[0] + 3)) and dropped[0] > 0 and dropped[-1] < layers - 1
    assert len({tuple(layers) for layers in kept.values()}) > 1


def test_saved_losses_take_the_place_of_measuring(tmp_path):
    plain, path = tmp_path / "plain.safetensors", tmp_path / "losses.safetensors"
    model = tiny_llama(num_hidden_layers=4)
    scores = importance(model, TOKENS)
    scores.save(plain)
    dataclasses.replace(scores, loss_increase=loss_increase(model, TOKENS, [2])).save(path)
    step = Minitron(num_hidden_layers=2, layer_metric="contiguous", compensate=False)
    measured = tiny_llama(num_hidden_layers=4)
    slim(measured, step, data=TOKENS)
    expected = logits(model)
    with pytest.raises(ValueError, match="no losses without blocks"):
        slim(model, dataclasses.replace(step, scores=plain))
    assert torch.equal(logits(model), expected)
    slim(model, dataclasses.replace(step, scores=path))
    assert torch.equal(logits(model), logits(measured))


def test_multi_head_attention_takes_keys_and_values_along():
    model = tiny_llama(num_key_value_heads=4)
    slim(model, Minitron(num_attention_heads=2), data=TOKENS)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 2)
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (32, 64)


@pytest.mark.slow
def test_a_fresh_process_without_this_package_loads_the_result(tmp_path):
    model = tiny_llama()
    slim(model, [Minitron(**SIZES), Heal(method="full", steps=2, batch_size=2)], data=TOKENS)
    model.save_pretrained(tmp_path)
    torch.save(logits(model), tmp_path / "logits.pt")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
torch.manual_seed(0)
tokens = torch.randint(0, 128, (8, 16), generator=torch.Generator().manual_seed(0))
assert torch.equal(model(tokens).logits, torch.load({str(tmp_path / "logits.pt")!r}))
assert "optimum_slim" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_packed_afterwards_it_reloads(tmp_path):
    model = tiny_llama()
    slim(model, [Minitron(hidden_size=48, intermediate_size=64), PT2LLM(group_size=16)], data=TOKENS)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_in_from_pretrained(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    config = SlimConfig(Minitron(**SIZES), calibration=TOKENS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert model.config.hidden_size == 48 and getattr(model.config, "quantization_config", None) is None


def test_the_sketch_of_a_model_without_weights_has_the_size_to_come():
    with torch.device("meta"):
        sketched = LlamaForCausalLM(tiny_llama().config)
    Minitron(**SIZES).sketch(sketched)
    model = tiny_llama()
    slim(model, Minitron(**SIZES), data=TOKENS)
    assert sketched.num_parameters() == model.num_parameters()
    assert {n: p.shape for n, p in sketched.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "one thing to go by"),
        ({"hidden_size": 48, "ratio": 0.5}, "found hidden_size, ratio"),
        ({"ratio": 1.5}, "ratio"),
        ({"ratio": 0.5, "tolerance": 0}, "tolerance"),
        ({"ratio": 0.5, "search_steps": -1}, "search_steps"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 48, "aggregate": ("max", "mean")}, "aggregate"),
        ({"hidden_size": 48, "batch_size": 0}, "batch_size"),
        ({"hidden_size": 48, "layer_metric": "perplexity"}, "layer_metric must be one of block_influence, loss"),
    ],
    ids=str,
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Minitron(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 65}, "hidden_size=65 is more than the 64"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=3"),
        ({"num_attention_heads": 3}, "shared evenly"),
        ({"num_key_value_heads": 1}, "at most 2 each"),
        ({"hidden_size": 64}, "change nothing"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused_and_nothing_changes(fields, message):
    model = tiny_llama()
    expected = logits(model)
    with pytest.raises(ValueError, match=message):
        slim(model, Minitron(**fields), data=TOKENS)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("field", [{"params": 60_000}, {"params": "0.06M"}, {"ratio": 0.7}], ids=str)
def test_the_shape_of_least_perplexity_is_taken(field):
    model = tiny_llama()
    whole = model.num_parameters()
    report = slim(model, Minitron(**field), data=TOKENS)
    table = report.steps[0].tables["shapes"]
    best = table[0]
    assert [row["rank"] for row in table] == list(range(1, len(table) + 1)) and len(table) > 1
    assert [row["perplexity"] for row in table] == sorted(row["perplexity"] for row in table)
    assert all(row["perplexity_healed"] is None for row in table)
    assert all(getattr(model.config, name) == best[name] for name in FIELDS if name in best)
    assert model.num_parameters() == best["parameters"] < whole
    step = model.config.slim[0]
    assert step["params"] is None and step["hidden_size"] == best["hidden_size"]


def test_the_saved_folder_shows_the_shapes(tmp_path):
    pytest.importorskip("matplotlib")
    model = tiny_llama()
    slim(model, Minitron(ratio=0.7), data=TOKENS)
    out = save(model, tmp_path / "cut")
    assert (out / "shapes.png").read_bytes().startswith(b"\x89PNG")
    assert "![shapes](shapes.png)" in (out / "README.md").read_text()


def test_a_killed_search_goes_on_with_the_same_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIMUM_SLIM_CACHE", str(tmp_path))
    whole, model, measured = tiny_llama(), tiny_llama(), []
    step = Minitron(ratio=0.7)
    expected = slim(whole, step, data=TOKENS).steps[0].tables["shapes"]
    assert not list((tmp_path / "runs").iterdir())

    def measure(*arguments):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(perplexity(*arguments))
        return measured[-1]

    monkeypatch.setattr(shape_search, "perplexity", measure)
    with pytest.raises(KeyboardInterrupt):
        slim(model, step, data=TOKENS)
    monkeypatch.setattr(shape_search, "perplexity", lambda *arguments: measured.append(0) or perplexity(*arguments))
    assert slim(model, step, data=TOKENS).steps[0].tables["shapes"] == expected
    assert len(measured) == len(expected) > 4 and torch.equal(logits(model), logits(whole))


@pytest.mark.slow
def test_shapes_are_trained_before_they_are_compared_and_the_model_is_not():
    model = tiny_llama()
    report = slim(model, Minitron(ratio=0.8, search_steps=5), data=TOKENS)
    table = report.steps[0].tables["shapes"]
    healed = [row["perplexity_healed"] for row in table]
    assert healed == sorted(healed) and healed != [row["perplexity"] for row in table]
    assert f"{healed[0]:.4g} after 5 steps" in " ".join(report.notes)
    assert all(parameter.requires_grad for parameter in model.parameters())
    untrained = tiny_llama()
    found = {name: getattr(model.config, name) for name in FIELDS if hasattr(model.config, name)}
    slim(untrained, Minitron(**found), data=TOKENS)
    assert torch.equal(logits(untrained), logits(model))


def test_saved_scores_take_the_place_of_measuring(tmp_path):
    model, measured = tiny_llama(), tiny_llama()
    path = tmp_path / "scores.safetensors"
    importance(model, TOKENS).save(path)
    step = Minitron(**SIZES, scores=path, compensate=False)
    assert not step.needs_data and Minitron(ratio=0.5, scores=path, compensate=False).needs_data
    slim(model, step)
    slim(measured, Minitron(**SIZES, compensate=False), data=TOKENS)
    assert torch.equal(logits(model), logits(measured)) and model.config.slim[0]["scores"] is None
    with pytest.raises(ValueError, match="scores of another model"):
        slim(tiny_llama(intermediate_size=80), step)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("llama", {"intermediate_size": 48, "num_hidden_layers": 1}, "packed, quantized or adapted"),
        ("cohere", {"hidden_size": 48, "num_hidden_layers": 1, "norm_correction": True}, "norm_correction=False"),
    ],
)
def test_an_error_leaves_all_layers(kind, fields, message):
    model = tiny(kind)
    if kind == "llama":
        peft = pytest.importorskip("peft")
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    expected = logits(model)
    with pytest.raises(ValueError, match=message):
        Minitron(**fields).apply(model, TOKENS)
    assert torch.equal(logits(model), expected)


def test_sparse_projections_keep_their_zeros():
    model = tiny_llama(initializer_range=0.2)
    slim(model, Magnitude(sparsity="2:4", packed=False))
    slim(model, Minitron(intermediate_size=48), data=TOKENS)
    zeros = model.model.layers[0].mlp.down_proj.weight == 0
    assert 0.3 < zeros.float().mean() < 0.7
