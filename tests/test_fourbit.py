import subprocess
import sys
import weakref

import pytest
import torch
from helpers import tiny_llama, tiny_mixtral, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel


bnb = pytest.importorskip("bitsandbytes")

from optimum_slim.fourbit import as_4bit, finish, restore_linears, stored_bits_per_weight, swap_linears  # noqa: E402


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CONFIGS = {
    "nf4": NF4,
    "nf4-double": NF4 | {"bnb_4bit_use_double_quant": True},
    "nf4-bf16-storage": NF4 | {"bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "bfloat16"},
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
}
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
all_configs = pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)


def tiny(dtype=torch.float32, **changes):
    """A tiny Llama with biases, whose layers are whole blocks of 64 columns and whole tiles of 32 rows."""
    model = tiny_llama(intermediate_size=128, attention_bias=True, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        parameter.data = parameter.data.to(dtype)  # not the rotary buffers, which from_pretrained keeps in fp32
    return model


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=128, n_positions=32)).eval()


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


def assert_same_tensors(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        ours, theirs = (state[key].reshape(-1).view(torch.uint8) for state in (left, right))  # packed bytes hold NaNs
        assert torch.equal(ours, theirs), key


def linear_names(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]


@both_dtypes
@all_configs
def test_finish_leaves_what_from_pretrained_would(tmp_path, settings, dtype):
    tiny(dtype).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**settings))
    finish(model, BitsAndBytesConfig(**settings))

    assert_same_tensors(model, stock)
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert (type(ours), ours.requires_grad) == (type(theirs), theirs.requires_grad), name
    for name in linear_names(stock):
        ours, theirs = model.get_submodule(name), stock.get_submodule(name)
        assert (type(ours), ours.training) == (type(theirs), theirs.training)
        assert getattr(ours, "compute_dtype", None) == getattr(theirs, "compute_dtype", None)
    assert model.__dict__.keys() == stock.__dict__.keys()
    for flag in ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        assert getattr(model, flag, None) == getattr(stock, flag, None)
    assert type(model.hf_quantizer) is type(stock.hf_quantizer)
    assert model.config._is_quantized and model.config.dtype == stock.config.dtype == dtype
    assert model.config.quantization_config.to_dict() == stock.config.quantization_config.to_dict()
    assert torch.equal(logits(model), logits(stock))


def test_gpt2_transposed_layers_as_from_pretrained(tmp_path):
    model = tiny_gpt2()
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**NF4))
    finish(model, BitsAndBytesConfig(**NF4))
    assert isinstance(model.transformer.h[0].mlp.c_fc, bnb.nn.Linear4bit)
    assert_same_tensors(model, stock)


@pytest.mark.slow
def test_saved_models_load_in_a_process_without_this_package(tmp_path):
    for name in ("nf4-double", "fp4", "int8"):
        model = tiny(torch.bfloat16, tie_word_embeddings=name == "fp4")
        finish(model, BitsAndBytesConfig(**CONFIGS[name]))
        model.save_pretrained(tmp_path / name)
        torch.save(logits(model), tmp_path / name / "logits.pt")
    script = """
import pathlib, sys, torch
from transformers import AutoModelForCausalLM
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, torch.load(folder / "logits.pt")), folder
    assert "optimum_slim" not in sys.modules
    print(type(model.model.layers[0].mlp.up_proj).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Linear4bit", "Linear8bitLt", "Linear4bit"]


def test_finish_frees_each_dense_weight_before_the_next(monkeypatch):
    model = tiny()
    weights = [weakref.ref(model.get_submodule(name).weight) for name in linear_names(model)]
    alive, quantize = [], bnb.functional.quantize_4bit

    def spy(*args, **kwargs):
        alive.append(sum(weight() is not None for weight in weights))
        return quantize(*args, **kwargs)

    monkeypatch.setattr(bnb.functional, "quantize_4bit", spy)
    finish(model, BitsAndBytesConfig(**NF4))
    assert alive == list(range(len(weights), 0, -1))


@pytest.mark.parametrize("name", ["nf4-bf16-storage", "int8"])
def test_dequantize_after_finish(name):
    model = tiny(torch.bfloat16)
    model.config.dtype = "float32"  # as a model saved first and cast later has it
    finish(model, BitsAndBytesConfig(**CONFIGS[name]))
    # With gradients on: after an evaluation without, on CPUs with AVX512-BF16, stock dequantize() gives wrong weights.
    quantized = model(token_ids()).logits.detach()
    model.dequantize()
    assert all(type(model.get_submodule(n)) is nn.Linear for n in linear_names(model))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(model), quantized, atol=0.02, rtol=0)
    finish(model, BitsAndBytesConfig(**NF4))  # dense again, so it may be quantized again


@both_dtypes
@all_configs
def test_restore_gives_the_same_modules_back(settings, dtype):
    model = tiny(dtype)
    modules, before, state = dict(model.named_modules()), logits(model), vars(model).copy()
    originals = swap_linears(model, BitsAndBytesConfig(**settings), ["layers.1.mlp"])
    nn.init.ones_(model.model.layers[0].self_attn.v_proj.bias)  # as training could
    kinds = {name: type(model.get_submodule(name)).__name__ for name in modules}
    assert originals == {n: modules[n] for n in linear_names(model) if "layers.1.mlp" not in n}
    assert {kinds[n] for n in originals} == {"Linear8bitLt" if "load_in_8bit" in settings else "Linear4bit"}
    assert kinds["lm_head"] == kinds["model.layers.1.mlp.up_proj"] == "Linear"
    assert not torch.equal(logits(model), before)
    model.train()
    restore_linears(model, originals)
    assert dict(model.named_modules()) == modules
    assert vars(model).keys() == state.keys()
    assert all(module.training for module in model.modules())
    assert torch.equal(logits(model.eval()), before)


def test_restore_gpt2():
    model = tiny_gpt2()
    before, modules = logits(model), dict(model.named_modules())
    restore_linears(model, swap_linears(model, BitsAndBytesConfig(**NF4)))
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model), before)


def test_swap_that_fails_half_way_changes_nothing(monkeypatch):
    model, calls = tiny(), []
    modules, quantize = dict(model.named_modules()), bnb.functional.quantize_4bit

    def fail_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("out of memory")
        return quantize(*args, **kwargs)

    monkeypatch.setattr(bnb.functional, "quantize_4bit", fail_third)
    with pytest.raises(MemoryError):
        swap_linears(model, BitsAndBytesConfig(**NF4))
    assert dict(model.named_modules()) == modules


def train(model, steps=3):
    """A few steps of training on the model's trainable parameters; returns the losses."""
    ids = token_ids(4, 16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def lora_config(**changes):
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["up_proj", "down_proj", "q_proj"]}
    return peft.LoraConfig(**(settings | changes))


@pytest.mark.parametrize("name", ["nf4-double", "int8"])
@both_dtypes
def test_qlora_on_a_finished_model(tmp_path, name, dtype):
    peft = pytest.importorskip("peft")
    model = tiny(dtype)
    finish(model, BitsAndBytesConfig(**CONFIGS[name]))
    model.save_pretrained(tmp_path / "base")
    prepared = peft.prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}, auto_clear_cache=False
    )
    adapted = peft.get_peft_model(prepared, lora_config()).train()
    assert type(adapted.base_model.model.model.layers[0].mlp.up_proj).__module__ == "peft.tuners.lora.bnb"
    losses = train(adapted, steps=5)
    assert losses[-1] < losses[0] - 0.05
    adapted.eval().save_pretrained(tmp_path / "adapter")

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base = peft.prepare_model_for_kbit_training(base, auto_clear_cache=False)
    reloaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(reloaded), logits(adapted), atol=1e-5, rtol=0)


def lora_layers(model):
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def add_by_tuner(model, name):
    from peft import LoraModel

    return LoraModel(model, lora_config(), name).unload


def add_by_transformers(model, name):
    model.add_adapter(lora_config(), name)
    return lambda: None


def add_by_injection(model, name):
    from peft import inject_adapter_in_model

    inject_adapter_in_model(lora_config(), model, name)
    return lambda: None


@pytest.mark.parametrize("add", [add_by_tuner, add_by_transformers, add_by_injection])
@both_dtypes
def test_qlora_merged_into_the_16_bit_weights(add, dtype):
    pytest.importorskip("peft")
    model = tiny(dtype)
    dense, modules = logits(model), dict(model.named_modules())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with as_4bit(model, BitsAndBytesConfig(**CONFIGS["nf4-double"])) as originals:
        unload = add(model, "heal")
        assert {type(layer).__module__ for layer in lora_layers(model).values()} == {"peft.tuners.lora.bnb"}
        losses = train(model.train())
        logits(model.eval())
        assert train(model.train())[-1] < losses[0] - 0.05
        deltas = {name: layer.get_delta_weight("heal").detach() for name, layer in lora_layers(model).items()}
        factors = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
        unload()
    model.eval()
    assert dict(model.named_modules()) == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not hasattr(model, "is_loaded_in_4bit") and not hasattr(model, "peft_config")
    assert torch.equal(logits(model), dense)

    adapted = tiny(dtype)
    add(adapted, "heal")
    adapted.load_state_dict(factors, strict=False)
    expected = logits(adapted.eval())
    with torch.no_grad():
        for name, delta in deltas.items():
            originals[name].weight += delta.to(dtype)
    assert (expected - dense).abs().max() > 0.05
    torch.testing.assert_close(logits(model), expected, atol=1e-5 if dtype == torch.float32 else 0.03, rtol=0)


def test_context_cleans_up_after_an_error_and_a_cast():
    peft = pytest.importorskip("peft")
    model = tiny(torch.bfloat16)
    modules, before = dict(model.named_modules()), logits(model)
    config = lora_config(target_modules=["up_proj", "lm_head"])
    with pytest.raises(KeyboardInterrupt), as_4bit(model, BitsAndBytesConfig(load_in_8bit=True)):
        assert model.is_loaded_in_8bit
        peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False, auto_clear_cache=False)
        peft.get_peft_model(model, config)
        raise KeyboardInterrupt
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model), before)
    assert not hasattr(model, "peft_config") and not hasattr(model, "is_loaded_in_8bit")


def test_evaluation_inside_the_context_does_not_stop_the_gradient():
    """On CPUs with AVX512-BF16, stock bitsandbytes repacks an evaluated layer and then passes no gradient back."""
    model = tiny()
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    with as_4bit(model, BitsAndBytesConfig(**NF4)):
        layer = model.model.layers[0].mlp.up_proj
        state = {key: value.clone() for key, value in layer.state_dict().items()}
        logits(model)
        entering = x.clone().requires_grad_()
        layer.train()(entering).square().sum().backward()
        assert entering.grad.abs().min() > 0
        assert all(torch.equal(value, layer.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize("shape", [(64, 128), (96, 40)], ids=["whole-blocks", "ragged-blocks"])
@all_configs
def test_stored_bits_are_the_bytes_of_the_checkpoint(tmp_path, settings, shape):
    from safetensors import safe_open

    hidden, intermediate = shape
    config = BitsAndBytesConfig(**settings)
    model = tiny_llama(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=1)
    finish(model, config)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        sizes = {key: file.get_tensor(key).nbytes for key in file.keys() if ".up_proj." in key}  # noqa: SIM118
    note = sum(sizes.pop(key) for key in list(sizes) if "quant_state" in key)
    assert sum(sizes.values()) * 8 == pytest.approx(stored_bits_per_weight(config, *shape) * hidden * intermediate)
    assert note < 200


def test_stored_bits_of_a_large_layer():
    def bits(**settings):
        return stored_bits_per_weight(BitsAndBytesConfig(**settings), 8192, 28672)

    assert bits(**NF4) == pytest.approx(4 + 32 / 64, abs=1e-4)
    assert bits(**CONFIGS["nf4-double"]) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert bits(load_in_8bit=True) == pytest.approx(8 + 32 / 8192, abs=1e-4)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"load_in_4bit": True}, TypeError, "expected a transformers.BitsAndBytesConfig, found dict"),
        (BitsAndBytesConfig(), ValueError, "quantizes nothing"),
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf5"), ValueError, "bnb_4bit_quant_type='nf5'"),
        (BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True), ValueError, "cannot be saved"),
    ],
    ids=["dict", "nothing", "unknown-type", "fp16-weight"],
)
def test_bad_configs_are_refused(config, error, message):
    for call in (lambda: finish(tiny_llama(), config), lambda: stored_bits_per_weight(config, 64, 64)):
        with pytest.raises(error, match=message):
            call()


def _adapted(model):
    model.add_adapter(lora_config())
    return model


@pytest.mark.parametrize(
    ("spoil", "settings", "error", "message"),
    [
        (lambda m: finish(m, BitsAndBytesConfig(**NF4)), {}, ValueError, "quantized already"),
        (lambda m: swap_linears(m, BitsAndBytesConfig(**NF4)), {}, ValueError, "q_proj.weight holds quantized"),
        (lambda m: m.double(), {}, TypeError, "dtype torch.float64; bitsandbytes takes"),
        (lambda m: m.model.layers[1].mlp.up_proj.to("meta"), {}, ValueError, "up_proj is offloaded"),
        (lambda m: m.model.layers[1].mlp.up_proj.weight.data.fill_(float("nan")), {}, ValueError, "holds NaN"),
        (lambda m: _adapted(m), {}, ValueError, "carries PEFT adapters"),
        (lambda m: None, {"llm_int8_skip_modules": ["up_proj"]}, ValueError, "add 'lm_head' to llm_int8_skip"),
        (lambda m: None, {"llm_int8_skip_modules": ["model", "lm_head"]}, ValueError, "found no linear layer"),
    ],
    ids=["finished", "swapped", "double", "meta", "nan", "adapters", "tied-head", "nothing-left"],
)
def test_models_that_cannot_be_quantized_are_left_alone(spoil, settings, error, message):
    model = tiny_llama(tie_word_embeddings=True, intermediate_size=128)
    spoil(model)
    modules, config = dict(model.named_modules()), model.config.to_dict()
    with pytest.raises(error, match=message):
        finish(model, BitsAndBytesConfig(**(NF4 | settings)))
    assert dict(model.named_modules()) == modules
    assert model.config.to_dict() == config


def test_missing_bitsandbytes_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r'pip install "optimum-slim\[bnb\]"'):
        finish(tiny_llama(), BitsAndBytesConfig(**NF4))
    assert stored_bits_per_weight(BitsAndBytesConfig(**NF4), 64, 64) > 4


def test_experts_left_dense_are_told(caplog):
    model = tiny_mixtral()
    finish(model, BitsAndBytesConfig(**NF4))
    assert "fused 3-D expert parameters (first: model.layers.0.mlp.experts.gate_up_proj)" in caplog.text
    assert isinstance(model.model.layers[0].self_attn.q_proj, bnb.nn.Linear4bit)
