"""Ternary blocks of GGUF files into packed layers, without a dense copy of them."""

import pytest
import torch
from gguf_models import WIDE, byte_tokenizer, round_scales, tiny_qwen2, tiny_qwen3
from helpers import tiny_llama, token_ids
from transformers import AutoModelForCausalLM

from optimum_slim import BitNet, SlimConfig, TernaryLinear, export_gguf, load_gguf, save, slim
from optimum_slim._kernels import unpack_ternary
from optimum_slim.gguf_blocks import pack_blocks
from optimum_slim.gguf_model import config_of


gguf = pytest.importorskip("gguf")
MODELS = {
    "llama": lambda: tiny_llama(**WIDE),
    "llama, tied, with biases": lambda: tiny_llama(
        **WIDE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama, wide heads": lambda: tiny_llama(**WIDE, head_dim=128),
    "linear rope": lambda: tiny_llama(
        **WIDE, rope_parameters={"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}
    ),
    "qwen2": tiny_qwen2,
    "qwen3": lambda: tiny_qwen3(head_dim=64),
}


def ternary(make=MODELS["llama"], **settings):
    model = make()
    slim(model, BitNet(force=True, **settings))
    round_scales(model)
    return model


@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_packed(tmp_path, name, kind):
    model = ternary(MODELS[name])
    again = load_gguf(export_gguf(model, tmp_path / "m.gguf", file_type=kind).path)
    packed = {name: layer for name, layer in again.named_modules() if isinstance(layer, TernaryLinear)}
    assert len(packed) == 14
    for key, layer in packed.items():
        ours = model.get_submodule(key)
        assert torch.equal(layer.weight, ours.weight) and torch.equal(layer.scale(), ours.scale())
    torch.testing.assert_close(again(token_ids()).logits, model(token_ids()).logits, rtol=1e-5, atol=1e-5)


def test_what_was_read_is_saved_and_loaded_as_any_slimmed_model(tmp_path):
    export_gguf(ternary(), tmp_path / "m.gguf")
    again = load_gguf(tmp_path, "m.gguf", activation_bits=None)
    assert again.model.layers[0].mlp.up_proj.activation_bits is None
    save(again, tmp_path / "slim")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert torch.equal(loaded(token_ids()).logits, again(token_ids()).logits)
    save(load_gguf(tmp_path, "m.gguf"), tmp_path / "stock", save_format="bitnet")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", quantization_config=SlimConfig("bitnet"))
    assert torch.equal(stock(token_ids()).logits, load_gguf(tmp_path, "m.gguf")(token_ids()).logits)


def test_no_dense_copy_is_made(tmp_path, monkeypatch):
    path = export_gguf(ternary(), tmp_path / "m.gguf").path
    dense, dequantize = [], gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", lambda data, kind: dense.append(kind) or dequantize(data, kind))
    monkeypatch.setattr(TernaryLinear, "dense", lambda *args, **kwargs: pytest.fail("it made dense weights"))
    load_gguf(path)
    assert gguf.GGMLQuantizationType.TQ2_0 not in dense


@pytest.mark.parametrize("dtype, kind", [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_the_dtype_is_that_of_the_embeddings(tmp_path, dtype, kind):
    model = tiny_llama(**WIDE).to(dtype)
    slim(model, BitNet(force=True))
    written = export_gguf(model, tmp_path / "m.gguf")
    assert written.types[kind] == 2
    again = load_gguf(written.path)
    assert again.dtype == dtype and torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert load_gguf(written.path, dtype=torch.float32).dtype == torch.float32


def rewritten(source, target, change):
    """Copy a GGUF file with `change(name, array, kind)` applied to each tensor; `None` leaves it out."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(key, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        changed = change(tensor.name, tensor.data, tensor.tensor_type)
        if changed is not None:
            writer.add_tensor(tensor.name, changed, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_blocks_that_differ_in_scale_keep_their_own(tmp_path):
    model = ternary()
    path = export_gguf(model, tmp_path / "m.gguf").path
    generator = torch.Generator().manual_seed(0)
    scales = (torch.rand(256, 2, generator=generator) + 0.1).half()

    def change(name, data, kind):
        if name != "blk.1.ffn_down.weight":
            return data
        codes = unpack_ternary(model.model.layers[1].mlp.down_proj.weight, 256)
        return pack_blocks(codes, "TQ2_0", scales).numpy()

    again = load_gguf(rewritten(path, tmp_path / "changed.gguf", change), activation_bits=None)
    layer = again.model.layers[1].mlp.down_proj
    assert layer.group_size == 256 and torch.equal(layer.weight_scale, scales)
    assert torch.equal(layer.weight, model.model.layers[1].mlp.down_proj.weight)
    other = again.model.layers[0].self_attn.q_proj
    assert torch.equal(other.dense(), model.model.layers[0].self_attn.q_proj.dense())
    assert again.config.quantization_config.steps[0].name == "tq"
    save(again, tmp_path / "slim")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert torch.equal(loaded(token_ids()).logits, again(token_ids()).logits)
    back = export_gguf(again, tmp_path / "back.gguf").path
    assert torch.equal(load_gguf(back, activation_bits=None)(token_ids()).logits, again(token_ids()).logits)


def test_blocks_of_zeros_have_any_scale(tmp_path):
    model = ternary()
    path = export_gguf(model, tmp_path / "m.gguf").path

    def change(name, data, kind):
        if name != "blk.1.ffn_down.weight":
            return data
        codes = unpack_ternary(model.model.layers[1].mlp.down_proj.weight, 256)
        codes[3, :256] = 0
        scale = model.model.layers[1].mlp.down_proj.scale().expand(256, 2).clone()
        scale[3, 0] = 0  # as llama.cpp's own quantizer writes it
        return pack_blocks(codes, "TQ2_0", scale).numpy()

    layer = load_gguf(rewritten(path, tmp_path / "changed.gguf", change)).model.layers[1].mlp.down_proj
    assert layer.per_tensor and torch.equal(layer.scale(), model.model.layers[1].mlp.down_proj.scale())


def test_layers_left_dense_stay_dense(tmp_path):
    model = tiny_llama(**WIDE)
    slim(model, BitNet(force=True, modules_to_not_convert=("layers.0", "k_proj")))
    round_scales(model)
    again = load_gguf(export_gguf(model, tmp_path / "m.gguf").path)
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(again.model.layers[1].self_attn.k_proj.weight, model.model.layers[1].self_attn.k_proj.weight)
    assert isinstance(again.model.layers[1].mlp.up_proj, TernaryLinear)
    torch.testing.assert_close(again(token_ids()).logits, model(token_ids()).logits, rtol=1e-5, atol=1e-5)


def test_quantized_embeddings_are_read_dense(tmp_path):
    path = export_gguf(tiny_llama(**WIDE), tmp_path / "q8.gguf", file_type="Q8_0").path
    embeddings = next(t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    ternary_path = export_gguf(ternary(), tmp_path / "m.gguf").path
    target = tmp_path / "mixed.gguf"
    kinds = gguf.GGMLQuantizationType
    add = gguf.GGUFWriter.add_tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gguf.GGUFWriter,
            "add_tensor",
            lambda self, name, data, raw_dtype=None: add(
                self, name, data, raw_dtype=kinds.Q8_0 if name == "token_embd.weight" else raw_dtype
            ),
        )
        rewritten(ternary_path, target, lambda n, d, k: embeddings.data if n == "token_embd.weight" else d)
    again = load_gguf(target)
    expected = torch.from_numpy(gguf.dequantize(embeddings.data, kinds.Q8_0))
    assert again.dtype == torch.float32 and torch.equal(again.model.embed_tokens.weight, expected)


def test_special_tokens_reach_the_config(tmp_path):
    model = ternary(lambda: tiny_llama(**WIDE, vocab_size=300))
    export_gguf(model, tmp_path / "m.gguf", tokenizer=byte_tokenizer())
    config = load_gguf(tmp_path, "m.gguf").config
    assert (config.bos_token_id, config.eos_token_id, config.vocab_size) == (259, 260, 300)


def test_files_without_ternary_blocks_are_refused(tmp_path):
    path = export_gguf(tiny_llama(), tmp_path / "m.gguf").path
    with pytest.raises(ValueError, match=r"m.gguf holds no ternary tensor .*load_model\(folder, gguf_file=...\)"):
        load_gguf(path)


def test_incomplete_and_damaged_files_are_refused(tmp_path):
    path = export_gguf(ternary(), tmp_path / "m.gguf").path
    without = {
        "blk.0.ffn_norm.weight": r"lacks model\.layers\.0\.input_layernorm|lacks model\.layers\.0\.post_attention",
        "blk.1.ffn_up.weight": r"model\.layers\.1\.mlp\.up_proj\.weight is missing from the checkpoint",
    }
    for gone, message in without.items():
        rewritten(path, tmp_path / "less.gguf", lambda name, data, kind, gone=gone: None if name == gone else data)
        with pytest.raises(ValueError, match=message):
            load_gguf(tmp_path / "less.gguf")
    (tmp_path / "short.gguf").write_bytes(path.read_bytes()[:-100_000])
    (tmp_path / "none.gguf").write_bytes(b"GGUFnothing")
    (tmp_path / "text.gguf").write_bytes(b"hello, this is not a model at all")
    for name in ("short", "none", "text"):
        with pytest.raises(ValueError, match=f"{name}.gguf is no GGUF file, or cut short"):
            load_gguf(tmp_path / f"{name}.gguf")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_gguf(tmp_path, "other.gguf")


def test_tensors_without_a_place_are_refused(tmp_path):
    path = export_gguf(ternary(), tmp_path / "m.gguf").path
    data = path.read_bytes()
    assert data.count(b"blk.1.ffn_down.weight") == 1
    (tmp_path / "odd.gguf").write_bytes(data.replace(b"blk.1.ffn_down.weight", b"blk.1.ffn_down.scales"))
    with pytest.raises(ValueError, match=r"holds a tensor blk\.1\.ffn_down\.scales, which no llama model has"):
        load_gguf(tmp_path / "odd.gguf")


def test_architectures_and_rope_tables_that_are_not_read():
    with pytest.raises(ValueError, match="architecture 'mamba'; ternary blocks are read for llama, qwen2"):
        config_of({"general.architecture": "mamba"}, set())
    with pytest.raises(ValueError, match="scales its rotary embeddings by a table"):
        config_of({"general.architecture": "llama"}, {"rope_freqs.weight"})
    with pytest.raises(ValueError, match="by yarn"):
        config_of({"general.architecture": "llama", "llama.rope.scaling.type": "yarn"}, set())
