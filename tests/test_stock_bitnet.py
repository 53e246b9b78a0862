"""Packed models as Transformers' own `bitnet` checkpoints, with SubLN norms where the architecture has them."""

import json
import subprocess
import sys

import pytest
import torch
from gguf_models import WIDE, round_scales, tiny_qwen2
from helpers import tiny_llama, token_ids
from transformers import AutoModelForCausalLM, BitNetForCausalLM

from optimum_slim import PT2LLM, BitNet, Depth, PackedLinear, SlimConfig, TernaryLinear, save, slim
from optimum_slim.methods.bitnet_training import BitNetTraining


TRAINING = {"steps": 2, "batch_size": 2, "warmup_steps": 0, "held_out": 0.0, "loss": "next_token"}


def trained(make=tiny_llama, **settings):
    """A model after two steps of BitNet training, with norms that are not all alike."""
    model = make()
    slim(model, BitNetTraining(**(TRAINING | {"sub_norm": True} | settings)), data=token_ids(4, 16))
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, PackedLinear) and layer.weight_norm is not None:
            layer.weight_norm.data = torch.rand(layer.in_features, generator=generator) + 0.5
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_a_llama_with_sub_norms_becomes_a_bitnet(tmp_path, tied, linear_class, eager_bitnet):
    model = trained(lambda: tiny_llama(tie_word_embeddings=tied), linear_class=linear_class)
    expected = model(token_ids()).logits
    out = save(model, tmp_path / "stock", save_format="bitnet")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "bitnet" and config["hidden_act"] == "silu"
    assert config["quantization_config"]["quant_method"] == "bitnet"
    assert "ordinary Transformers checkpoint" in (out / "README.md").read_text()
    packed = AutoModelForCausalLM.from_pretrained(out, quantization_config=SlimConfig("bitnet"))
    assert type(packed) is BitNetForCausalLM
    assert isinstance(packed.model.layers[1].mlp.down_proj, TernaryLinear)
    torch.testing.assert_close(packed(token_ids()).logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(token_ids()).logits, expected) and model.config.model_type == "llama"


def test_it_loads_in_a_process_without_this_package(tmp_path):
    model = trained()
    save(model, tmp_path / "stock", save_format="bitnet")
    torch.save({"ids": token_ids(), "logits": model(token_ids()).logits}, tmp_path / "expected.pt")
    code = (
        "import sys, torch; torch.compiler.set_stance('force_eager')\n"
        "from transformers import AutoModelForCausalLM\n"
        "expected = torch.load(sys.argv[2])\n"
        "logits = AutoModelForCausalLM.from_pretrained(sys.argv[1])(expected['ids']).logits\n"
        "assert 'optimum_slim' not in sys.modules\n"
        "torch.testing.assert_close(logits, expected['logits'], rtol=1e-5, atol=1e-5)\n"
    )
    words = [sys.executable, "-c", code, tmp_path / "stock", tmp_path / "expected.pt"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_models_without_norms_keep_their_architecture(tmp_path):
    for make in (tiny_llama, lambda: tiny_qwen2(**{"hidden_size": 64, "intermediate_size": 96})):
        model = trained(make, sub_norm=False)
        out = save(model, tmp_path / model.config.model_type, save_format="bitnet")
        assert json.loads((out / "config.json").read_text())["model_type"] == model.config.model_type
        again = AutoModelForCausalLM.from_pretrained(out, quantization_config=SlimConfig("bitnet"))
        torch.testing.assert_close(again(token_ids()).logits, model(token_ids()).logits, rtol=1e-5, atol=1e-5)


def test_models_that_lost_layers_are_exported(tmp_path):
    model = tiny_llama(num_hidden_layers=3)
    slim(model, [Depth(layers=[1]), BitNet(force=True)])
    out = save(model, tmp_path / "stock", save_format="bitnet")
    again = AutoModelForCausalLM.from_pretrained(out, quantization_config=SlimConfig("bitnet"))
    torch.testing.assert_close(again(token_ids()).logits, model(token_ids()).logits, rtol=1e-5, atol=1e-5)


def pt2llm():
    model = tiny_llama()
    slim(model, PT2LLM(rounds=0), data=token_ids(4, 32))
    return model


def changed(change, make=tiny_llama, **settings):
    model = trained(make, **settings)
    change(model)
    return model


REFUSED = {
    "not packed": (tiny_llama, "holds ternary weights packed by BitNet, and this model has none"),
    "other steps": (pt2llm, r"one scale per matrix, as BitNet makes them; the recipe is \['pt2llm'\]"),
    "signs": (lambda: trained(variant="b1"), r"the recipe is \['bitnet_training'\]"),
    "dense activations": (lambda: trained(activation_bits=None), "always rounds activations to 8 bits"),
    "Qwen": (
        lambda: trained(lambda: tiny_qwen2(hidden_size=64, intermediate_size=96)),
        "the model is a qwen2, and only a Llama has",
    ),
    "biases": (lambda: trained(lambda: tiny_llama(mlp_bias=True)), r"biases \(mlp_bias\)"),
    "wide heads": (lambda: trained(lambda: tiny_llama(head_dim=32)), "not as wide as its hidden states"),
    "some without": (
        lambda: trained(modules_to_not_convert=("layers.1.mlp.down_proj",)),
        r"no others; model\.layers\.1\.mlp\.down_proj has none",
    ),
    "another eps": (lambda: trained(norm_eps=1e-3), "do not share one eps, rms_norm_eps=1e-06"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_format_cannot_hold_is_refused(tmp_path, name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        save(make(), tmp_path / "stock", save_format="bitnet")
    assert list(tmp_path.iterdir()) == []


def test_llama_cpp_has_the_architecture_too(tmp_path):
    pytest.importorskip("gguf")
    from optimum_slim import export_gguf, load_gguf

    model = trained(lambda: tiny_llama(**WIDE, tie_word_embeddings=True))
    round_scales(model)
    written = export_gguf(model, tmp_path / "m.gguf")
    assert written.types == {"F32": 10, "TQ2_0": 14}
    again = load_gguf(written.path)
    assert type(again) is BitNetForCausalLM
    torch.testing.assert_close(again(token_ids()).logits, model(token_ids()).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"bitnet computes something else.*an output head of its own"):
        export_gguf(trained(lambda: tiny_llama(**WIDE)), tmp_path / "head.gguf")
    with pytest.raises(ValueError, match=r"hidden_act='relu2', where llama\.cpp computes silu"):
        export_gguf(trained(lambda: tiny_llama(**WIDE, hidden_act="relu2")), tmp_path / "act.gguf")
