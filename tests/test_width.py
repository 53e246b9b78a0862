"""Narrower models: what a width is, that order does not matter, and what a config cannot express."""

import copy

import pytest
import torch
from helpers import tiny_llama, token_ids
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_slim import BitNet, slim
from optimum_slim.axes import Sizes, find_axes
from optimum_slim.width import narrow


BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
}
WHOLE = {
    "llama": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "phi3": {"pad_token_id": 0},
    "mixtral": {"num_local_experts": 4},
    "olmo2": {},
}
SOME = {
    "opt": ({"ffn_dim": 96, "word_embed_proj_dim": 64}, ["neurons"]),
    "gpt2": ({"n_inner": 96}, ["neurons"]),
    "gpt_neox": ({}, ["neurons"]),
    "gemma2": ({"head_dim": 16}, ["neurons", "heads"]),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}, ["channels", "heads"]),
    "qwen3_moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
        ["channels", "heads"],
    ),
}


def tiny(kind: str, **settings):
    base = BASE if kind not in ("opt", "gpt2") else {k: v for k, v in BASE.items() if k != "intermediate_size"}
    if kind in ("opt", "gpt2", "gpt_neox"):
        base = {k: v for k, v in base.items() if k != "num_key_value_heads"}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(base | settings))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


def shuffled(model) -> dict[str, dict]:
    """All that stays, in another order in each layer."""
    draw, sizes, layers = torch.Generator().manual_seed(1), Sizes.of(model.config), range(2)
    each = sizes.heads // sizes.groups
    groups = [torch.randperm(sizes.groups, generator=draw) for _ in layers]
    heads = [torch.cat([g * each + torch.randperm(each, generator=draw) for g in order]) for order in groups]
    return {
        "channels": {"channels": torch.randperm(sizes.channels, generator=draw)},
        "neurons": {"neurons": [torch.randperm(sizes.neurons, generator=draw) for _ in layers]},
        "heads": {"heads": heads, "groups": groups},
    }


def fewer(model) -> dict[str, dict]:
    sizes = Sizes.of(model.config)
    heads = torch.arange(sizes.heads).view(sizes.groups, -1)
    heads = heads[:1].flatten() if heads.shape[1] == 1 else heads[:, :1].flatten()
    groups = {"groups": [torch.tensor([0])] * 2} if len(heads) < sizes.groups else {}
    return {
        "channels": {"channels": torch.arange(48)},
        "neurons": {"neurons": [torch.arange(40)] * 2},
        "heads": {"heads": [heads] * 2} | groups,
    }


@pytest.mark.parametrize("kind", WHOLE)
def test_another_order_of_everything_computes_the_same(kind):
    model = tiny(kind, **WHOLE[kind])
    expected = logits(model)
    for settings in shuffled(model).values():
        changed = copy.deepcopy(model)
        narrow(changed, **settings)
        assert not all(torch.equal(a, b) for a, b in zip(changed.parameters(), model.parameters(), strict=True))
        torch.testing.assert_close(logits(changed), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", WHOLE)
def test_a_narrow_model_reloads_and_has_the_size_its_config_says(kind, tmp_path):
    model = tiny(kind, **WHOLE[kind])
    narrow(model, **{key: value for settings in fewer(model).values() for key, value in settings.items()})
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert fresh.num_parameters() == again.num_parameters() == model.num_parameters()
    assert again.config.head_dim == Sizes.of(tiny(kind, **WHOLE[kind]).config).head_dim
    model.generate(token_ids(1, 5), max_new_tokens=3)


@pytest.mark.parametrize("kind", SOME)
def test_a_width_that_the_config_cannot_express_is_refused_and_nothing_changes(kind):
    settings, possible = SOME[kind]
    for axis, change in fewer(tiny(kind, **settings)).items():
        model = tiny(kind, **settings)
        expected = logits(model)
        if axis in possible:
            narrow(model, **change)
            assert logits(model).isfinite().all()
            model = tiny(kind, **settings)
            narrow(model, **shuffled(model)[axis])
            torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        else:
            with pytest.raises(ValueError, match=type(model).__name__):
                narrow(model, **change)
            assert torch.equal(logits(model), expected) and model.config.hidden_size == 64


def test_dead_neurons_and_heads_can_go_without_a_trace():
    model = tiny("qwen2")
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, 40:] = 0
        layer.self_attn.o_proj.weight.data.view(64, 4, 16)[:, [0, 3]] = 0
    expected = logits(model)
    narrow(model, neurons=[torch.arange(40)] * 2, heads=[torch.tensor([1, 2])] * 2)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert (model.config.intermediate_size, model.config.num_attention_heads, model.config.head_dim) == (40, 2, 16)


@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_dead_channels_can_go_once_the_norms_are_corrected(kind):
    model = tiny(kind, rms_norm_eps=1e-2, tie_word_embeddings=True)
    dead = slice(48, 64)
    model.model.embed_tokens.weight.data[:, dead] = 0
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[dead] = 0
        layer.self_attn.o_proj.weight.data[dead] = 0
    if kind == "olmo2":  # a norm behind the projections: dead channels stay 0, but its q_norm shares the epsilon
        narrow(model, channels=torch.arange(48), correction=1.0)
        assert model.config.rms_norm_eps == 1e-2
        return
    expected, plain = logits(model), copy.deepcopy(model)
    narrow(model, channels=torch.arange(48), correction=1.0)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert model.config.rms_norm_eps == pytest.approx(1e-2 * 64 / 48)
    narrow(plain, channels=torch.arange(48))
    assert (logits(plain) - expected).norm() > 0.05 * expected.norm()


def test_norms_that_add_one_to_their_weight_are_corrected_as_such():
    from optimum_slim.width import _added_one

    assert _added_one(tiny("gemma2", head_dim=16).model.norm) == 1 and _added_one(tiny("llama").model.norm) == 0


def test_weights_that_others_hold_stay_as_they_are_and_ties_stay():
    model = tiny("llama", tie_word_embeddings=True)
    held = [parameter.detach() for parameter in model.parameters()]
    copies = [tensor.clone() for tensor in held]
    narrow(model, channels=torch.arange(48))
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_axes_say_which_dimension_is_what():
    axes = find_axes(tiny_llama())
    named = {name: {axis.dim: axis.name for axis in found} for name, found in axes.items() if ".1." not in name}
    layer = "model.layers.0"
    assert named["model.embed_tokens.weight"] == {1: "channels"} and named["model.norm.weight"] == {0: "channels"}
    assert named[f"{layer}.self_attn.q_proj.weight"] == {0: "heads", 1: "channels"}
    assert named[f"{layer}.self_attn.k_proj.weight"] == {0: "groups", 1: "channels"}
    assert named[f"{layer}.mlp.down_proj.weight"] == {0: "channels", 1: "neurons"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": torch.tensor([0, 64])}, "numbers from 0 to 63"),
        ({"channels": torch.tensor([1, 1])}, "different numbers"),
        ({"neurons": [torch.arange(8)]}, "one entry for each of 2 layers"),
        ({"neurons": [torch.arange(8), torch.arange(7)]}, "equally many"),
        ({"heads": [torch.tensor([0, 1])] * 2}, "equally many of each kept group"),
        ({"groups": [torch.tensor([0])] * 2}, "pass heads"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_indices_that_make_no_sense_are_refused(settings, message):
    model = tiny_llama()
    expected = logits(model)
    with pytest.raises(ValueError, match=message):
        narrow(model, **settings)
    assert torch.equal(logits(model), expected)


def test_packed_layers_and_norms_with_a_mean_are_refused():
    packed = tiny_llama()
    slim(packed, BitNet(force=True))
    with pytest.raises(ValueError, match="make the model narrower first"):
        narrow(packed, neurons=[torch.arange(8)] * 2)
    with pytest.raises(ValueError, match="subtracts a mean"):
        narrow(tiny("cohere"), channels=torch.arange(48), correction=1.0)


def test_a_width_that_the_config_class_does_not_take_is_refused_with_its_reason():
    model = tiny_llama()
    with pytest.raises(
        ValueError, match=r"hidden size \(50\) is not a multiple of the number of attention heads \(4\)"
    ):
        narrow(model, channels=torch.arange(50))
    assert model.config.hidden_size == 64
