"""LoRA on sparse layers: the delta is masked, what is trained is what is merged, and what is dropped stays dropped."""

import copy
import logging

import pytest
import torch
from helpers import sparse_layer, tiny_llama, token_ids
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from optimum_slim import BitNet, Magnitude, SparseGPT, Wanda, slim
from optimum_slim.adapters import merge_and_repack, prepare_for_training
from optimum_slim.packed import PackedLinear
from optimum_slim.sparse import SparseLinear
from optimum_slim.sparse_training import (
    KeptValues,
    MaskedDelta,
    product,
)


peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:`{name}gradient_checkpointing` is deprecated:FutureWarning")
    for name in ("", "is_")
]

IDS = token_ids()
PATTERNS = {"positions 2:4": "2:4", "positions 1:4": "1:4", "rows": "4:8", "flat": 0.5}
LAYOUTS = pytest.mark.parametrize("sparsity", PATTERNS.values(), ids=PATTERNS.keys())
BITS = pytest.mark.parametrize(("bits", "group_size"), [(None, None), (4, None), (3, 16)], ids=["values", "4", "3x16"])


def adapted_layer(layer, names=("default",), **changes):
    """A LoRA layer with factors that are not zero."""
    module = nn.ModuleDict({"up": layer})
    model = peft.get_peft_model(module, lora(["up"], **changes))
    for name in names[1:]:
        model.add_adapter(name, lora(["up"], **changes))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dim() == 2 and 4 in parameter.shape:
            parameter.data = torch.randn_like(parameter) * 0.3
    return model, model.base_model.model["up"]


def lora(target_modules="all-linear", **changes) -> peft.LoraConfig:
    return peft.LoraConfig(**({"r": 4, "target_modules": target_modules} | changes))


def delta(layer, name="default"):
    factors = layer.lora_B[name].weight @ layer.lora_A[name].weight
    return (factors * layer.scaling[name] * layer.base_layer.mask()).detach()


def sparse_llama(dtype=torch.float32, sparsity="2:4", **changes):
    model = tiny_llama(tie_word_embeddings=False).to(dtype)
    slim(model, Magnitude(sparsity=sparsity, **changes))
    return model


def adapt(model, config=None, steps=4):
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config or lora(task_type="CAUSAL_LM"))
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return adapted.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def packed(model) -> dict[str, torch.Tensor]:
    return {
        f"{name.removesuffix('.base_layer').removeprefix('base_model.model.')}.{key}": getattr(module, key).clone()
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
        for key in module.packed_tensors()
    }


def distance(found, expected) -> float:
    return float((found - expected).float().norm() / expected.float().norm())


@LAYOUTS
@BITS
def test_the_masked_forward_and_its_gradients_equal_the_dense_ones(sparsity, bits, group_size):
    base = sparse_layer(sparsity, bits, group_size)
    _, layer = adapted_layer(base)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 5, 38, requires_grad=True)
    dy = torch.randn(2, 5, 24)
    found = layer(x)
    gradients = torch.autograd.grad(found, (x, a, b), dy)
    expected = linear(x, base.dense() + base.mask() * (b @ a) * layer.scaling["default"], base.bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (x, a, b), dy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@LAYOUTS
def test_gradients_are_those_of_finite_differences(sparsity):
    base = sparse_layer(sparsity, shape=(6, 10), bias=False)
    x, a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 10), (2, 10), (6, 2)))
    make = MaskedDelta(base, (0.7,))
    assert torch.autograd.gradcheck(lambda x, a, b: product(x, make, a, b), (x, a, b))
    values = base.weight_values.double().requires_grad_()
    inside = base.mask().sum(1)
    if values.numel() == int(inside.sum()):  # else the last group is padded with values that count for nothing
        assert torch.autograd.gradcheck(lambda x, v: product(x, KeptValues(base), v), (x, values))


def test_nothing_as_large_as_the_weight_is_kept_for_the_backward_pass():
    base = sparse_layer("2:4", shape=(64, 64))
    _, layer = adapted_layer(base)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 64))
    floats = [t for t in kept if t.is_floating_point()]
    assert floats and max(t.numel() for t in floats) == 64 * 4


def test_autocast_decides_the_dtype_and_the_factors_keep_theirs():
    base = sparse_layer("2:4", dtype=torch.bfloat16)
    _, layer = adapted_layer(base)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(5, 38, requires_grad=True))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32
    x = torch.randn(5, 38, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    expected = linear(x, (base.dense() + delta(layer)).to(torch.bfloat16)) + base.bias
    torch.testing.assert_close(layer(x), expected)


def test_dropout_acts_on_the_input_of_the_delta_alone():
    base = sparse_layer("4:8")
    _, layer = adapted_layer(base, lora_dropout=0.5)
    x = torch.randn(7, 38, requires_grad=True)
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    expected = base(x) + linear(nn.functional.dropout(x, 0.5), delta(layer))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    layer.eval()
    torch.testing.assert_close(layer(x), linear(x, base.dense() + delta(layer), base.bias), rtol=1e-5, atol=1e-5)


def test_several_adapters_disabled_mixed_and_with_their_own_scale():
    base = sparse_layer("2:4")
    model, layer = adapted_layer(base, names=("default", "second"), use_rslora=True, lora_alpha=3, lora_bias=True)
    assert layer.scaling["default"] == 1.5
    for name in ("default", "second"):
        layer.lora_B[name].bias.data = torch.randn(24)
    x = torch.randn(4, 38)
    layer.eval()

    def expected(x, *names):
        bias = base.bias + sum(layer.lora_B[name].bias * layer.scaling[name] for name in names)
        return linear(x, base.dense() + sum(delta(layer, name) for name in names), bias)

    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(layer(x), expected(x, "default"), **close)
    layer.set_adapter(["default", "second"])
    both = layer(x)
    torch.testing.assert_close(both, expected(x, "default", "second"), **close)
    mixed = layer(x, adapter_names=["second", "__base__", "default", "second"])
    torch.testing.assert_close(mixed[[0, 3]], expected(x[[0, 3]], "second"), **close)
    torch.testing.assert_close(mixed[[2]], expected(x[[2]], "default"), **close)
    assert torch.equal(mixed[[1]], base(x)[[1]])
    with model.disable_adapter():
        assert torch.equal(layer(x), base(x))
    layer.merge()
    torch.testing.assert_close(layer(x), both, **close)
    layer.unmerge()
    assert layer.base_layer is base


@LAYOUTS
@BITS
def test_merging_keeps_the_index_and_rounds_once(sparsity, bits, group_size):
    base = sparse_layer(sparsity, bits, group_size)
    _, layer = adapted_layer(base)
    before, exact = copy.deepcopy(base.state_dict()), base.dense() + delta(layer)
    layer.merge(safe_merge=True)
    merged = layer.base_layer
    assert type(merged) is SparseLinear and merged.layout == base.layout
    for name in ("weight", "weight_rows", "weight_scale", "weight_zero"):
        new, old = getattr(merged, name), getattr(base, name)
        assert new is old is None or torch.equal(new, old)
    merged.validate()
    assert bool((merged.dense()[~base.mask()] == 0).all())
    if bits is None:
        torch.testing.assert_close(merged.dense(), exact, rtol=0, atol=1e-6)
        assert layer.lost == (0.0, 0.0)
    else:
        scale = base.weight_scale.float().repeat_interleave(base.group_size, 1)[:, :38]
        codes = (exact / scale).round() + base.weight_zero.repeat_interleave(base.group_size, 1)[:, :38]
        codes = codes.clamp(0, 2**bits - 1) - base.weight_zero.repeat_interleave(base.group_size, 1)[:, :38]
        torch.testing.assert_close(merged.dense(), codes * scale * base.mask())
        assert layer.lost[0] == pytest.approx(float((merged.dense() - exact).square().sum()), rel=1e-3)
        assert layer.lost[1] == pytest.approx(float(delta(layer).square().sum()), rel=1e-3)
    layer.unmerge()
    after = layer.base_layer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_values_of_16_bits_are_rounded_once_even_where_adapters_are_merged_one_by_one():
    base = sparse_layer("2:4", dtype=torch.bfloat16)
    _, layer = adapted_layer(base, names=("default", "second"))
    exact = base.dense() + delta(layer) + delta(layer, "second")
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["second"])
    assert layer.merged_adapters == ["default", "second"]
    assert torch.equal(layer.base_layer.dense(torch.bfloat16), exact.to(torch.bfloat16))
    layer.unmerge()
    assert layer.base_layer is base


def test_rounded_products_are_those_of_the_merged_layer():
    base = sparse_layer("4:8", bits=4)
    _, layer = adapted_layer(base, lora_dropout=0.5)
    layer.rounded = True
    layer.eval()
    x = torch.randn(3, 38)
    found = layer(x)
    layer.merge()
    torch.testing.assert_close(found, layer.base_layer(x), rtol=1e-5, atol=1e-5)
    layer.unmerge()
    layer.train()
    layer(x).sum().backward()
    assert layer.lora_A["default"].weight.grad.abs().sum() > 0


def test_a_broken_adapter_is_refused_and_nothing_changes():
    base = sparse_layer()
    _, layer = adapted_layer(base)
    layer.lora_B["default"].weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        layer.merge()
    assert layer.base_layer is base and not layer.merged
    with pytest.raises(RuntimeError, match="without bias"):
        adapted_layer(sparse_layer(bias=False), lora_bias=True)[1].merge()


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["dora", "pissa"])
def test_what_needs_dense_weights_is_refused(changes):
    with pytest.raises(ValueError, match=f"packed layers take plain LoRA.*{next(iter(changes))}"):
        peft.get_peft_model(sparse_llama(), lora(**changes))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_prepared_model_trains(checkpointing):
    model = prepare_for_training(sparse_llama(), checkpointing)
    before = packed(model)
    adapted = peft.get_peft_model(model, lora(task_type="CAUSAL_LM"))
    first = adapted(input_ids=IDS, labels=IDS).loss.item()
    adapted.unload()
    adapted = adapt(model.train())
    assert adapted(input_ids=IDS, labels=IDS).loss < first - 0.1
    after = packed(adapted)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("sparsity", ["2:4", 0.5])
def test_adapters_save_and_come_back(tmp_path, sparsity):
    sparse_llama(sparsity=sparsity).save_pretrained(tmp_path / "slim")
    adapted = adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "slim"))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "step",
    [Magnitude(sparsity="2:4"), Magnitude(sparsity=0.5), Wanda(sparsity=0.5), SparseGPT(sparsity="4:8")],
    ids=["positions", "flat", "rows", "n:m"],
)
def test_merge_and_unload_gives_the_sparse_model_again(dense_folder, tmp_path, step, dtype):
    model = AutoModelForCausalLM.from_pretrained(dense_folder, dtype=dtype)
    slim(model, step, data=token_ids(16, 16))
    before = packed(model)
    adapted = adapt(model)
    expected = logits(adapted)
    merged = adapted.merge_and_unload(safe_merge=True)
    after = packed(merged)
    assert after.keys() == before.keys()
    for name, old in before.items():
        same = torch.equal(after[name], old)
        assert same != name.endswith("weight_values")
    assert distance(logits(merged), expected) < (1e-5 if dtype == torch.float32 else 0.02)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    assert torch.equal(logits(again), logits(merged))
    assert all(torch.equal(packed(again)[name], tensor) for name, tensor in after.items())


def test_merging_into_codes_says_what_it_lost(caplog):
    model = sparse_llama(bits=4)
    with caplog.at_level(logging.WARNING, logger="optimum_slim.packed_lora"):
        merged = adapt(model).merge_and_unload()
    assert "14 layers" in caplog.text and "took back" in caplog.text
    assert sum(isinstance(module, SparseLinear) for module in merged.modules()) == 14


def test_ternary_layers_become_dense_beside_sparse_ones_that_stay(tmp_path):
    model = tiny_llama()
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    slim(
        model,
        [
            BitNet(force=True, activation_bits=None, modules_to_not_convert=("mlp",)),
            Magnitude(sparsity="2:4", modules_to_not_convert=attention),
        ],
    )
    before = packed(model)
    adapted = adapt(model, lora(["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    layer = merged.model.layers[0]
    assert type(layer.self_attn.q_proj) is nn.Linear and type(layer.self_attn.v_proj) is not nn.Linear
    assert torch.equal(layer.mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
    assert distance(logits(merged), expected) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(again.model.layers[0].self_attn.q_proj) is nn.Linear
    assert torch.equal(again.model.layers[0].mlp.up_proj.mask(), layer.mlp.up_proj.mask())
    assert torch.equal(logits(again), logits(merged))


@BITS
def test_repacking_needs_no_data_and_keeps_the_mask(tmp_path, bits, group_size):
    model = tiny_llama()
    slim(model, SparseGPT(sparsity=0.5, bits=bits, group_size=group_size), data=token_ids(16, 16))
    before = packed(model)
    adapted = adapt(model, lora(["up_proj"], task_type="CAUSAL_LM"))
    expected = logits(adapted)
    repacked = merge_and_repack(adapted)
    (step,) = repacked.slim_report.steps
    assert step.step["step"] == "sparsegpt" and [row["name"] for row in step.layers] == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
    ]
    if bits is None:
        assert all(row["relative_error"] < 1e-12 for row in step.layers)
        assert distance(logits(repacked), expected) < 1e-5
    else:
        assert all(0 < row["relative_error"] < 0.2 for row in step.layers)
    after = packed(repacked)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.mlp.up_proj.weight_values" for i in (0, 1)}
    repacked.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(repacked))


def test_transposed_layers():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=128, n_positions=64)).eval()
    slim(model, Magnitude(sparsity="2:4"))
    before = packed(model)
    adapted = adapt(model, lora(["c_attn", "c_fc"], task_type="CAUSAL_LM", fan_in_fan_out=True))
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    after = packed(merged)
    assert distance(logits(merged), expected) < 1e-5
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"transformer.h.0.attn.c_attn.weight_values", "transformer.h.0.mlp.c_fc.weight_values"}
