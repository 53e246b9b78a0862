"""The dry run: parameters, bytes and FLOPs counted by hand, and against a model that is really made."""

import json
import resource

import pytest
import torch
from helpers import tiny_llama, tiny_mixtral
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from optimum_slim import SlimConfig
from optimum_slim.cli import main
from optimum_slim.evaluate import logical_parameters
from optimum_slim.flops import flops_per_token
from optimum_slim.packed import model_bytes
from optimum_slim.plan import plan


LAYERS = 6
HIDDEN, FFN, KEYS, VOCABULARY = 64, 96, 32, 128
LAYER = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * FFN  # weights of the linear layers in one decoder layer
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
DEEPEST = {"step": "depth", "drop": 0.5, "metric": "deepest"}


def meta(config, dtype=torch.float32):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def meta_llama(dtype=torch.float32, **changes):
    return meta(tiny_llama(num_hidden_layers=LAYERS, **changes).config, dtype)


def printed(plan, capsys) -> str:
    plan.show()
    return capsys.readouterr().out


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied head"])
def test_flops_of_a_llama_by_hand(tied):
    flops = flops_per_token(meta_llama(tie_word_embeddings=tied), context=50)
    assert flops.products == 2 * (LAYERS * LAYER + HIDDEN * VOCABULARY)
    assert flops.attention == LAYERS * 2 * (HIDDEN + HIDDEN) * 50
    assert flops.context == 50 and flops.experts == ""
    assert flops_per_token(meta_llama(), context=10**6).context == 128


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_llama(num_hidden_layers=LAYERS, attn_implementation="eager")
    length = 32
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    flops = flops_per_token(model, context=length)
    angles = 2 * (HIDDEN // 4 // 2)  # older Transformers make the rotary angles by a product
    assert counter.get_total_flops() - length * (flops.products + flops.attention) in (0, length * angles)


def test_flops_of_a_packed_layer_are_those_of_the_dense_one():
    dense, packed = meta_llama(), meta_llama()
    plan(packed, SlimConfig([{"step": "bitnet", "force": True}]))
    assert flops_per_token(packed) == flops_per_token(dense)


def test_only_active_experts_count():
    model = tiny_mixtral()
    experts = 3 * 32 * 32
    attention = 4 * 32 * 32
    flops = flops_per_token(model)
    assert flops.products == 2 * (2 * experts + attention + 32 * 4 + 32 * 64)
    assert flops.experts == "2 of 4 experts, those active for a token"
    model.config.num_experts_per_tok = 0
    assert flops_per_token(model).products == 2 * (4 * experts + attention + 32 * 4 + 32 * 64)
    assert flops_per_token(model).experts == "all experts, though fewer are active"


def test_sliding_windows_see_less():
    config = LlamaConfig.from_dict(tiny_llama(num_hidden_layers=LAYERS).config.to_dict())
    whole = flops_per_token(meta(config), context=100).attention
    model = meta(config)
    model.config.sliding_window = 10
    model.config.layer_types = ["full_attention", "sliding_attention"] * (LAYERS // 2)
    assert flops_per_token(model, context=100).attention == whole // 2 + whole // 20


def test_dropped_layers_are_named_and_counted(capsys):
    result = plan(meta_llama(), SlimConfig([DEEPEST]))
    assert result.steps == [("depth", "drops 3 of 6 decoder layers: 2 to 4")]
    assert result.parameters_before - result.parameters_after == 3 * (LAYER + 2 * HIDDEN)
    assert result.bytes_before - result.bytes_after == 4 * 3 * (LAYER + 2 * HIDDEN)
    assert result.flops_before.products - result.flops_after.products == 2 * 3 * LAYER
    assert result.flops_after.attention * 2 == result.flops_before.attention
    assert result.peak_memory == result.bytes_after
    text = printed(result, capsys)
    assert "depth: drops 3 of 6 decoder layers: 2 to 4" in text and "nominal" not in text
    assert f"parameters {result.parameters_before:,} -> {result.parameters_after:,}" in text


def test_layers_that_data_will_choose_are_only_counted():
    result = plan(meta_llama(), SlimConfig([{"step": "depth", "drop": 2}]))
    what = "drops 2 of 6 decoder layers; which ones is chosen on the calibration data by angular"
    assert result.steps == [("depth", what)]
    assert result.peak_memory == result.bytes_before and "a batch of calibration samples" in result.peak_memory_of
    named = plan(meta_llama(), SlimConfig([{"step": "depth", "layers": [0, 2, 3]}]))
    assert named.steps == [("depth", "drops 3 of 6 decoder layers: 0, 2, 3")]


def test_healing_changes_no_sizes():
    result = plan(meta_llama(), SlimConfig([DEEPEST, "heal"]))
    assert result.steps[1] == ("heal", "changes values, not sizes")
    assert "training adds what it trains" in result.notes[0]
    assert result.bytes_after == plan(meta_llama(), SlimConfig([DEEPEST])).bytes_after


def test_four_bits_of_what_is_left(capsys):
    model = meta_llama(torch.bfloat16)
    result = plan(model, SlimConfig([DEEPEST], then=NF4))
    left = LAYERS - 3
    norms = (2 * left + 1) * HIDDEN
    dense = 2 * HIDDEN * VOCABULARY + norms
    stored = left * (LAYER * (4 + 32 / 64) + 7 * 16 * 32) / 8  # an fp32 for 64 weights, 16 fp32 levels for a layer
    assert result.parameters_after == left * LAYER + dense
    assert result.bytes_after == 2 * dense + stored
    assert result.nominal_bytes == result.parameters_after // 2
    assert {step for step, *_ in result.touched} == {"bitsandbytes nf4"} and len(result.touched) == 7 * left
    assert {why for _, _, why in result.dense} == {"embedding", "output head"}
    assert result.peak_memory == 2 * result.parameters_after
    text = printed(result, capsys)
    assert "nominal memory" in text and "bitsandbytes nf4, 4." in text


@pytest.mark.parametrize(
    "fields",
    [
        {"load_in_4bit": True},
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        {"load_in_8bit": True},
        {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "q_proj"]},
    ],
    ids=["fp4", "double", "int8", "skipped"],
)
def test_quantized_sizes_are_those_of_the_files(tmp_path, fields):
    pytest.importorskip("bitsandbytes")
    from safetensors import safe_open

    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(**fields)
    deeper = tiny_llama(num_hidden_layers=3).config
    recipe = SlimConfig([{"step": "depth", "layers": [1]}], then=config)
    foretold = plan(meta(deeper, torch.bfloat16), recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    stored = sum(t.numel() * t.element_size() for name, t in tensors.items() if "quant_state" not in name)
    assert foretold.bytes_after == stored


def test_the_plan_is_what_the_run_makes(dense_folder):
    config = LlamaConfig.from_pretrained(dense_folder)
    recipe = SlimConfig([{"step": "depth", "layers": [0]}, {"step": "bitnet", "force": True}])
    foretold = plan(meta(config), recipe)
    made = AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=recipe)
    assert foretold.bytes_after == model_bytes(made)
    assert foretold.parameters_after == logical_parameters(made)
    assert foretold.flops_after == flops_per_token(made)


def test_fused_experts_stay_dense_and_that_is_said():
    model = meta(tiny_mixtral().config, torch.bfloat16)
    result = plan(model, SlimConfig([{"step": "heal", "loss": "next_token"}], then=NF4))
    assert len(result.touched) == 4
    assert "2 fused 3-D expert parameters stay dense" in result.notes[0]


LLAMA_2_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
}


def test_half_of_llama_2_70b_in_four_bits_from_its_config_alone(tmp_path, capsys):
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_2_70B))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    words = ["--step", "depth", "drop=0.5", "metric=deepest", "--then", "load_in_4bit=true", "--dry-run"]
    assert main(["run", str(folder), str(tmp_path / "out"), *words]) == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 500_000
    text = capsys.readouterr().out
    assert "depth: drops 40 of 80 decoder layers: 39 to 78" in text
    assert "parameters 68,976,648,192 -> 34,750," in text
    assert "nominal memory 17.38 GB: 4 bits" in text and "stored memory 20.30 GB" in text
    assert "FLOPs per token 1.37e+11 -> 6.9e+10" in text
    assert "full context of 4,096 tokens adds 1.07e+10 -> 5.37e+09" in text
    assert not (tmp_path / "out").exists()


def test_a_config_without_a_dtype_is_counted_at_16_bits_and_says_so(tmp_path, capsys):
    config = tiny_llama().config.to_dict() | {"dtype": None}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    assert main(["run", str(tmp_path), "unused", "--step", "bitnet", "force=true", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "names no dtype; dense weights are counted at 16 bits" in text
    assert main(["run", str(tmp_path), "unused", "--step", "bitnet", "--dtype", "float32", "--dry-run"]) == 0
    assert "names no dtype" not in capsys.readouterr().out
