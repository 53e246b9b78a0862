"""Checkpoints as the package onebitllms (Falcon-E) writes them: packed, bf16 after quantization, and before it.

They are made here by the equations, without that package, which needs a GPU to train.
"""

import json

import pytest
import torch
from helpers import tiny_llama, token_ids
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from optimum_slim import BitNet, SlimConfig, TernaryLinear, save
from optimum_slim._kernels import unpack_ternary


def latent(**changes):
    """A tiny Llama in bf16 as onebitllms trains it: ordinary weights, quantized in each forward."""
    return tiny_llama(**changes).to(torch.bfloat16)


def quantized(weight):
    """Codes and 1/scale of b1.58 in bf16, as the package's converters compute them."""
    inverse = 1.0 / weight.abs().mean().clamp(min=1e-5)
    return (weight * inverse).round().clamp(-1, 1), inverse


def is_packed(name):
    return name.endswith("_proj.weight")


def packed_checkpoint(folder, model):
    """What `onebitllms convert` writes: Transformers' packed bytes and 1/scale, and a sparse quantization_config."""
    from transformers.integrations.bitnet import pack_weights

    state = {}
    for name, value in model.state_dict().items():
        if is_packed(name):
            codes, inverse = quantized(value)
            state[name], state[f"{name}_scale"] = pack_weights(codes.clone()), inverse.view(1)
        else:
            state[name] = value
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "is_bitnet_config": True}
    config["quantization_config"] = {"modules_to_not_convert": ["lm_head"], "quant_method": "bitnet"}
    (folder / "config.json").write_text(json.dumps(config))
    return state


def test_packed_checkpoints_load_bit_for_bit(tmp_path, eager_bitnet):
    state = packed_checkpoint(tmp_path / "falcon", latent())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "falcon", quantization_config=SlimConfig("bitnet"))
    for name, layer in model.named_modules():
        if isinstance(layer, TernaryLinear):
            assert torch.equal(layer.weight, state[f"{name}.weight"]) and layer.reciprocal_scale
            assert torch.equal(layer.weight_scale.bfloat16(), state[f"{name}.weight_scale"])
    assert isinstance(model.model.layers[0].mlp.down_proj, TernaryLinear) and type(model.lm_head) is torch.nn.Linear
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "falcon")
    torch.testing.assert_close(model(token_ids()).logits, stock(token_ids()).logits, rtol=0.05, atol=0.05)
    out = save(model, tmp_path / "slim")
    again = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


def test_bf16_checkpoints_are_packed_without_a_loss(tmp_path):
    """`onebitllms convert_in_bf16` writes codes times scale as ordinary weights."""
    model = latent()
    expected = {}
    for name, parameter in model.named_parameters():
        if is_packed(name):
            codes, inverse = quantized(parameter.data)
            parameter.data = codes / inverse
            expected[name.removesuffix(".weight")] = parameter.data.clone(), codes
    model.save_pretrained(tmp_path / "bf16")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", quantization_config=SlimConfig("bitnet"))
    for name, (weight, codes) in expected.items():
        layer = packed.get_submodule(name)
        assert torch.equal(unpack_ternary(layer.weight, layer.out_features), codes.to(torch.int8))
        assert torch.equal(layer.dense(torch.bfloat16), weight)


def test_latent_checkpoints_are_packed_when_asked_to(tmp_path):
    """Revisions called `prequantized` hold the weights before quantization, which nothing in the files tells."""
    model = latent()
    model.save_pretrained(tmp_path / "latent")
    with pytest.raises(ValueError, match="not trained for ternary weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "latent", quantization_config=SlimConfig("bitnet"))
    config = SlimConfig(BitNet(force=True))
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "latent", quantization_config=config)
    for name, parameter in model.named_parameters():
        if is_packed(name):
            layer = packed.get_submodule(name.removesuffix(".weight"))
            weight = parameter.float()
            codes = (weight / weight.abs().mean()).round().clamp(-1, 1)  # in fp32, as their training kernel computes
            assert torch.equal(unpack_ternary(layer.weight, layer.out_features), codes.to(torch.int8))
            assert layer.scale().item() == pytest.approx(weight.abs().mean().item(), rel=1e-6)


def test_packed_biases_are_refused(tmp_path):
    """The package's converter packs biases as well, which no reader understands."""
    model = latent(attention_bias=True)
    state = packed_checkpoint(tmp_path / "biased", model)
    name = "model.layers.0.self_attn.q_proj.bias"
    state[name] = torch.zeros(16, dtype=torch.uint8)
    save_file(state, tmp_path / "biased" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"bias|mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "biased", quantization_config=SlimConfig("bitnet"))
