"""drop_layers() must leave a model that skips the layers, and whose config and checkpoint say the same."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from helpers import tiny_llama
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_slim import BitNet
from optimum_slim.surgery import cut_config, drop_layers, from_checkpoint_names, to_checkpoint_names
from optimum_slim.walk import decoder_layers


FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MIXED = {"sliding_window": 5, "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL]}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 2,
}
GATED_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": [LINEAR, LINEAR, FULL, LINEAR, FULL, LINEAR],
}
GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64, "eos_token_id": None}
GPT_NEO = SHAPE | {"num_layers": 6, "num_heads": 4, "attention_types": [[["global", "local"], 3]], "window_size": 5}
GEMMA3N = SHAPE | MIXED | {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 97, "intermediate_size": [48] * 6}
ONE_BLOCK, SCATTERED = (2, 3), (0, 3, 5)

# name: (model type, settings, layers to drop)
CASES = {
    "llama": ("llama", SHAPE, ONE_BLOCK),
    "llama-first-last": ("llama", SHAPE, (5, 0)),
    "qwen2-window": ("qwen2", SHAPE | MIXED | {"use_sliding_window": True, "max_window_layers": 2}, (2, 5)),
    "qwen3": ("qwen3", SHAPE, SCATTERED),
    "gemma2": ("gemma2", SHAPE | MIXED, SCATTERED),
    "gemma3": ("gemma3_text", SHAPE | MIXED, SCATTERED),
    "gemma3-full-only": ("gemma3_text", SHAPE | MIXED, (0, 1, 3, 4)),
    "smollm3": ("smollm3", SHAPE | {"no_rope_layers": [1, 1, 0, 1, 0, 1]}, SCATTERED),
    "phi3": ("phi3", SHAPE, ONE_BLOCK),
    "phi": ("phi", SHAPE, ONE_BLOCK),
    "opt": ("opt", SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32}, SCATTERED),
    "gpt2": ("gpt2", GPT, SCATTERED),
    "gpt_neo": ("gpt_neo", GPT_NEO, (1, 2)),
    "gpt_neox": ("gpt_neox", SHAPE, ONE_BLOCK),
    "gptj": ("gptj", GPT | {"rotary_dim": 8}, ONE_BLOCK),
    "falcon": ("falcon", {k: v for k, v in SHAPE.items() if k != "head_dim"}, SCATTERED),
    "bloom": ("bloom", SHAPE | {"n_head": 4}, SCATTERED),
    "mpt": ("mpt", SHAPE | {"d_model": 32, "n_heads": 4, "n_layers": 6, "max_seq_len": 64}, ONE_BLOCK),
    "mamba": ("mamba", SHAPE | {"state_size": 4}, SCATTERED),
    "mixtral": ("mixtral", SHAPE | EXPERTS, ONE_BLOCK),
    "qwen3_moe": ("qwen3_moe", SHAPE | EXPERTS | {"mlp_only_layers": [1, 3, 4]}, SCATTERED),
    "qwen3_moe-in-step": ("qwen3_moe", SHAPE | EXPERTS | {"decoder_sparse_step": 2}, ONE_BLOCK),
    "deepseek_v3": ("deepseek_v3", SHAPE | DEEPSEEK, SCATTERED),
    "qwen3_next": ("qwen3_next", SHAPE | EXPERTS | GATED_DELTA, (1, 2)),
    "jamba-in-step": (
        "jamba",
        SHAPE | EXPERTS | {"attn_layer_period": 4, "attn_layer_offset": 1, "use_mamba_kernels": False},
        (4, 5),
    ),
}
# name: (model type, settings, layers to drop, what the error must name)
REFUSED = {
    "gpt2-scaled": ("gpt2", GPT | {"scale_attn_by_inverse_layer_idx": True}, (2,), "scale_attn_by_inverse_layer_idx"),
    "qwen3_moe": ("qwen3_moe", SHAPE | EXPERTS | {"decoder_sparse_step": 2}, (2,), "decoder_sparse_step = 2"),
    "jamba": (
        "jamba",
        SHAPE | EXPERTS | {"attn_layer_period": 3, "attn_layer_offset": 1},
        (1,),
        "attn_layer_period = 3",
    ),
    "diffllama": ("diffllama", SHAPE, (0,), r"layers\.1\.self_attn\.lambda_init"),
    "rwkv": ("rwkv", SHAPE | {"attention_hidden_size": 32}, (2,), "rescale_every = 6"),
    "gemma3n-stored": ("gemma3n_text", GEMMA3N, (3,), "num_kv_shared_layers = 2"),
    "gemma3n-embedded": ("gemma3n_text", GEMMA3N, (0,), "num_kv_shared_layers = 2"),
    "last-bias": ("gpt_neox_japanese", SHAPE | {"intermediate_multiple_size": 2}, (5,), "dense_bias"),
}


def tiny_model(model_type, settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **copy.deepcopy(settings))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "conv" not in name and "A_log" not in name:
                parameter.normal_(std=0.2)
    return model


class Skip(nn.Module):
    """Stands for a decoder layer and hands the hidden states through."""

    def __init__(self, layer, returns_tuple):
        super().__init__()
        self.returns_tuple = returns_tuple
        self.__dict__.update({k: v for k, v in vars(layer).items() if k in ("attention_type", "layer_type")})

    def forward(self, hidden_states, *args, **kwargs):
        return (hidden_states, None) if self.returns_tuple else hidden_states


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def skipping_logits(model, tokens, drop):
    """Logits of a copy of the model in which the layers `drop` do nothing."""
    model = copy.deepcopy(model)
    stack = decoder_layers(model)[1]
    kinds = []
    handle = stack[0].register_forward_hook(lambda module, args, output: kinds.append(isinstance(output, tuple)))
    logits(model, tokens)
    handle.remove()
    for i in drop:
        stack[i] = Skip(stack[i], kinds[0])
    return logits(model, tokens)


def generated(model, tokens, **settings):
    return model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0, **settings)


def state(model):
    """All that must not change when a cut is refused."""
    attributes = {
        name: {k: repr(v) for k, v in vars(module).items() if k[0] != "_" and k != "config"}
        for name, module in model.named_modules()
    }
    return copy.deepcopy(model.config.to_dict()), attributes, [(name, id(m)) for name, m in model.named_modules()]


@pytest.fixture
def tokens():
    return torch.randint(1, 97, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_cut_model_skips_the_layers_and_reloads_as_it_is(case, tokens, tmp_path):
    model_type, settings, drop = CASES[case]
    model = tiny_model(model_type, settings)
    layers = list(decoder_layers(model)[1])
    expected = skipping_logits(model, tokens, drop)
    parameters = model.num_parameters() - sum(p.numel() for i in drop for p in layers[i].parameters())
    before = [{k: repr(v) for k, v in vars(m).items()} for i in drop for m in layers[i].modules()]

    kept = drop_layers(model, drop)

    assert kept == tuple(i for i in range(6) if i not in drop)
    assert [id(layer) for layer in decoder_layers(model)[1]] == [id(layers[i]) for i in kept]
    assert torch.equal(logits(model, tokens), expected)
    assert torch.equal(generated(model, tokens), generated(model, tokens, use_cache=False))
    assert model.num_parameters() == parameters
    for j, layer in enumerate(decoder_layers(model)[1]):
        assert {m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")} <= {j}
    removed = [{k: repr(v) for k, v in vars(m).items()} for i in drop for m in layers[i].modules()]
    assert [m.keys() for m in removed] == [m.keys() for m in before]
    assert [{k: v for k, v in m.items() if k != "config"} for m in removed] == [
        {k: v for k, v in m.items() if k != "config"} for m in before
    ]

    model.save_pretrained(tmp_path)
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert reloaded.num_parameters() == parameters
    assert torch.equal(logits(reloaded, tokens), expected)
    assert torch.equal(generated(reloaded, tokens), generated(model, tokens))
    reloaded.config.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_config_cannot_express_is_refused_by_name_before_any_change(case):
    model_type, settings, drop, named = REFUSED[case]
    model = tiny_model(model_type, settings)
    before = state(model)
    with pytest.raises(ValueError, match=named):
        drop_layers(model, drop)
    assert state(model) == before


@pytest.mark.parametrize(
    ("drop", "found"),
    [
        ((6,), r"from 0 to 5 for 6 layers, found \[6\]"),
        ((-1,), r"found \[-1\]"),
        ((True,), r"found \[True\]"),
        ((1.0,), r"found \[1.0\]"),
        ((2, 2), r"once, found \[2, 2\]"),
        (range(6), "All 6 decoder layers"),
    ],
)
def test_layers_that_do_not_exist_are_refused(drop, found):
    model = tiny_llama(num_hidden_layers=6)
    before = state(model)
    with pytest.raises(ValueError, match=found):
        drop_layers(model, drop)
    with pytest.raises(ValueError, match=found):
        cut_config(model.config, drop)
    assert state(model) == before
    assert drop_layers(model, ()) == tuple(range(6)) and state(model) == before


def test_models_of_other_kinds_are_refused():
    config = AutoConfig.for_model(
        "t5", d_model=16, d_ff=16, d_kv=8, num_layers=2, num_decoder_layers=2, num_heads=2, vocab_size=32
    )
    with pytest.raises(ValueError, match="T5Config describes an encoder-decoder model"):
        drop_layers(AutoModelForSeq2SeqLM.from_config(config), (0,))
    with pytest.raises(ValueError, match="not from a Sequential"):
        drop_layers(nn.Sequential(tiny_llama()), (0,))


def test_cut_config_leaves_the_original_alone():
    settings = SHAPE | EXPERTS | {"mlp_only_layers": [1, 4], "use_sliding_window": True, "max_window_layers": 3}
    config = AutoConfig.for_model("qwen3_moe", **settings)
    before = copy.deepcopy(config.to_dict())
    cut = cut_config(config, [0, 4])
    assert config.to_dict() == before
    assert (cut.num_hidden_layers, cut.mlp_only_layers, cut.max_window_layers) == (4, [0], 2)
    llama4 = cut_config(
        AutoConfig.for_model("llama4_text", num_hidden_layers=8, interleave_moe_layer_step=2), [1, 2, 3]
    )
    assert llama4.moe_layers == [2, 4] and llama4.no_rope_layers == [1, 1, 1, 1, 0] and len(llama4.layer_types) == 5


def test_cut_config_refuses_settings_it_does_not_know_and_sources_that_go():
    config = LlamaConfig(num_hidden_layers=4, special_layers=[1, 3])
    with pytest.raises(ValueError, match=r"special_layers = \[1, 3\]"):
        cut_config(config, [0])
    config = LlamaConfig(num_hidden_layers=4, indexer_types=["full", "full", "shared", "shared"])
    with pytest.raises(ValueError, match="indexer_types, layer 2 reuses what layer 1 computes"):
        cut_config(config, [1])
    assert cut_config(config, [0, 2]).indexer_types == ["full", "shared"]
    config = LlamaConfig(num_hidden_layers=4, kv_source_layers=[0, 0, 2, 2])
    with pytest.raises(ValueError, match="kv_source_layers, layer 3 reuses what layer 2 computes"):
        cut_config(config, [2])
    assert cut_config(config, [0, 1]).kv_source_layers == [0, 0]


def test_text_part_of_a_larger_model(tokens, tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3", text_config=SHAPE | MIXED, vision_config=vision | {"image_size": 28, "patch_size": 14}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    text, seen = model.config.text_config, decoder_layers(model)[1]
    expected = skipping_logits(model, tokens, (0, 2))
    drop_layers(model, (0, 2))
    assert model.config.text_config is text and decoder_layers(model)[1] is seen
    assert text.num_hidden_layers == 4 and text.layer_types == [SLIDING, SLIDING, SLIDING, FULL]
    assert model.config.vision_config.num_hidden_layers == 6
    assert torch.equal(logits(model, tokens), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), tokens), expected)


def test_image_features_entering_by_layer_index_hold_these_layers():
    vision = {"depth": 4, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = AutoConfig.for_model(
        "qwen3_vl", text_config=SHAPE, vision_config=vision | {"deepstack_visual_indexes": [0, 1, 2]}
    )
    with pytest.raises(ValueError, match="deepstack"):
        cut_config(config, [2])
    assert cut_config(config, [3, 4]).text_config.num_hidden_layers == 4


def test_packed_and_adapted_layers_stay_as_they_are(tokens):
    """The checks look at what a layer is by its config, not at what it has become."""
    for model_type in ("llama", "gpt2"):
        model = tiny_model(model_type, CASES[model_type][1])
        BitNet(force=True).resolve(model).apply(model, None)
        expected = skipping_logits(model, tokens, (1, 4))
        drop_layers(model, (1, 4))
        assert torch.equal(logits(model, tokens), expected)
        assert not any(type(m) in (nn.Linear, Conv1D) for m in decoder_layers(model)[1].modules())


def test_lora_layers_stay_as_they_are(tokens):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama", SHAPE)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"))
    expected = skipping_logits(model, tokens, (1, 4))
    with pytest.raises(ValueError, match="get_base_model"):
        drop_layers(adapted, (1, 4))
    drop_layers(adapted.get_base_model(), (1, 4))
    assert torch.equal(logits(adapted, tokens), expected)


def test_loaded_model_with_names_and_quantization_in_its_config(tokens):
    model = tiny_model("llama", SHAPE)
    model.config._name_or_path = "somewhere/else"
    model.config.quantization_config = {"quant_method": "unknown"}
    model.config.slim = ["kept"]
    config = model.config
    drop_layers(model, (1,))
    assert model.config is config and all(m.config is config for m in model.modules() if hasattr(m, "config"))
    assert config.quantization_config == {"quant_method": "unknown"} and config._name_or_path == "somewhere/else"
    assert config.slim == ["kept"] and config.num_hidden_layers == 5


def test_checks_leave_no_trace_in_the_process():
    model = tiny_llama(num_hidden_layers=4).to(torch.bfloat16)
    random, dtype = torch.get_rng_state(), torch.get_default_dtype()
    drop_layers(model, (1,))
    assert torch.equal(torch.get_rng_state(), random) and torch.get_default_dtype() == dtype
    assert torch.empty(1).device.type == "cpu"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_twice_cut_is_cut_once(tokens):
    twice, once = (tiny_model("gemma3_text", SHAPE | MIXED) for _ in range(2))
    drop_layers(twice, (0, 3))
    drop_layers(twice, (1,))
    drop_layers(once, (0, 2, 3))
    assert twice.config.to_dict() == once.config.to_dict()
    assert torch.equal(logits(twice, tokens), logits(once, tokens))


def test_device_map_follows():
    model = tiny_llama(num_hidden_layers=4)
    model.hf_device_map = {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": 1,
        "model.layers.3.mlp": "cpu",
    }
    drop_layers(model, (1,))
    assert model.hf_device_map == {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.2.mlp": "cpu"}


class CutConfig(QuantizationConfigMixin):
    """Asks `CutOnLoad` to leave out the layers `drop`."""

    def __init__(self, drop=(), **kwargs):
        self.quant_method, self.drop = "cut_in_test", list(drop)


class CutOnLoad(HfQuantizer):
    """Drops layers while a checkpoint is loading, as the Depth step does."""

    requires_calibration = False
    is_trainable = True

    def is_serializable(self):
        return True

    def _process_model_before_weight_loading(self, model, **kwargs):
        self.kept = drop_layers(model, self.quantization_config.drop)
        self.patterns = model._keys_to_ignore_on_load_unexpected
        to_checkpoint_names(model, self.kept)

    def _process_model_after_weight_loading(self, model, **kwargs):
        from_checkpoint_names(model, self.kept)
        assert model._keys_to_ignore_on_load_unexpected is self.patterns
        self.remove_quantization_config(model)


@pytest.fixture
def cut_on_load():
    register_quantization_config("cut_in_test")(CutConfig)
    register_quantizer("cut_in_test")(CutOnLoad)
    yield CutConfig
    del AUTO_QUANTIZATION_CONFIG_MAPPING["cut_in_test"], AUTO_QUANTIZER_MAPPING["cut_in_test"]


@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma3", "opt", "mixtral", "deepseek_v3", "qwen3_moe"])
def test_layers_left_out_while_loading(case, tokens, tmp_path, cut_on_load):
    model_type, settings, drop = CASES[case]
    model = tiny_model(model_type, settings)
    model.save_pretrained(tmp_path)
    drop_layers(model, drop)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=cut_on_load(drop), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert loaded.config.num_hidden_layers == 6 - len(drop)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert torch.equal(generated(loaded, tokens), generated(model, tokens, use_cache=False))


@pytest.mark.parametrize("saved", ["whole", "base"])
def test_layers_left_out_of_a_checkpoint_with_other_prefixes(saved, tokens, tmp_path, cut_on_load):
    model = tiny_model("llama", SHAPE | {"tie_word_embeddings": True})
    (model.model if saved == "base" else model).save_pretrained(tmp_path)
    other = LlamaForCausalLM if saved == "base" else LlamaModel
    loaded, info = other.from_pretrained(tmp_path, quantization_config=cut_on_load([1, 4]), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    drop_layers(model, [1, 4])
    same = getattr(loaded, "model", loaded)(tokens).last_hidden_state
    assert torch.equal(same, model.model(tokens).last_hidden_state)


def test_device_map_of_the_checkpoint_follows(tokens, tmp_path, cut_on_load):
    model = tiny_model("llama", SHAPE)
    model.save_pretrained(tmp_path / "model")
    names = [
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in range(6)),
    ]
    places = dict.fromkeys(names, "cpu") | {"model.layers.1": "disk", "model.layers.4": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        quantization_config=cut_on_load([0, 4]),
        device_map=places,
        offload_folder=tmp_path / "offload",
    )
    drop_layers(model, [0, 4])
    places = {f"model.layers.{j}": "disk" if j == 0 else "cpu" for j in range(4)}
    assert {key: str(value) for key, value in loaded.hf_device_map.items() if "layers" in key} == places
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokens = torch.load(sys.argv[1] + "/tokens.pt")
with torch.no_grad():
    torch.save(model(input_ids=tokens, use_cache=False).logits, sys.argv[1] + "/logits.pt")
assert "optimum_slim" not in sys.modules
"""


@pytest.mark.slow
def test_stock_transformers_reloads_in_a_fresh_process(tokens, tmp_path):
    model = tiny_model("smollm3", CASES["smollm3"][1])
    drop_layers(model, (1, 2))
    model.save_pretrained(tmp_path)
    torch.save(tokens, tmp_path / "tokens.pt")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", RELOAD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model, tokens))
