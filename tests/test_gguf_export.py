"""Models as GGUF files: the same numbers, read by the gguf package and by Transformers; or a reason why not."""

import errno
from collections import namedtuple

import pytest
import torch
import transformers
from gguf_models import WIDE, byte_tokenizer, round_scales, tiny_qwen2, tiny_qwen3
from helpers import tiny_llama, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_slim import PT2LLM, BitNet, Magnitude, PackedLinear, TernaryLinear, export_gguf, gguf_export, save, slim
from optimum_slim.cli import main


gguf = pytest.importorskip("gguf")
MODELS = {
    "llama": lambda: tiny_llama(**WIDE, num_key_value_heads=2),
    "llama, tied, with biases": lambda: tiny_llama(
        **WIDE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama, wide heads": lambda: tiny_llama(**WIDE, head_dim=128),
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
}


def ternary(make=MODELS["llama"], **settings):
    model = make()
    slim(model, BitNet(force=True, **({"activation_bits": None} | settings)))
    round_scales(model)
    return model


def weights(path) -> dict[str, torch.Tensor]:
    """The tensors of a file, dequantized by the gguf package."""
    reader = gguf.GGUFReader(path)
    return {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}


def read_back(path, **settings):
    """The model in a file as Transformers reads it, dense."""
    if hasattr(transformers, "GgufConfig"):
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **settings)


def file_order(weight, heads):
    """Rows of a query or key projection as llama.cpp's `llama` wants them, written out row by row."""
    half = weight.shape[0] // heads // 2
    pairs = [(head * 2 * half + row, head * 2 * half + row + half) for head in range(heads) for row in range(half)]
    return torch.stack([weight[row] for pair in pairs for row in pair])


@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0", "Q4_0", "Q4_1", "F32"])
def test_dequantized_tensors_equal_ours(tmp_path, kind):
    model = ternary()
    written = export_gguf(model, tmp_path / "m.gguf", file_type=kind)
    found = weights(written.path)
    assert written.types[kind] == (20 if kind == "F32" else 14) + (kind == "F32")
    layer = model.model.layers[1]
    assert torch.equal(found["blk.1.ffn_down.weight"], layer.mlp.down_proj.dense())
    assert torch.equal(found["blk.1.attn_v.weight"], layer.self_attn.v_proj.dense())
    assert torch.equal(found["blk.1.attn_q.weight"], file_order(layer.self_attn.q_proj.dense(), 4))
    assert torch.equal(found["blk.1.attn_k.weight"], file_order(layer.self_attn.k_proj.dense(), 2))
    assert torch.equal(found["token_embd.weight"], model.model.embed_tokens.weight)
    assert torch.equal(found["output.weight"], model.lm_head.weight)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_same_logits(tmp_path, name):
    model = ternary(MODELS[name])
    written = export_gguf(model, tmp_path / "m.gguf")
    assert written.main_type == "TQ2_0" and written.types["TQ2_0"] == 14
    again = read_back(written.path)
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    bias = {"attention_bias": True, "mlp_bias": True} if "biases" in name else {}
    if bias:  # Transformers takes no biases of a Llama from a GGUF file unless told
        again = read_back(written.path, config=type(model.config)(**(again.config.to_diff_dict() | bias)))
    torch.testing.assert_close(again(token_ids()).logits, model(token_ids()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16", "Q8_0"])
def test_dense_and_pruned_models(tmp_path, kind):
    model = tiny_llama(**WIDE)
    slim(model, Magnitude(sparsity=0.5))
    written = export_gguf(model, tmp_path / "m.gguf", file_type=kind)
    step = {"F32": 0, "BF16": 2**-8, "F16": 2**-11, "Q8_0": 1 / 64}[kind]
    assert written.types[kind] == (20 if kind == "F32" else 16) + (kind == "F32")
    again = read_back(written.path)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            weight, found = module.dense(), again.get_submodule(name).weight
            torch.testing.assert_close(found, weight, rtol=step, atol=step / 32)
            assert bool((found[weight == 0] == 0).all())


def test_dtypes_are_kept_by_default(tmp_path):
    written = export_gguf(tiny_llama(**WIDE).to(torch.bfloat16), tmp_path / "m.gguf")
    assert written.types == {"BF16": 16, "F32": 5} and written.bytes == written.path.stat().st_size


def test_each_layer_gets_the_smallest_blocks_that_hold_it(tmp_path):
    model = ternary(lambda: tiny_llama(hidden_size=96, intermediate_size=512))
    written = export_gguf(model, tmp_path / "m.gguf")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(written.path).tensors}
    assert types["blk.0.ffn_down.weight"] == "TQ2_0" and types["blk.0.ffn_up.weight"] == "Q4_0"
    torch.testing.assert_close(read_back(written.path)(token_ids()).logits, model(token_ids()).logits)


def test_scales_are_rounded_to_fp16_and_codes_are_kept(tmp_path):
    model = tiny_llama(**WIDE)
    slim(model, BitNet(force=True))
    found = weights(export_gguf(model, tmp_path / "m.gguf").path)["blk.0.ffn_up.weight"]
    ours = model.model.layers[0].mlp.up_proj
    assert torch.equal(found.sign(), ours.dense().sign())
    torch.testing.assert_close(found, ours.dense(), rtol=2**-11, atol=0)
    assert torch.equal(found, ours.dense().sign() * ours.scale().half().float())


def pt2llm(group_size, **changes):
    model = tiny_llama(**(WIDE | changes))
    slim(model, PT2LLM(group_size=group_size, rounds=0), data=token_ids(4, 32))
    return model


def test_offsets_are_refused_with_the_error_and_the_way_out(tmp_path):
    model = pt2llm(128)
    message = (
        r"q_proj cannot be written without a change: as TQ2_0, its groups have an offset.*off by \d+\.\d%.*"
        r"Pass file_type='Q4_1' \(off by 0\.0\d%\) or 'F16'"
    )
    for kind in (None, "TQ2_0"):
        with pytest.raises(ValueError, match=message):
            export_gguf(model, tmp_path / "m.gguf", file_type=kind)
    assert list(tmp_path.iterdir()) == []
    again = read_back(export_gguf(model, tmp_path / "m.gguf", file_type="Q4_1").path)
    dense = model.model.layers[0].mlp.up_proj.dense()
    found = again.model.layers[0].mlp.up_proj.weight
    assert torch.linalg.vector_norm(found - dense) < 1e-3 * torch.linalg.vector_norm(dense)


REFUSED = {
    "no ternary layer": (lambda: tiny_llama(), "TQ2_0", "is for ternary layers, and this model has none"),
    "unknown type": (lambda: tiny_llama(), "Q2_K", "file_type must be one of TQ2_0, TQ1_0"),
    "width": (lambda: ternary(lambda: tiny_llama()), "TQ2_0", "64 columns are not whole blocks of 256.*'Q4_0'"),
    "activation": (lambda: tiny_llama(hidden_act="relu"), None, "hidden_act='relu', where llama.cpp computes silu"),
    "rope": (
        lambda: tiny_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        None,
        "rope_type='dynamic'",
    ),
    "sliding window": (
        lambda: tiny_qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=0),
        None,
        "sliding-window attention",
    ),
    "biases": (lambda: tiny_qwen3(attention_bias=True), None, "biases in its attention"),
    "meta": (lambda: tiny_llama().to("meta"), None, "not in memory"),
    "integers": (lambda: with_integers(tiny_llama()), None, r"torch.int8.*call model.dequantize\(\) first"),
    "other modules": (lambda: with_norm(tiny_llama()), None, "no tensor for model.layers.0.mlp.extra.weight"),
    "too large": (lambda: with_large(tiny_llama()), "F16", "infinite in F16; pass file_type='BF16'"),
}


def with_integers(model):
    weight = torch.zeros(96, 64, dtype=torch.int8)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
    return model


def with_norm(model):
    model.model.layers[0].mlp.extra = torch.nn.LayerNorm(4)
    return model


def with_large(model):
    model.model.layers[0].mlp.up_proj.weight.data[3, 3] = 1e6
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path, name):
    make, kind, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        export_gguf(make(), tmp_path / "m.gguf", file_type=kind)
    assert list(tmp_path.iterdir()) == []


def test_other_model_types_are_refused(tmp_path):
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    with pytest.raises(ValueError, match=r"the model types llama, qwen2, qwen3, bitnet, and this .* gpt2"):
        export_gguf(transformers.GPT2LMHeadModel(config), tmp_path / "m.gguf")


def test_layers_that_normalize_their_outputs_are_refused(tmp_path):
    model = ternary()
    model.model.layers[1].mlp.up_proj.post_norm = True
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj normalizes its outputs"):
        export_gguf(model, tmp_path / "m.gguf", file_type="F16")


def test_llama3_rope_becomes_a_table_of_factors(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    plain = tiny_llama(head_dim=64)
    model = tiny_llama(head_dim=64, rope_parameters=rope | {"original_max_position_embeddings": 64})
    factors = weights(export_gguf(model, tmp_path / "m.gguf").path)["rope_freqs.weight"]
    expected = model.model.rotary_emb.inv_freq * factors
    torch.testing.assert_close(expected, plain.model.rotary_emb.inv_freq)
    assert factors.min() == 1 and factors.max() == 8 and len(factors.unique()) > 2


def test_linear_rope(tmp_path):
    model = tiny_llama(rope_parameters={"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0})
    fields = gguf.GGUFReader(export_gguf(model, tmp_path / "m.gguf").path).fields
    assert fields["llama.rope.scaling.type"].contents() == "linear"
    assert fields["llama.rope.scaling.factor"].contents() == 2 and fields["llama.rope.freq_base"].contents() == 5e4


TEXTS = ["the theth 1234 the", "  the\n\nthe's Ünï 12a", "<s>the</s>"]


@pytest.mark.parametrize("kind, name", [("ByteLevel", "gpt-2"), ("Digits", "smollm"), ("qwen2", "qwen2")])
def test_the_tokenizer_comes_back(tmp_path, kind, name):
    tokenizer = byte_tokenizer(kind, template="{{ messages[0]['content'] }}")
    path = export_gguf(tiny_llama(vocab_size=300), tmp_path / "m.gguf", tokenizer=tokenizer).path
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    assert fields["tokenizer.ggml.token_type"].contents() == [1] * 259 + [3, 3] + [5] * 39
    assert fields["tokenizer.ggml.merges"].contents() == ["t h", "th e", "Ġ the"]
    assert [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos")] == [259, 260]
    assert not fields["tokenizer.ggml.add_bos_token"].contents()
    if not hasattr(transformers, "GgufConfig"):  # older versions guess special tokens
        return
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert (again.bos_token, again.eos_token) == ("<s>", "</s>")
    assert again.chat_template == tokenizer.chat_template
    for text in TEXTS if kind != "Digits" else ["the theth the"]:  # Transformers reads smollm's digits as GPT-2's
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_tokenizers_without_a_name_in_llama_cpp_are_refused(tmp_path):
    from tokenizers import Regex, pre_tokenizers

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+"), behavior="isolated")
    with pytest.raises(
        ValueError, match=r"pre-tokenizer .*Split.*byte-level BPE as in gpt-2, llama-bpe.*tokenizer=None"
    ):
        export_gguf(tiny_llama(vocab_size=300), tmp_path / "m.gguf", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="has a token 260, and the model's embeddings only 128 rows"):
        export_gguf(tiny_llama(), tmp_path / "m.gguf", tokenizer=byte_tokenizer())


def test_an_existing_file_is_refused_or_replaced(tmp_path):
    (tmp_path / "m.gguf").write_text("old")
    with pytest.raises(FileExistsError, match="exists; choose another name"):
        export_gguf(tiny_llama(), tmp_path / "m.gguf")
    export_gguf(tiny_llama(), tmp_path / "m.gguf", overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"] and len(weights(tmp_path / "m.gguf")) == 21


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_text("old")
    usage = namedtuple("usage", "total used free")(10_000, 9_000, 1_000)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"needs [\d,]+ bytes .*has 1,000 free"):
        patch.setattr(gguf_export.shutil, "disk_usage", lambda folder: usage)
        export_gguf(tiny_llama(), tmp_path / "m.gguf", overwrite=True)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(OSError, match=r"needs [\d,]+ bytes"):
        export_gguf(tiny_llama(), tmp_path / "m.gguf", overwrite=True)
    assert (tmp_path / "m.gguf").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_one_tensor_at_a_time(tmp_path, monkeypatch):
    model, alive, most = ternary(), set(), []
    make, write = TernaryLinear.dense, gguf.GGUFWriter.write_tensor_data

    def dense(layer, *args, **kwargs):
        alive.add(layer)
        most.append(len(alive))
        return make(layer, *args, **kwargs)

    def written(*args, **kwargs):
        alive.clear()
        return write(*args, **kwargs)

    monkeypatch.setattr(TernaryLinear, "dense", dense)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", written)
    export_gguf(model, tmp_path / "m.gguf", file_type="F16")
    assert most == [1] * 14


def test_save_writes_a_folder_with_card_and_report(tmp_path):
    out = save(ternary(), tmp_path / "small", tokenizer=None, save_format="gguf", file_type="TQ1_0")
    assert {file.name for file in out.iterdir()} == {"small-TQ1_0.gguf", "README.md", "slim_report.json"}
    card = (out / "README.md").read_text()
    assert "llama-cli --model small-TQ1_0.gguf" in card and "import optimum_slim " not in card
    assert "small-TQ1_0.gguf: 0.5 MB" in card and "14 tensors TQ1_0" in card
    for file in out.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
    with pytest.raises(ValueError, match="save_format must be 'slim', 'bitnet' or 'gguf', found 'gguff'"):
        save(ternary(), tmp_path / "other", save_format="gguff")
    with pytest.raises(ValueError, match="file_type='F16' is for save_format='gguf'"):
        save(ternary(), tmp_path / "other", file_type="F16")
    with pytest.raises(ValueError, match="cannot be written without a change"):
        save(pt2llm(128), tmp_path / "other", save_format="gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["small"]


def test_the_shell_exports(tmp_path, capsys):
    model = ternary()
    save(model, tmp_path / "slim")
    assert main(["export", str(tmp_path / "slim"), str(tmp_path / "out"), "--file-type", "TQ1_0"]) == 0
    printed = capsys.readouterr()
    assert "out-TQ1_0.gguf (0.5 MB)" in printed.out and "holds no tokenizer" in printed.err
    again = read_back(tmp_path / "out" / "out-TQ1_0.gguf")
    torch.testing.assert_close(again(token_ids()).logits, model(token_ids()).logits, rtol=1e-5, atol=1e-5)
    assert main(["export", str(tmp_path / "slim"), str(tmp_path / "out")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_without_the_package_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r'pip install "optimum-slim\[gguf\]"'):
        export_gguf(tiny_llama(), tmp_path / "m.gguf")
