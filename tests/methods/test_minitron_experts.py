"""Minitron on mixtures of experts: experts and neurons in each that do nothing go first, and nothing changes."""

import pytest
import torch
from helpers import tiny_llama, token_ids
from moe_models import experts_of, sparse
from transformers import AutoModelForCausalLM

from optimum_slim import Heal, Minitron, slim
from optimum_slim.axes import Sizes
from optimum_slim.importance import importance
from optimum_slim.shapes import Counter, candidates


TOKENS = token_ids(8, 16)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def without_visitors(model, layer: int, expert: int) -> None:
    """Let no token go to an expert: by the bias of its router, or by a channel that is the same for all."""
    router = experts_of(model, layer)[1]
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias[expert] = -10
    elif getattr(router, "bias", None) is not None:
        router.bias.data[expert] = -1e4
    else:
        router.weight.data[:, 0] = 0
        router.weight.data[expert] = 0
        router.weight.data[expert, 0] = -1000


def with_a_constant_channel(model):
    """Channel 0 of the residual stream is 0.5 for every token everywhere."""
    model.model.embed_tokens.weight.data[:, 0] = 0.5
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[0] = 0
        for name, parameter in layer.mlp.named_parameters():
            if "down_proj" in name:
                parameter.data[..., 0, :] = 0
        layer.post_attention_layernorm.weight.data[0] = 1
    return model


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_experts_that_no_token_reaches_go_first(kind):
    model = with_a_constant_channel(sparse(kind))
    experts = Sizes.of(model.config).experts
    dead = {layer: layer + 1 for layer in range(2) if hasattr(model.model.layers[layer].mlp, "experts")}
    for layer, expert in dead.items():
        without_visitors(model, layer, expert)
    expected, before = logits(model), {layer: experts_of(model, layer)[0].down_proj for layer in dead}
    report = slim(model, Minitron(num_experts=experts - 1), data=TOKENS)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    for layer, expert in dead.items():
        stay = [i for i in range(experts) if i != expert]
        assert torch.equal(experts_of(model, layer)[0].down_proj, before[layer][stay])
    assert f"num_experts {experts} to {experts - 1}" in " ".join(report.notes)
    assert model.config.slim[0]["num_experts"] == experts - 1


def test_each_group_of_a_group_limited_router_loses_its_own():
    model = sparse("deepseek_v3")
    for expert in (1, 6):
        without_visitors(model, 1, expert)
    expected = logits(model)
    slim(model, Minitron(num_experts=6), data=TOKENS)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    router = experts_of(model)[1]
    assert router.weight.shape == (6, 64) and router.e_score_correction_bias.shape == (6,)
    assert router.e_score_correction_bias.min() > -5 and model.config.n_routed_experts == 6


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("mixtral", "intermediate_size"),
        ("qwen2_moe", "moe_intermediate_size"),
        ("qwen3_moe", "moe_intermediate_size"),
        ("deepseek_v3", "moe_intermediate_size"),
    ],
)
def test_dead_neurons_of_each_expert_go_first(kind, field):
    model = sparse(kind)
    width = getattr(model.config, field)
    draw = torch.Generator().manual_seed(0)
    for layer in (layer for layer in model.model.layers if hasattr(layer.mlp, "experts")):
        for gate_up in layer.mlp.experts.gate_up_proj.data:
            gate_up[width + torch.randperm(width, generator=draw)[:8]] = 0
        if kind == "deepseek_v3":  # two shared experts in one
            dead = torch.randperm(2 * width, generator=draw)[:16]
            layer.mlp.shared_experts.up_proj.weight.data[dead] = 0
    expected = logits(model)
    slim(model, Minitron(**{field: width - 8}), data=TOKENS)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert getattr(model.config, field) == width - 8


@pytest.mark.slow
def test_experts_neurons_channels_heads_and_layers_at_once_train_and_reload(tmp_path):
    model = sparse("qwen3_moe", num_hidden_layers=3)
    sizes = {"hidden_size": 48, "num_attention_heads": 2, "num_experts": 4, "moe_intermediate_size": 24}
    step = Minitron(**sizes, num_hidden_layers=2, intermediate_size=80)
    report = slim(model, [step, Heal(method="full", steps=2, batch_size=2)], data=TOKENS)
    assert {name: getattr(model.config, name) for name in sizes} == sizes and report.steps[0].notes
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_the_count_of_a_shape_is_the_models(kind):
    model = sparse(kind)
    counter = Counter(model)
    assert counter.count(counter.old, 2) == model.num_parameters()
    fields = {"num_experts": 4} if kind != "mixtral" else {"num_experts": 3, "intermediate_size": 40}
    fields |= {} if kind == "mixtral" else {"moe_intermediate_size": 24}
    shape = Minitron(**fields).shapes(model)[0]
    slim(model, Minitron(**fields), data=TOKENS)
    assert model.num_parameters() == shape.parameters


def test_a_search_fits_the_neurons_of_the_experts_and_leaves_their_number():
    model = sparse("qwen3_moe", num_hidden_layers=4)
    counter = Counter(model)
    target = round(0.75 * model.num_parameters())
    found = candidates(model, target)
    assert all(abs(counter.count(shape.sizes, shape.layers) - target) <= 0.05 * target for shape in found)
    assert {shape.sizes.experts for shape in found} == {6} and {shape.sizes.neurons for shape in found} == {96}
    assert min(shape.sizes.expert_neurons for shape in found) < 32


def test_a_search_leaves_widths_that_go_together():
    """OLMoE normalizes all keys at once: that norm follows channels and heads."""
    model = sparse("olmoe")
    report = slim(model, Minitron(ratio=0.7), data=TOKENS)
    assert (model.config.hidden_size, model.config.num_attention_heads) == (64, 4)
    assert model.config.intermediate_size < 96 and report.notes


def test_saved_scores_of_experts_take_the_place_of_measuring(tmp_path):
    model, measured = sparse("qwen3_moe"), sparse("qwen3_moe")
    path = tmp_path / "scores.safetensors"
    sizes = {"num_experts": 4, "moe_intermediate_size": 24, "compensate": False}
    importance(model, TOKENS).save(path)
    slim(model, Minitron(**sizes, scores=path))
    slim(measured, Minitron(**sizes), data=TOKENS)
    assert torch.equal(logits(model), logits(measured))
    with pytest.raises(ValueError, match="scores of another model: experts"):
        slim(sparse("qwen3_moe", num_experts=8), Minitron(**sizes, scores=path))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (
            "mixtral",
            {"moe_intermediate_size": 8},
            "no moe_intermediate_size; the width of its experts",
        ),
        ("mixtral", {"num_experts": 5}, "num_experts=5 is more than the 4"),
        ("mixtral", {"num_experts": 1}, "a token goes to 2 of them"),
        ("deepseek_v3", {"num_experts": 5}, "a multiple of 2, at least 4"),
        ("qwen2_moe", {"intermediate_size": 8}, "experts have expert_neurons"),
        ("llama", {"num_experts": 2}, "no num_experts"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused_and_nothing_changes(kind, fields, message):
    model = tiny_llama() if kind == "llama" else sparse(kind)
    expected = logits(model)
    with pytest.raises(ValueError, match=message):
        slim(model, Minitron(**fields), data=TOKENS)
    assert torch.equal(logits(model), expected)
