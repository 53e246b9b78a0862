"""Experts and their neurons: where they lie, that their order does not matter, and what is left without some."""

import copy

import pytest
import torch
from helpers import tiny_llama
from moe_models import SPARSE, experts_of, sparse
from test_width import logits, tiny
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_slim.axes import Sizes
from optimum_slim.width import narrow


def inside(sizes: Sizes) -> str:
    return "expert_neurons" if sizes.expert_neurons else "neurons"


def chosen(sizes: Sizes, experts: int, neurons: int, seed: int = 1) -> dict[str, list]:
    """So many experts of each of two layers and neurons of each of these, at random."""
    draw = torch.Generator().manual_seed(seed)
    groups, each = sizes.expert_groups, sizes.experts // sizes.expert_groups
    kept: dict[str, list] = {"experts": [], inside(sizes): []}
    for _ in range(2):
        order = torch.randperm(groups, generator=draw).tolist()
        kept["experts"].append(
            torch.cat([g * each + torch.randperm(each, generator=draw)[: experts // groups] for g in order])
        )
        width = getattr(sizes, inside(sizes))
        rows = [torch.randperm(width, generator=draw)[:neurons] for _ in range(experts)]
        kept[inside(sizes)].append(torch.stack(rows))
        if sizes.shared:
            order = torch.randperm(sizes.shared * width, generator=draw)[: sizes.shared * neurons]
            kept.setdefault("shared_neurons", []).append(order)
    return kept


@pytest.mark.parametrize("kind", SPARSE)
def test_another_order_of_experts_and_of_the_neurons_in_each_computes_the_same(kind):
    model = sparse(kind)
    expected, sizes = logits(model), Sizes.of(model.config)
    changed = copy.deepcopy(model)
    narrow(changed, **chosen(sizes, sizes.experts, getattr(sizes, inside(sizes))))
    for part in zip(experts_of(model), experts_of(changed), strict=True):
        for a, b in zip(*(module.parameters() for module in part), strict=True):
            assert a.shape == b.shape and not torch.equal(a, b)
    torch.testing.assert_close(logits(changed), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", SPARSE)
def test_each_expert_keeps_its_own_neurons_and_the_result_reloads(kind, tmp_path):
    model = sparse(kind)
    before, count, sizes = experts_of(copy.deepcopy(model)), model.num_parameters(), Sizes.of(model.config)
    kept, width = chosen(sizes, 4, 24), getattr(sizes, inside(sizes))
    narrow(model, **kept)
    layer = [[i.tolist() for i in kept[name][1]] for name in ("experts", inside(sizes))]
    for new, (old, neurons) in enumerate(zip(*layer, strict=True)):
        gate = [*neurons, *(width + i for i in neurons)]
        assert torch.equal(experts_of(model)[0].gate_up_proj[new], before[0].gate_up_proj[old][gate])
        assert torch.equal(experts_of(model)[0].down_proj[new], before[0].down_proj[old][:, neurons])
        assert torch.equal(experts_of(model)[1].weight[new], before[1].weight[old])
    each = [experts * (3 * 64 * width + 64) for experts, width in ((sizes.experts, width), (4, 24))]
    of_shared = sizes.shared * 3 * 64 * (width - 24)
    layers = sum(hasattr(layer.mlp, "experts") for layer in model.model.layers)
    assert count - model.num_parameters() == layers * (each[0] - each[1] + of_shared)
    model.save_pretrained(tmp_path)
    again, about = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(about[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found, wanted = again.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    torch.testing.assert_close(logits(again), logits(model))
    assert Sizes.of(again.config).experts == 4
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert fresh.num_parameters() == again.num_parameters() == model.num_parameters()


def test_experts_whose_gates_are_interleaved_can_go_and_their_neurons_cannot():
    model = sparse("gpt_oss")
    experts_of(model)[1].bias.data[2] = -1e4  # of two, one that no token goes to
    experts_of(model, 0)[1].bias.data[0] = -1e4
    expected = logits(model)
    with pytest.raises(ValueError, match="with its neurons in another order"):
        narrow(model, neurons=[torch.arange(8)] * 2)
    narrow(model, experts=[torch.tensor([3, 1, 2]), torch.tensor([0, 1, 3])])
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert model.config.num_local_experts == 3


def test_experts_in_half_precision_may_be_equally_good():
    model = sparse("qwen3_moe", num_experts=64, num_experts_per_tok=8).bfloat16()
    narrow(model, experts=[torch.arange(48)] * 2, expert_neurons=[torch.arange(24)] * 2)
    assert logits(model).isfinite().all() and model.config.num_experts == 48


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("mixtral", {"experts": [torch.arange(1)] * 2}, "a token goes to 2 of them .* at least 2"),
        ("mixtral", {"experts": [torch.tensor([0, 4])] * 2}, "numbers from 0 to 3"),
        ("mixtral", {"neurons": [torch.arange(8).expand(3, 8)] * 2}, "one for each kept expert"),
        ("mixtral", {"expert_neurons": [torch.arange(8)] * 2}, "no expert_neurons"),
        ("olmoe", {"channels": torch.arange(48)}, "a dimension of .*k_norm.weight follows another width"),
        ("qwen2_moe", {"neurons": [torch.arange(8)] * 2}, "no weight follows them, experts have expert_neurons"),
        ("deepseek_v3", {"experts": [torch.tensor([0, 1, 2, 4])] * 2}, "equally many of each of 2 groups"),
        ("deepseek_v3", {"experts": [torch.tensor([0, 4])] * 2}, "a multiple of 2, at least 4"),
        ("deepseek_v3", {"expert_neurons": [torch.arange(8)] * 2}, "pass shared_neurons"),
        (
            "deepseek_v3",
            {"expert_neurons": [torch.arange(8)] * 2, "shared_neurons": [torch.arange(8)] * 2},
            "2 times as many as expert_neurons",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_router_or_weight_allows_is_refused_and_nothing_changes(kind, settings, message):
    model = sparse(kind)
    expected = logits(model)
    with pytest.raises(ValueError, match=message):
        narrow(model, **settings)
    assert torch.equal(logits(model), expected)


def test_a_dense_model_has_no_experts():
    with pytest.raises(ValueError, match="no experts"):
        narrow(tiny_llama(), experts=[torch.arange(1)] * 2)


def test_shared_experts_that_follow_the_neurons_take_the_same_for_all_or_are_refused():
    """HunYuan has one width for its routed and its shared experts."""
    settings = {"num_experts": 4, "moe_topk": 2, "head_dim": 16}
    model = tiny("hunyuan_v1_moe", **settings)
    expected = logits(model)
    with pytest.raises(ValueError, match="the same neurons for all experts"):
        narrow(model, neurons=[torch.arange(8).expand(4, 8)] * 2)
    narrow(model, neurons=[torch.arange(95, -1, -1)] * 2)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
