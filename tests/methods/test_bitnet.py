import json
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import tiny_llama, token_ids
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitNetConfig, BitNetForCausalLM

from optimum_slim import BitNet, SlimConfig, TernaryLinear, slim
from optimum_slim._kernels import pack_ternary, unpack_ternary
from optimum_slim.methods.bitnet import ternarize


# Transformers before 5.19 cannot run packed autobitlinear checkpoints itself.
STOCK_READS_AUTOBITLINEAR = Version(transformers.__version__) >= Version("5.19")


def gaussian(rows=64, columns=96, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_codes_by_hand():
    codes, gamma = ternarize(torch.tensor([[0.9, -0.1, 0.5], [-2.0, 0.4, -0.3]]))
    assert gamma.item() == pytest.approx(0.7)
    assert codes.tolist() == [[1, 0, 1], [-1, 1, 0]]


def test_codes_are_odd_and_invariant_to_positive_scaling():
    weight = gaussian()
    codes, gamma = ternarize(weight)
    assert torch.equal(ternarize(-weight)[0], -codes)
    scaled, scaled_gamma = ternarize(weight * 8)
    assert torch.equal(scaled, codes) and scaled_gamma == 8 * gamma


def test_gaussian_density_and_energy_are_those_of_the_literature():
    weight = gaussian(1000, 1000)
    codes, gamma = ternarize(weight)
    lost = (weight - gamma * codes).square().sum() / weight.square().sum()
    assert codes.abs().float().mean() == pytest.approx(0.690, abs=0.002)
    assert lost.item() == pytest.approx(0.264, abs=0.003)


def test_ternary_weights_are_recovered_exactly():
    codes = torch.randint(-1, 2, (16, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    again, gamma = ternarize(codes.float() * 0.0371)
    assert torch.equal(again, codes) and gamma == torch.tensor(0.0371)


def test_an_all_zero_matrix_packs_to_zero():
    state = BitNet().pack("layer", torch.zeros(8, 8))
    assert unpack_ternary(state["weight"], 8).abs().sum() == 0 and torch.isfinite(state["weight_scale"]).all()


def test_ordinary_weights_are_refused_naming_the_way_out():
    with pytest.raises(ValueError, match=r"layer: absmean .*PT2LLM.*force=True"):
        BitNet().pack("layer", gaussian())


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_scale_conventions(linear_class):
    weight = gaussian()
    state = BitNet(force=True, linear_class=linear_class).pack("layer", weight)
    mean = weight.abs().mean()
    assert state["weight_scale"] == (1 / mean if linear_class == "bitlinear" else mean)


def test_forward_equals_fake_quantization():
    """Integer path against b1.58's own equations in floating point."""
    weight, x = gaussian(), gaussian(5, 96, seed=1)
    layer = TernaryLinear(96, 64, bias=False, reciprocal_scale=True)
    layer.load_packed(BitNet(force=True).pack("layer", weight))
    scale = 127 / x.abs().amax(1, keepdim=True)
    x_hat = (x * scale).round().clamp(-128, 127) / scale
    gamma = weight.abs().mean()
    expected = x_hat @ ((weight / gamma).round().clamp(-1, 1) * gamma).T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)


def stock_checkpoint(folder, linear_class, dtype):
    """A checkpoint as Transformers' own bitnet format holds it, made without this package's packing."""
    from transformers.integrations.bitnet import pack_weights

    model = tiny_llama(tie_word_embeddings=True).to(dtype)
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for key in [k for k in state if k.endswith("_proj.weight")]:
        gamma = state[key].float().abs().mean()
        state[key] = pack_weights((state[key].float() / gamma).round().clamp(-1, 1))
        scale = 1 / gamma if linear_class == "bitlinear" else gamma
        state[key + "_scale"] = scale.reshape(1).to(dtype)
    model.config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": "offline",
        "modules_to_not_convert": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_stock_checkpoints_load_and_save_back_bit_for_bit(tmp_path, linear_class, dtype, eager_bitnet):
    (tmp_path / "stock").mkdir()
    state = stock_checkpoint(tmp_path / "stock", linear_class, dtype)
    config = SlimConfig("bitnet", save_format="bitnet")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", quantization_config=config, dtype=dtype)
    assert isinstance(model.model.layers[1].mlp.down_proj, TernaryLinear)

    if linear_class == "bitlinear" or STOCK_READS_AUTOBITLINEAR:
        ids = token_ids()
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=dtype)(ids).logits
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(model(ids).logits, expected, rtol=tolerance, atol=tolerance)

    model.save_pretrained(tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(back[key].to(value.dtype), value), key
    record = json.loads((tmp_path / "back/config.json").read_text())["quantization_config"]
    assert record["quant_method"] == "bitnet" and record["linear_class"] == linear_class


def test_export_loads_in_stock_transformers_in_a_process_without_this_package(dense_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        dense_folder, quantization_config=SlimConfig(BitNet(force=True), save_format="bitnet")
    )
    model.save_pretrained(tmp_path / "stock")
    torch.save({"ids": token_ids(), "logits": model(token_ids()).logits}, tmp_path / "expected.pt")
    code = (
        "import sys, torch; torch.compiler.set_stance('force_eager')\n"
        "from transformers import AutoModelForCausalLM\n"
        "expected = torch.load(sys.argv[2])\n"
        "logits = AutoModelForCausalLM.from_pretrained(sys.argv[1])(expected['ids']).logits\n"
        "assert 'optimum_slim' not in sys.modules\n"
        "torch.testing.assert_close(logits, expected['logits'], rtol=1e-5, atol=1e-5)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "stock", tmp_path / "expected.pt"], check=True, capture_output=True
    )


def tiny_bitnet():
    torch.manual_seed(0)
    return BitNetForCausalLM(
        BitNetConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=128,
            tie_word_embeddings=True,
        )
    ).eval()


def test_the_bitnet_architecture_counts_as_trained_for_ternary():
    model = tiny_bitnet()
    slim(model, "bitnet")
    assert isinstance(model.model.layers[0].mlp.down_proj, TernaryLinear)


def test_online_checkpoints_hold_latent_weights_and_are_packed_while_loading(tmp_path, eager_bitnet):
    model = tiny_bitnet()
    model.save_pretrained(tmp_path / "online")
    config = json.loads((tmp_path / "online/config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
        "modules_to_not_convert": ["lm_head"],
    }
    (tmp_path / "online/config.json").write_text(json.dumps(config))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "online")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "online", quantization_config=SlimConfig("bitnet"))
    assert isinstance(packed.model.layers[0].mlp.down_proj, TernaryLinear)
    torch.testing.assert_close(packed(token_ids()).logits, stock(token_ids()).logits, rtol=1e-4, atol=1e-4)
    packed.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(again(token_ids()).logits, packed(token_ids()).logits)


def test_packing_at_load_and_exact_codes_agree():
    codes = torch.randint(-1, 2, (8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.int8)
    assert torch.equal(BitNet().pack("layer", codes * 0.5)["weight"], pack_ternary(codes))
