"""evaluate: each figure against a count by hand on a tiny model."""

import math
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from optimum_slim.evaluate import evaluate, logical_parameters, perplexity, tokenize
from optimum_slim.speed import PeakMemory, measure_speed, speed_ratio
from optimum_slim.stored import bytes_on_disk, read_header, stored_bits


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def ids():
    return torch.randint(97, (150,), generator=torch.Generator().manual_seed(1))


class WordTokenizer:
    """One id per word, its length: enough to see what was tokenized."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [len(word) for word in text.split()]}


def test_perplexity_is_the_mean_over_the_predicted_tokens_of_full_windows(model, ids):
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss for row in ids[:128].view(4, 32)]
    assert perplexity(model, ids, window=32) == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-5)
    assert perplexity(model, ids, window=32, max_windows=1) == pytest.approx(math.exp(losses[0]), rel=1e-5)


def test_a_short_text_is_one_window(model, ids):
    assert perplexity(model, ids[:20], window=64) == perplexity(model, ids[:20], window=20)


def test_uniform_logits_give_the_vocabulary_size(model, ids):
    nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, ids, window=50) == pytest.approx(97, rel=1e-5)


@pytest.mark.parametrize(("count", "window"), [(1, 32), (0, 32), (150, 1)])
def test_too_few_tokens_are_refused(model, ids, count, window):
    with pytest.raises(ValueError, match="at least 2 tokens"):
        perplexity(model, ids[:count], window=window)


def test_a_window_beyond_the_positions_is_refused_and_evaluate_states_the_one_it_used(model, ids):
    with pytest.raises(ValueError, match="longer than the 64 positions of the model; pass window=64"):
        perplexity(model, ids, window=65)
    result = evaluate(model, text=ids, window=1024, generate_tokens=0)
    assert (result.window, result.windows, result.tokens) == (64, 2, 126)
    assert result.perplexity == perplexity(model, ids, window=64)


def test_training_mode_is_given_back_and_not_used(model, ids):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2, n_positions=64))
    expected = perplexity(gpt2.eval(), ids, window=32)
    assert perplexity(gpt2.train(), ids, window=32) == expected
    assert gpt2.training


def test_text_forms(tmp_path):
    (tmp_path / "a.txt").write_text("one three\nseventh")
    tokenizer = WordTokenizer()
    assert tokenize(tmp_path / "a.txt", tokenizer).tolist() == [3, 5, 7]
    assert tokenize(str(tmp_path / "a.txt"), tokenizer).tolist() == [3, 5, 7]
    assert tokenize(["one", "three"], tokenizer).tolist() == [3, 5]
    assert tokenize([4, 5]).tolist() == [4, 5]
    assert tokenize(torch.tensor([[1, 2]])).tolist() == [1, 2]
    with pytest.raises(ValueError, match="needs its tokenizer"):
        tokenize(["one"])
    with pytest.raises(FileNotFoundError, match=r"no such text file.*pass it in a list"):
        tokenize("no/such/file.txt", tokenizer)


def packed_file(folder, **changes):
    tensors = {
        "layer.weight": torch.zeros(3, 8, dtype=torch.uint8),
        "layer.weight_scale": torch.ones(10, 2, dtype=torch.float16),
        "layer.weight_offset": torch.ones(10, 2, dtype=torch.float16),
        "layer.bias": torch.ones(10),
        "embed.weight": torch.ones(5, 4, dtype=torch.bfloat16),
    } | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")
    return folder


def test_stored_bits_count_scales_and_offsets(tmp_path):
    bits = stored_bits(packed_file(tmp_path))
    assert (bits.packed_bytes, bits.packed_weights) == (24 + 40 + 40, 80)
    assert (bits.dense_bytes, bits.dense_weights) == (40 + 40, 30)
    assert bits.packed == 8 * 104 / 80
    assert bits.overall == 8 * 184 / 110


@pytest.mark.parametrize(("bias", "rows"), [(torch.ones(10), 10), (None, 12)], ids=["bias", "none"])
def test_rows_of_a_layer_with_one_scale(tmp_path, bias, rows):
    one = {"layer.weight_scale": torch.ones(1), "layer.weight_offset": None, "layer.bias": bias}
    assert stored_bits(packed_file(tmp_path, **one)).packed_weights == rows * 8


def test_a_uint8_weight_without_a_scale_is_not_ours(tmp_path):
    bits = stored_bits(packed_file(tmp_path, **{"layer.weight_scale": None, "layer.weight_offset": None}))
    assert bits.packed is None
    assert bits.dense_weights == 24 + 10 + 20


def test_dense_bits_of_a_saved_model(model, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    bits = stored_bits(tmp_path)
    assert (bits.packed, bits.overall) == (None, 16)
    assert bits.dense_weights == model.num_parameters()
    assert bytes_on_disk(tmp_path) == (tmp_path / "model.safetensors").stat().st_size


@pytest.mark.parametrize("size", [4, 20, 400])
def test_a_truncated_file_is_named(tmp_path, size):
    file = packed_file(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated"):
        read_header(file)


def test_an_empty_folder_has_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no safetensors"):
        stored_bits(tmp_path)
    with pytest.raises(FileNotFoundError, match="no weight file"):
        bytes_on_disk(tmp_path)


def test_logical_parameters_count_ties_once_and_packed_layers_by_their_size(model):
    assert logical_parameters(model) == model.num_parameters()
    model.lm_head.weight = model.model.embed_tokens.weight
    assert logical_parameters(model) == sum(p.numel() for p in model.parameters())
    packed = nn.Linear(8, 10)
    packed.weight = nn.Parameter(torch.zeros(3, 8, dtype=torch.uint8), requires_grad=False)
    packed.weight_scale = nn.Parameter(torch.ones(10, 2), requires_grad=False)
    assert logical_parameters(nn.Sequential(packed)) == 8 * 10 + 10


def test_speed_counts_runs_and_tokens(model):
    first, second = measure_speed([model, model], prompt_tokens=16, generate_tokens=4, repeats=2)
    assert len(first.prefill_seconds) == len(second.decode_seconds) == 2
    assert first.prefill == 16 / (sum(first.prefill_seconds) / 2)
    assert set(speed_ratio(model, model, 8, 2, 1)) == {"prefill", "decode"}


def test_models_take_turns(model, monkeypatch):
    calls = []
    other = LlamaForCausalLM(model.config)
    for name, one in (("a", model), ("b", other)):
        forward = one.forward
        monkeypatch.setattr(
            one, "forward", lambda *args, name=name, forward=forward, **kw: calls.append(name) or forward(*args, **kw)
        )
    measure_speed([model, other], 4, 1, repeats=2)
    assert "".join(calls[4:]) == "aabbaabb"


def test_peak_memory_sees_what_was_freed_again():
    with PeakMemory() as memory:
        torch.zeros(30_000_000).add_(1)
    with PeakMemory() as later:
        pass
    assert memory.peak >= later.peak + 60_000_000
    assert "resident memory" in memory.what


def test_evaluate_fills_in_what_was_asked(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    result = evaluate(model, text=ids, path=tmp_path, prompt_tokens=8, generate_tokens=2, repeats=1)
    assert result.stored_bits_per_weight == 32
    assert result.bytes_on_disk > 4 * result.parameters
    assert result.prefill_tokens_per_second > 0 and result.decode_tokens_per_second > 0
    assert (result.dtype, result.device, result.threads) == ("float32", "cpu", torch.get_num_threads())
    silent = evaluate(model, generate_tokens=0)
    assert (silent.perplexity, silent.decode_tokens_per_second, silent.bytes_on_disk) == (None, None, None)


def test_missing_lm_eval_names_the_extra(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install optimum-slim\[eval\]"):
        evaluate(model, generate_tokens=0, lm_eval_tasks=["arc_easy"])
