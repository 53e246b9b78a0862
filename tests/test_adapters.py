import subprocess
import sys

import pytest
import torch
from helpers import tiny_llama, token_ids
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from optimum_slim import PT2LLM, BitNet, PackedLinear, SlimConfig, slim
from optimum_slim.adapters import merge_and_repack, prepare_for_training


peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:`{name}gradient_checkpointing` is deprecated:FutureWarning")
    for name in ("", "is_")
]

IDS = token_ids()
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def lora(target_modules="all-linear", **changes) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=target_modules, task_type="CAUSAL_LM", **changes)


def packed_llama(dtype=torch.float32, activation_bits=None, **changes):
    model = tiny_llama(**changes).to(dtype)
    slim(model, BitNet(force=True, activation_bits=activation_bits))
    return model


def trained(adapted, steps=4):
    """A few steps of Adam, so that the adapter is not zero."""
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return adapted.eval()


def adapt(model, config=None):
    torch.manual_seed(0)
    return trained(peft.get_peft_model(model, config or lora()))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def packed_state(model) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": getattr(module, key).clone()
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
        for key in module.packed_tensors()
    }


def distance(found, expected) -> float:
    return float((found - expected).float().norm() / expected.float().norm())


@pytest.fixture
def slim_folder(tmp_path):
    packed_llama().save_pretrained(tmp_path / "slim")
    return tmp_path / "slim"


@DTYPES
@pytest.mark.parametrize("activation_bits", [None, 8], ids=["weight-only", "int8"])
def test_lora_learns_and_leaves_the_packed_bytes_alone(dtype, activation_bits):
    model = packed_llama(dtype, activation_bits)
    packed, before = packed_state(model), logits(model)
    adapted = peft.get_peft_model(model, lora())
    first = adapted(input_ids=IDS, labels=IDS).loss
    trained(adapted)
    assert adapted(input_ids=IDS, labels=IDS).loss < first - 0.1
    after = packed_state(model)
    assert len(after) == 28
    assert all(torch.equal(after[key.replace("proj.", "proj.base_layer.")], value) for key, value in packed.items())
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)


@DTYPES
def test_saved_adapters_come_back_by_every_door(slim_folder, tmp_path, dtype):
    def base():
        return AutoModelForCausalLM.from_pretrained(slim_folder, dtype=dtype)

    adapted = adapt(base())
    adapted.save_pretrained(tmp_path / "adapter")
    assert {f.name for f in (tmp_path / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    expected = logits(adapted)
    loaded = base()
    loaded.load_adapter(tmp_path / "adapter")
    for again in (
        peft.PeftModel.from_pretrained(base(), tmp_path / "adapter"),
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=dtype),
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=dtype),
        loaded,
    ):
        assert not any(p.requires_grad for name, p in again.named_parameters() if "base_layer" in name)
        assert torch.equal(logits(again), expected)


def test_an_adapter_of_transformers_own_api_trains_and_reloads(slim_folder, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(slim_folder)
    model.add_adapter(lora(["q_proj", "up_proj"]))
    trained(model).save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))


def test_a_second_adapter_can_be_added_and_chosen():
    adapted = adapt(packed_llama())
    first = logits(adapted)
    adapted.add_adapter("second", lora("all-linear"))
    adapted.set_adapter("second")
    assert distance(logits(trained(adapted)), first) > 0.01
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted), first)


def test_pt2llm_loads_with_frozen_scales_and_offsets(dense_folder, tmp_path):
    config = SlimConfig(PT2LLM(group_size=32), calibration=token_ids(4, 32))
    AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=config).save_pretrained(tmp_path / "slim")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    trainable = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"weight"} and not model.model.layers[0].mlp.up_proj.weight_offset.requires_grad
    adapted = adapt(model)
    with pytest.raises(ValueError, match=r"packed by pt2llm, which needs calibration data.*merge_and_unload"):
        merge_and_repack(adapted)
    expected = logits(adapted)
    assert 0 < distance(logits(adapted.merge_and_unload()), expected) < 0.03  # int8 activations are no more


@DTYPES
def test_merge_and_unload_gives_an_ordinary_model(tmp_path, dtype):
    adapted = adapt(packed_llama(dtype))
    expected = logits(adapted)
    merged = adapted.merge_and_unload(safe_merge=True)
    assert not any(isinstance(m, PackedLinear) for m in merged.modules())
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert distance(logits(merged), expected) < (1e-5 if dtype == torch.float32 else 0.02)
    merged.save_pretrained(tmp_path / "merged")
    saved = merged.state_dict()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert again.keys() == saved.keys() and all(torch.equal(again[key], saved[key]) for key in saved)


@pytest.mark.slow
def test_a_merged_model_loads_without_this_package(tmp_path):
    merged = adapt(packed_llama()).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    stock = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
        "model = A.from_pretrained(sys.argv[1]); assert 'optimum_slim' not in sys.modules\n"
        "torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])"
    )
    torch.save(IDS, tmp_path / "ids.pt")
    files = [tmp_path / "merged", tmp_path / "ids.pt", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", stock, *files], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(merged))


def test_merging_by_hand_and_layers_without_adapter():
    adapted = adapt(packed_llama(), lora(["up_proj"]))
    layer = adapted.base_model.model.model.layers[1].mlp.up_proj
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    weight, expected = (layer.base_layer.dense() + delta).detach(), logits(adapted)
    merged = adapted.merge_and_unload()
    assert torch.equal(merged.model.layers[1].mlp.up_proj.weight, weight)
    assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert distance(logits(merged), expected) < 1e-5 and not hasattr(merged.config, "quantization_config")


@DTYPES
def test_unmerge_restores_the_bytes(dtype):
    adapted = adapt(packed_llama(dtype))
    packed, expected = packed_state(adapted), logits(adapted)
    adapted.merge_adapter()
    assert not packed_state(adapted)
    assert distance(logits(adapted), expected) < (1e-5 if dtype == torch.float32 else 0.02)
    adapted.unmerge_adapter()
    restored = packed_state(adapted)
    assert restored.keys() == packed.keys() and all(torch.equal(restored[key], packed[key]) for key in packed)
    assert torch.equal(logits(adapted), expected)


def test_a_broken_adapter_is_refused_and_nothing_changes():
    adapted = adapt(packed_llama())
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    packed = layer.base_layer
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        adapted.merge_and_unload(safe_merge=True)
    assert layer.base_layer is packed


def test_unload_gives_the_packed_model_back():
    model = packed_llama()
    before = logits(model)
    model = adapt(model).unload()
    assert torch.equal(logits(model), before) and model.config.quantization_config.quant_method == "slim"


def test_a_transposed_layer_merges_the_right_way_round():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=128, n_positions=64)).eval()
    slim(model, BitNet(force=True, activation_bits=None))
    adapted = adapt(model, lora(["c_attn", "c_fc"]))
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    assert type(merged.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    assert distance(logits(merged), expected) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}],
    ids=["dora", "pissa", "olora"],
)
def test_what_needs_dense_weights_is_refused(changes):
    with pytest.raises(ValueError, match=f"packed layers take plain LoRA.*{next(iter(changes))}.*dequantize"):
        peft.get_peft_model(packed_llama(), lora(**changes))
    dense = packed_llama()
    dense.dequantize()
    peft.get_peft_model(dense, lora(**changes))


def test_a_parameter_that_is_packed_is_refused():
    with pytest.raises(ValueError, match="target_parameters names the weight of a packed layer"):
        peft.get_peft_model(packed_llama(), lora([], target_parameters=["mlp.up_proj.weight"]))


def test_other_kinds_of_adapter_do_not_merge_into_bytes():
    config = peft.OFTConfig(r=4, oft_block_size=0, target_modules=["up_proj"])
    adapted = trained(peft.get_peft_model(packed_llama(), config))
    with pytest.raises(ValueError, match=r"mlp.up_proj is packed, and OFTModel cannot merge into it"):
        adapted.merge_and_unload()


def test_dense_models_are_adapted_as_by_peft_alone():
    adapted = adapt(tiny_llama())
    assert type(adapted.base_model.model.model.layers[0].mlp.up_proj) is peft.tuners.lora.Linear
    expected = logits(adapted)
    assert distance(logits(adapted.merge_and_unload()), expected) < 1e-5


def test_repacked_with_the_error_stated(tmp_path):
    model = packed_llama(attention_bias=True)
    untouched = packed_state(model)
    adapted = adapt(model, lora(["up_proj", "q_proj", "lm_head"]))
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    layer.merge()
    weight = layer.base_layer.weight.clone()
    layer.unmerge()
    head = adapted.base_model.model.lm_head
    hidden = torch.ones(1, 64)
    expected_head = head(hidden)

    repacked = merge_and_repack(adapted)
    (step,) = repacked.slim_report.steps
    rows = {row["name"]: row for row in step.layers}
    assert step.step["step"] == "bitnet" and len(rows) == 4
    found = repacked.model.layers[0].mlp.up_proj.dense()
    lost = float((found - weight).square().sum() / weight.square().sum())
    assert rows["model.layers.0.mlp.up_proj"]["relative_error"] == pytest.approx(lost, rel=1e-4) and 0 < lost < 0.5
    after = packed_state(repacked)
    changed = {key for key in after if not torch.equal(after[key], untouched[key])}
    assert changed and {key.split(".")[-2] for key in changed} == {"up_proj", "q_proj"}
    torch.testing.assert_close(linear(hidden, repacked.lm_head.weight), expected_head)

    repacked.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(repacked))


def test_repacking_that_the_method_refuses_changes_nothing(monkeypatch):
    adapted = adapt(packed_llama())
    expected, packed = logits(adapted), packed_state(adapted)
    compress = BitNet.compress

    def refuse_down_projections(self, weight, gram=None):
        if weight.shape == (64, 96):
            raise ValueError("absmean rounding loses too much")
        return compress(self, weight, gram)

    monkeypatch.setattr(BitNet, "compress", refuse_down_projections)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.down_proj: absmean"):
        merge_and_repack(adapted)
    after = packed_state(adapted)
    assert torch.equal(logits(adapted), expected) and all(torch.equal(after[key], packed[key]) for key in packed)


def test_repacking_needs_a_packed_layer_with_an_adapter():
    with pytest.raises(ValueError, match="no packed layer carries an adapter"):
        merge_and_repack(adapt(tiny_llama()))
    with pytest.raises(TypeError, match="takes a PeftModel"):
        merge_and_repack(packed_llama())


@DTYPES
def test_prepared_models_train_the_same_with_and_without_checkpointing(dtype):
    losses, gradients = [], []
    for activation_checkpointing in (False, True):
        model = prepare_for_training(packed_llama(dtype), activation_checkpointing)
        dtypes = {p.dtype for p in model.parameters()}
        assert dtypes == {torch.uint8, torch.float32, dtype} and not any(p.requires_grad for p in model.parameters())
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, lora())
        seen = []
        adapted.base_model.model.model.layers[0].self_attn.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        adapted.train()
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert len(seen) == 1 + activation_checkpointing  # the forward pass ran again for the backward pass
        losses.append(loss.item())
        gradients.append(adapted.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight.grad)
    assert losses[0] == losses[1] and torch.equal(*gradients) and gradients[0].abs().sum() > 0


def test_prepare_uses_the_name_that_older_transformers_has(monkeypatch):
    model, asked = packed_llama(), []
    monkeypatch.setattr(type(model), "gradient_checkpointing_enable", lambda self, kwargs: asked.append(kwargs))
    for parent in type(model).__mro__:
        if "activation_checkpointing_enable" in vars(parent):
            monkeypatch.delattr(parent, "activation_checkpointing_enable")
    prepare_for_training(model)
    assert asked == [{"use_reentrant": False}]


def test_prepare_comes_before_the_adapter():
    with pytest.raises(ValueError, match="before adding adapters"):
        prepare_for_training(peft.get_peft_model(packed_llama(), lora()))


def arguments(folder, **changes):
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0, "logging_steps": 1}
    return TrainingArguments(str(folder), **(settings | changes))


DATA = [{"input_ids": row, "labels": row} for row in IDS] * 4


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_trainer_trains_checkpoints_and_resumes(tmp_path, checkpointing):
    def trainer(name):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(packed_llama(), lora(lora_dropout=0.05))
        return Trainer(adapted, arguments(tmp_path / name, gradient_checkpointing=checkpointing), train_dataset=DATA)

    whole = trainer("whole")
    losses = [entry["loss"] for entry in (whole.train(), whole.state.log_history)[1] if "loss" in entry]
    assert losses[-1] < losses[0]
    saved = tmp_path / "whole" / "checkpoint-2"
    assert (saved / "adapter_model.safetensors").is_file() and not (saved / "model.safetensors").exists()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(saved))
    expected, found = whole.model.eval(), resumed.model.eval()
    torch.testing.assert_close(logits(found), logits(expected), rtol=1e-5, atol=1e-5)


def test_trainer_refuses_to_fine_tune_packed_weights_and_trains_plain_models_fully(tmp_path):
    with pytest.raises(ValueError, match="purely quantized models"):
        Trainer(packed_llama(), arguments(tmp_path), train_dataset=DATA)
    model = tiny_llama(num_hidden_layers=1)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    Trainer(model, arguments(tmp_path, max_steps=1, save_strategy="no"), train_dataset=DATA).train()
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "start",
    [
        "import sys, optimum_slim.adapters; assert 'peft' not in sys.modules; import peft",
        "import peft, optimum_slim.adapters",
    ],
    ids=["slim-first", "peft-first"],
)
def test_the_order_of_imports_does_not_matter(start):
    code = f"{start}; print(peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA].__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "PackedLoraModel"
