import json
import subprocess
import sys

import pytest
import torch
from helpers import tiny_llama, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_slim import PT2LLM, BitNet, Calibration, SlimConfig, TernaryLinear, slim


CALIBRATION = Calibration(source=token_ids(4, 32))
RECIPES = {
    "bitnet": lambda: SlimConfig(BitNet(force=True)),
    "bitnet-weight-only": lambda: SlimConfig(BitNet(force=True, activation_bits=None)),
    "pt2llm": lambda: SlimConfig(PT2LLM(group_size=32), calibration=CALIBRATION),
    "bitnet-then-pt2llm": lambda: SlimConfig(
        [BitNet(force=True, modules_to_not_convert=("mlp",)), PT2LLM(group_size=32)], calibration=CALIBRATION
    ),
}

FRESH = """
import sys, torch, optimum_slim
from transformers import AutoModelForCausalLM
folder, ids, out = sys.argv[1:]
torch.save(AutoModelForCausalLM.from_pretrained(folder)(torch.load(ids)).logits, out)
"""


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_one_line_save_reload_in_a_fresh_process(dense_folder, tmp_path, recipe):
    model = load(dense_folder, quantization_config=recipe())
    ids = token_ids()
    logits = model(ids).logits
    model.save_pretrained(tmp_path / "slim", max_shard_size="20KB")
    assert len(list((tmp_path / "slim").glob("*.safetensors"))) > 1

    torch.save(ids, tmp_path / "ids.pt")
    arguments = [str(tmp_path / "slim"), str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", FRESH, *arguments], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_slim_in_memory_equals_slim_while_loading(dense_folder, recipe):
    loaded = load(dense_folder, quantization_config=recipe())
    model = tiny_llama()
    config = recipe()
    slim(model, list(config.steps), data=config.calibration)
    expected = loaded.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert model.config.quantization_config == loaded.config.quantization_config


def test_saved_again_after_reload_the_files_are_the_same(dense_folder, tmp_path):
    load(dense_folder, quantization_config=RECIPES["bitnet"]()).save_pretrained(tmp_path / "a")
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "a/config.json").read_text()) == json.loads((tmp_path / "b/config.json").read_text())


def test_the_file_is_really_small(tmp_path):
    model = tiny_llama(hidden_size=256, intermediate_size=512).to(torch.bfloat16)
    linears = sum(m.weight.numel() for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear))
    model.save_pretrained(tmp_path / "dense")
    load(tmp_path / "dense", quantization_config=RECIPES["bitnet"]()).save_pretrained(tmp_path / "slim")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("dense", "slim")]
    saved = sizes[0] - sizes[1]
    assert saved > 0.98 * linears * (2 - 0.25)


def test_tied_embeddings_and_generation_config_survive(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "dense")
    load(tmp_path / "dense", quantization_config=RECIPES["bitnet"]()).save_pretrained(tmp_path / "slim")
    reloaded = load(tmp_path / "slim")
    assert "lm_head.weight" not in load_file(tmp_path / "slim/model.safetensors")
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert reloaded.generation_config.max_new_tokens == 7
    assert reloaded.generate(token_ids(1, 3), do_sample=False).shape == (1, 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_models(dense_folder, tmp_path, dtype):
    model = load(dense_folder, dtype=dtype, quantization_config=RECIPES["pt2llm"]())
    logits = model(token_ids()).logits
    assert logits.dtype == dtype and torch.isfinite(logits).all()
    model.save_pretrained(tmp_path / "slim")
    assert torch.equal(load(tmp_path / "slim", dtype=dtype)(token_ids()).logits, logits)


def test_scales_come_back_frozen_and_in_full_precision(dense_folder, tmp_path):
    load(dense_folder, quantization_config=RECIPES["bitnet"]()).save_pretrained(tmp_path / "slim")
    layer = load(tmp_path / "slim", dtype=torch.bfloat16).model.layers[0].mlp.up_proj
    assert layer.weight_scale.dtype == torch.float32
    assert not layer.weight_scale.requires_grad and not layer.weight.requires_grad


def test_dequantize_gives_an_ordinary_checkpoint(dense_folder, tmp_path):
    model = load(dense_folder, quantization_config=SlimConfig(BitNet(force=True, activation_bits=None)))
    logits = model(token_ids()).logits
    model.dequantize()
    torch.testing.assert_close(model(token_ids()).logits, logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "dense_again")
    config = json.loads((tmp_path / "dense_again/config.json").read_text())
    assert "quantization_config" not in config
    stock = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    subprocess.run([sys.executable, "-c", stock, tmp_path / "dense_again"], check=True, capture_output=True)


def test_without_the_plugin_loading_fails_loudly(dense_folder, tmp_path):
    load(dense_folder, quantization_config=RECIPES["bitnet"]()).save_pretrained(tmp_path / "slim")
    stock = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", stock, tmp_path / "slim"], capture_output=True, text=True)
    assert done.returncode != 0 and "ignore_mismatched_sizes" in done.stderr


def test_config_and_quantizer_share_one_record(dense_folder):
    model = load(dense_folder, quantization_config=RECIPES["bitnet"]())
    assert model.hf_quantizer.quantization_config is model.config.quantization_config
    assert model.is_quantized and model.quantization_method == "slim"


def test_users_config_object_is_not_changed(dense_folder):
    config = SlimConfig(BitNet(force=True))
    load(dense_folder, quantization_config=config)
    assert config.steps == (BitNet(force=True),)


def test_passing_a_config_for_a_slim_checkpoint_keeps_the_checkpoints_own(dense_folder, tmp_path):
    load(dense_folder, quantization_config=RECIPES["bitnet"]()).save_pretrained(tmp_path / "slim")
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = load(tmp_path / "slim", quantization_config=SlimConfig("pt2llm"))
    assert isinstance(again.config.quantization_config.steps[0], BitNet)


def test_lora_trains_over_packed_layers(dense_folder):
    peft = pytest.importorskip("peft")
    model = load(dense_folder, quantization_config=RECIPES["pt2llm"]())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    ids = token_ids()
    adapted(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert len(gradients) == 14 and all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_device_map_auto_counts_packed_sizes(dense_folder):
    model = load(dense_folder, device_map="auto", quantization_config=RECIPES["bitnet"]())
    assert isinstance(model.model.layers[0].mlp.up_proj, TernaryLinear)


def test_a_step_that_packs_nothing_leaves_a_plain_model(dense_folder, tmp_path, monkeypatch):
    from dataclasses import dataclass

    import optimum_slim.step
    from optimum_slim import Step, StepReport, register

    monkeypatch.setattr(optimum_slim.step, "STEPS", dict(optimum_slim.step.STEPS))

    @register("halve", paper="none")
    @dataclass(frozen=True, kw_only=True)
    class Halve(Step):
        def apply(self, model, tokens=None, *, teacher=None, journal=None):
            model.lm_head.weight.mul_(0.5)
            return StepReport(self.to_dict(), 0.0)

    model = load(dense_folder, quantization_config=SlimConfig([Halve()]))
    assert torch.equal(model.lm_head.weight, tiny_llama().lm_head.weight * 0.5)
    model.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert "quantization_config" not in config and config["slim"] == [{"step": "halve"}]


def test_damaged_checkpoints_are_refused_before_loading(dense_folder, tmp_path):
    load(dense_folder, quantization_config=RECIPES["bitnet"]()).save_pretrained(tmp_path / "slim")
    file = tmp_path / "slim/model.safetensors"
    good = load_file(file)
    key = "model.layers.0.mlp.up_proj.weight"

    save_file(good | {key: good[key][:-1].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{key} is U8 \(23, 64\).*needs torch.uint8 \(24, 64\)"):
        load(tmp_path / "slim")

    save_file({k: v for k, v in good.items() if k != key + "_scale"}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"holds no {key}_scale"):
        load(tmp_path / "slim")


def test_bytes_before_count_tied_weights_once(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "dense")
    loaded = load(tmp_path / "dense", quantization_config=RECIPES["bitnet"]())
    assert loaded.slim_report.sizes["before"] == 4 * sum(p.numel() for p in model.parameters())
