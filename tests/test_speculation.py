import itertools
from collections import Counter

import pytest
import torch
from helpers import tiny_llama, token_ids
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
)
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer
from walk_models import MODELS, assert_untouched, tiny_model

from optimum_slim import PT2LLM, Depth, SelfSpeculation, SparseGPT, slim


# Older versions of Transformers cannot take back tokens from a sliding window, which is refused.
WINDOWS = hasattr(DynamicSlidingWindowLayer, "activate_past_recording")
EVERY = [name for name in MODELS if WINDOWS or "sliding_window" not in MODELS[name]]


def model_of(name, layers=3, **changes):
    """A tiny fp64 model, so that no rounding decides which token is likeliest, without special tokens."""
    if "layer_types" in MODELS[name]:
        changes["layer_types"] = (MODELS[name]["layer_types"] * layers)[:layers]
    count = {"n_layer": layers} if name == "gpt2" else {"num_hidden_layers": layers}
    model = tiny_model(name, **count, **changes).double()
    for token in ("eos", "pad", "bos"):
        setattr(model.generation_config, f"{token}_token_id", None)
    return model


def llama(layers=5, **changes):
    model = tiny_llama(num_hidden_layers=layers, **changes).double()
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    return model


def with_quiet_layers(model, first):
    """Make the layers from `first` on identities."""
    for layer in model.model.layers[first:]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    return model


def greedy(model, ids, speculation=None, **settings):
    return model.generate(ids, custom_generate=speculation, **{"max_new_tokens": 12, "do_sample": False} | settings)


@pytest.mark.parametrize("prompt", [1, 7])
@pytest.mark.parametrize("name", EVERY)
def test_greedy_tokens_are_those_of_plain_decoding(name, prompt):
    model, ids = model_of(name), token_ids(1, prompt, 96)
    plain = greedy(model, ids)
    for exit_layer, length in itertools.product((1, 2, 3), range(1, 9)):
        speculation = SelfSpeculation(exit_layer=exit_layer, draft_tokens=length)
        assert torch.equal(greedy(model, ids, speculation), plain), (exit_layer, length)
    assert_untouched(model)


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3, "min_new_tokens": 4}, {"eos_token_id": None}])
@pytest.mark.parametrize("name", EVERY)
def test_rows_of_a_batch_accept_different_numbers_of_tokens(name, settings):
    model, ids = model_of(name), token_ids(3, 6, 96) + 1
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, :1] = 0
    ids = ids * mask
    settings = {
        "attention_mask": mask,
        "eos_token_id": [6, 17, 33, 60],
        "pad_token_id": 0,
        "max_new_tokens": 20,
    } | settings
    plain = greedy(model, ids, **settings)
    for exit_layer, length in ((1, 1), (1, 3), (2, 2), (2, 6), (3, 3)):
        speculation = SelfSpeculation(exit_layer=exit_layer, draft_tokens=length)
        assert torch.equal(greedy(model, ids, speculation, **settings), plain), (exit_layer, length)


def test_rows_without_an_end_of_text_token_go_on_until_all_have_stopped():
    class Longer(StoppingCriteria):
        """Stops each row at a length of its own, told apart by its first token."""

        def __call__(self, input_ids, scores, **_):
            return input_ids.shape[1] >= 8 + input_ids[:, 0] % 5

    model, ids = llama(), token_ids(4, 5)
    ids[:, 0] = torch.arange(4)
    plain = greedy(model, ids, stopping_criteria=[Longer()])
    assert plain.shape[1] == 11
    assert torch.equal(greedy(model, ids, SelfSpeculation(exit_layer=2), stopping_criteria=[Longer()]), plain)


@pytest.mark.parametrize("new", [1, 2, 3, 4, 5])
def test_max_new_tokens(new):
    model, ids = llama(), token_ids(1)
    speculation = SelfSpeculation(exit_layer=2, draft_tokens=3)
    assert torch.equal(greedy(model, ids, speculation, max_new_tokens=new), greedy(model, ids, max_new_tokens=new))
    assert speculation.report.tokens == new - 1


@pytest.mark.parametrize("where", range(1, 8))
def test_end_of_text_inside_a_draft(where):
    model, ids = with_quiet_layers(llama(seed=3), 2), token_ids(1)
    plain = greedy(model, ids)
    end = int(plain[0, ids.shape[1] + where])
    settings = {"eos_token_id": end, "pad_token_id": 0}
    speculation = SelfSpeculation(exit_layer=2, draft_tokens=5)
    found = greedy(model, ids, speculation, **settings)
    assert torch.equal(found, greedy(model, ids, **settings)) and found[0, -1] == end


def test_early_layers_run_once_for_each_token_and_late_ones_once_for_each_round():
    model, ids, calls, tokens = llama(), token_ids(1), Counter(), Counter()
    handles = []
    for index, layer in enumerate(model.model.layers):

        def count(module, args, kwargs, index=index):
            calls[index] += 1
            tokens[index] += args[0].shape[1]

        handles.append(layer.mlp.register_forward_pre_hook(count, with_kwargs=True))
    speculation = SelfSpeculation(exit_layer=2, draft_tokens=3)
    greedy(model, ids, speculation)
    for handle in handles:
        handle.remove()
    report = speculation.report
    assert report.rounds < report.tokens  # some drafts were accepted
    for index in range(5):
        early = index < 2
        assert calls[index] == 1 + (report.drafted + report.rounds if early else report.rounds)
        assert tokens[index] == ids.shape[1] + report.drafted + report.rounds


def test_identity_late_layers_accept_every_draft():
    model = with_quiet_layers(llama(), 2)
    speculation = SelfSpeculation(exit_layer=2, draft_tokens=4)
    greedy(model, token_ids(1), speculation, max_new_tokens=22)
    report = speculation.report
    assert report.acceptance == 1 and report.accepted == report.drafted
    assert report.rounds == 5  # 21 tokens, 4 drafted and 1 more in each but the last


def test_confidence_ends_drafts_early():
    model = llama()
    sure, unsure = (
        SelfSpeculation(exit_layer=2, draft_tokens=6),
        SelfSpeculation(exit_layer=2, draft_tokens=6, confidence=0.99),
    )
    plain = greedy(model, token_ids(1))
    assert torch.equal(greedy(model, token_ids(1), sure), plain)
    assert torch.equal(greedy(model, token_ids(1), unsure), plain)
    assert unsure.report.drafted <= unsure.report.rounds  # one token each
    assert sure.report.drafted > sure.report.rounds


@pytest.mark.parametrize("exit_layer", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 6}])
def test_sampled_tokens_have_the_distribution_of_the_model(exit_layer, settings):
    """Chi-square of the second and third token of many samples against the exact probabilities."""
    torch.manual_seed(0)
    model, count = llama(layers=3, vocab_size=8, hidden_size=16, intermediate_size=16), 4000
    model.lm_head.weight.data *= 4
    ids = token_ids(1, 4, 8)
    settings = {"do_sample": True, "max_new_tokens": 3, "top_k": 0} | settings
    speculation = SelfSpeculation(exit_layer=exit_layer, draft_tokens=2)
    found = model.generate(ids.expand(count, -1), custom_generate=speculation, **settings)[:, 4:]
    assert 0 < speculation.report.acceptance < 1

    def chances(prefixes):
        logits = model(prefixes).logits[:, -1] / settings.get("temperature", 1)
        if settings["top_k"]:
            logits = logits.masked_fill(logits < logits.topk(settings["top_k"])[0][:, -1:], -torch.inf)
        return logits.softmax(-1)

    with torch.no_grad():
        exact = torch.ones(1, 1, dtype=torch.float64)
        prefixes = ids
        for _ in range(3):
            exact = (exact.view(-1, 1) * chances(prefixes)).flatten()
            prefixes = torch.cat([prefixes.repeat_interleave(8, 0), torch.arange(8).repeat(len(prefixes))[:, None]], 1)
    seen = torch.bincount((found * torch.tensor([64, 8, 1])).sum(1), minlength=512).double()
    assert not seen[exact == 0].any()
    likely = exact * count >= 5
    expected = torch.cat([exact[likely], exact[~likely].sum()[None]]) * count
    observed = torch.cat([seen[likely], seen[~likely].sum()[None]])
    expected, observed = expected[expected > 0], observed[expected > 0]
    statistic, freedom = float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_returned_dict_has_scores_logits_and_a_cache_to_go_on_from():
    model, ids = llama(), token_ids(1)
    settings = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.2,
    }
    plain, found = greedy(model, ids, **settings), greedy(model, ids, SelfSpeculation(exit_layer=2), **settings)
    assert torch.equal(found.sequences, plain.sequences)
    for name in ("scores", "logits"):
        for a, b in zip(getattr(found, name), getattr(plain, name), strict=True):
            torch.testing.assert_close(a, b)
    for ours, theirs in zip(found.past_key_values.layers, plain.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)
    longer = greedy(model, found.sequences, SelfSpeculation(exit_layer=3), past_key_values=found.past_key_values)
    assert torch.equal(longer, greedy(model, plain.sequences, past_key_values=plain.past_key_values))


def test_scores_of_a_batch():
    model, ids = llama(), token_ids(3)
    settings = {"return_dict_in_generate": True, "output_scores": True}
    plain, found = greedy(model, ids, **settings), greedy(model, ids, SelfSpeculation(exit_layer=2), **settings)
    assert torch.equal(found.sequences, plain.sequences)
    for a, b in zip(found.scores, plain.scores, strict=True):
        torch.testing.assert_close(a, b)


def test_streamer_gets_every_token_in_order_and_the_end():
    class Heard(BaseStreamer):
        def __init__(self):
            self.heard, self.ended = [], 0

        def put(self, value):
            self.heard += value.flatten().tolist()

        def end(self):
            self.ended += 1

    model, ids, streamer = llama(), token_ids(1), Heard()
    found = greedy(model, ids, SelfSpeculation(exit_layer=2), streamer=streamer)
    assert streamer.heard == found[0].tolist() and streamer.ended == 1


def test_criteria_see_every_token_and_stop_inside_a_draft():
    class Seen(StoppingCriteria):
        def __init__(self):
            self.lengths = []

        def __call__(self, input_ids, scores, **_):
            self.lengths.append(input_ids.shape[1])
            return torch.tensor([input_ids.shape[1] == 14])

    model, ids, seen = with_quiet_layers(llama(), 2), token_ids(1), Seen()
    found = greedy(model, ids, SelfSpeculation(exit_layer=2, draft_tokens=8), stopping_criteria=[seen])
    assert torch.equal(found, greedy(model, ids)[:, :14])
    assert seen.lengths == list(range(10, 15))


def test_allowed_tokens_by_row():
    model, ids = llama(), token_ids(2)
    allowed = {0: [1, 2, 3, 4], 1: [50, 51, 52]}
    settings = {"prefix_allowed_tokens_fn": lambda row, tokens: allowed[row]}
    found = greedy(model, ids, SelfSpeculation(exit_layer=2), **settings)
    assert torch.equal(found, greedy(model, ids, **settings))
    assert set(found[1, 9:].tolist()) <= {50, 51, 52}


def test_several_sequences_for_one_prompt():
    model = llama()
    torch.manual_seed(0)
    settings = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 9}
    assert model.generate(token_ids(1), custom_generate=SelfSpeculation(exit_layer=2), **settings).shape == (4, 18)


@pytest.mark.parametrize("steps", [PT2LLM(group_size=32), SparseGPT(sparsity=0.5), Depth(layers=(1, 3))])
def test_slimmed_models_speculate(steps):
    model = llama().float()
    slim(model, steps, data=token_ids(4, 16))
    plain = greedy(model, token_ids(1))
    assert torch.equal(greedy(model, token_ids(1), SelfSpeculation(exit_layer=2)), plain)


def test_settings_come_from_the_generation_config(tmp_path):
    model, ids = llama(), token_ids(1)
    with pytest.raises(ValueError, match="tune_speculation"):
        greedy(model, ids, SelfSpeculation())
    model.generation_config._from_model_config = False
    model.generation_config.self_speculation = {"exit_layer": 2, "draft_tokens": 3, "confidence": 0.0}
    model.save_pretrained(tmp_path)
    loaded, speculation = AutoModelForCausalLM.from_pretrained(tmp_path), SelfSpeculation()
    assert torch.equal(greedy(loaded, ids, speculation), greedy(model, ids))
    assert speculation.report.drafted > 0
    model.generation_config.self_speculation = {"exit_layer": None, "draft_tokens": None, "confidence": 0.0}
    off = SelfSpeculation()
    assert torch.equal(greedy(model, ids, off), greedy(model, ids)) and off.report.rounds == 0


def test_what_it_cannot_do_is_refused_by_name():
    model, ids = llama(), token_ids(1)
    speculation = SelfSpeculation(exit_layer=2)
    refused = {
        "num_beams=2": {"num_beams": 2},
        "output_hidden_states=True": {"return_dict_in_generate": True, "output_hidden_states": True},
        "output_attentions=True": {"return_dict_in_generate": True, "output_attentions": True},
        "UnbatchedClassifierFreeGuidance": {"guidance_scale": 2.0},
        "use_cache=True": {"use_cache": False},
        "StaticCache": {"past_key_values": StaticCache(config=model.config, max_cache_len=64)},
    }
    for message, settings in refused.items():
        with pytest.raises(ValueError, match=message):
            greedy(model, ids, speculation, **settings)
        assert_untouched(model)
    with pytest.raises(ValueError, match="has 5 decoder layers"):
        greedy(model, ids, SelfSpeculation(exit_layer=6))
    with pytest.raises(ValueError, match="a streamer takes one sequence"):
        greedy(model, token_ids(2), speculation, streamer=TextIteratorStreamer.__new__(_Deaf))
    for field, value in (("exit_layer", 0), ("draft_tokens", 1.5), ("confidence", 1.0)):
        with pytest.raises(ValueError, match=field):
            SelfSpeculation(**{field: value})


class _Deaf(BaseStreamer):
    def put(self, value):
        pass

    def end(self):
        pass


def test_model_is_as_it_was_after_an_error():
    class Broken(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            if input_ids.shape[1] > 11:
                raise RuntimeError("broken")
            return torch.tensor([False])

    model, ids = llama(), token_ids(1)
    plain = greedy(model, ids)
    with pytest.raises(RuntimeError, match="broken"):
        greedy(model, ids, SelfSpeculation(exit_layer=2), stopping_criteria=[Broken()])
    assert_untouched(model)
    assert torch.equal(greedy(model, ids), plain)


def test_processors_may_call_the_model():
    model, ids = llama(), token_ids(1)

    class Again(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return model(input_ids=input_ids, use_cache=False).logits[:, -1]

    settings = {"logits_processor": LogitsProcessorList([Again()])}
    found = greedy(model, ids, SelfSpeculation(exit_layer=2), **settings)
    assert torch.equal(found, greedy(model, ids, **settings))


def test_prefixes_of_rows_are_true_ones():
    """A trie of allowed texts, which has no answer for a text that is none of them."""
    model, ids = llama(), token_ids(3, 4)
    torch.manual_seed(1)
    texts = [[*torch.randint(3, 100, (length,)).tolist(), 2] for length in torch.randint(1, 12, (60,)).tolist()]

    def allowed(row, tokens):
        behind = tokens[4:].tolist()
        if 2 in behind:
            return [0]
        return [text[len(behind)] for text in texts if text[: len(behind)] == behind and len(text) > len(behind)]

    settings = {"prefix_allowed_tokens_fn": allowed, "eos_token_id": 2, "pad_token_id": 0, "max_new_tokens": 14}
    for exit_layer in (1, 3):
        found = greedy(model, ids, SelfSpeculation(exit_layer=exit_layer, draft_tokens=4), **settings)
        assert torch.equal(found, greedy(model, ids, **settings))


@pytest.mark.parametrize("eos", [None, [6, 17, 33]])
def test_texts_as_long_as_the_position_table(eos):
    model = model_of("opt", max_position_embeddings=27)
    ids, settings = token_ids(3, 7, 96), {"max_new_tokens": 20, "eos_token_id": eos, "pad_token_id": 1}
    for exit_layer in (1, 2, 3):
        found = greedy(model, ids, SelfSpeculation(exit_layer=exit_layer), **settings)
        assert torch.equal(found, greedy(model, ids, **settings))


def test_positions_that_depend_on_the_length_are_refused_beyond_it():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = llama(max_position_embeddings=16, rope_parameters=rope)
    with pytest.raises(ValueError, match="longer than 16 tokens \\(rope_type 'dynamic'\\)"):
        greedy(model, token_ids(1), SelfSpeculation(exit_layer=2))
    speculation = SelfSpeculation(exit_layer=2)
    assert torch.equal(
        greedy(model, token_ids(1), speculation, max_new_tokens=7), greedy(model, token_ids(1), max_new_tokens=7)
    )


def test_beams_are_refused_where_speculation_is_off_as_well():
    model = llama()
    model.generation_config.self_speculation = {"exit_layer": None, "draft_tokens": None, "confidence": 0.0}
    with pytest.raises(ValueError, match="num_beams=3"):
        greedy(model, token_ids(1), SelfSpeculation(), num_beams=3)
