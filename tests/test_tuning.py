import pytest
import torch
from helpers import tiny_llama, token_ids
from walk_models import assert_untouched

from optimum_slim import Depth, SelfSpeculation, make_draft, tune_speculation
from optimum_slim import tuning as module
from optimum_slim.tuning import _agreement, _cost, _draft, _predict


@pytest.fixture
def model():
    model = tiny_llama(num_hidden_layers=5).double()
    model.generation_config.eos_token_id = None
    return model


def greedy(model, ids, speculation=None, new=20):
    return model.generate(ids, custom_generate=speculation, max_new_tokens=new, do_sample=False)


def test_a_round_ends_where_confidence_or_agreement_does():
    agrees, chances = [True, True, False, True], [0.9, 0.3, 0.8, 0.9]
    assert _draft(agrees, chances, 8, 0.0) == (4, 2)
    assert _draft(agrees, chances, 1, 0.0) == (1, 1)
    assert _draft(agrees, chances, 8, 0.5) == (2, 2)
    assert _draft(agrees, chances, 8, 0.95) == (1, 1)


def test_costs_between_measured_lengths():
    rounds = {2: (1.0, 0.5), 4: (2.0, 1.5)}
    assert _cost(rounds, 3) == (1.5, 1.0)
    assert _cost(rounds, 4) == (2.0, 1.5)
    assert _cost(rounds, 1) == (1.0, 0.5) and _cost(rounds, 9) == (2.0, 1.5)


def test_prediction_by_hand():
    # Drafts of 2: both agree; then the first does not; then one token is left, which does.
    agrees = [True, True, True, False, True, True]
    rounds = {1: (3.0, 0.0), 2: (4.0, 1.0)}
    row = _predict([(agrees, [1.0] * 6)], 2, 2, 0.0, rounds, plain=2.0)
    # rounds: tokens 0-2 (2 accepted), 3 (0 accepted), 4-5 and one behind (2 accepted)
    assert row["tokens_per_round"] == pytest.approx(7 / 3)
    assert row["acceptance"] == pytest.approx(4 / 6)
    assert row["milliseconds_per_round"] == pytest.approx(6000)
    assert row["speedup"] == pytest.approx(7 * 2.0 / 18)


@pytest.mark.parametrize("exit_layer", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3])
def test_acceptance_from_one_pass_is_that_of_decoding(model, exit_layer, length):
    ids = token_ids(1)
    text = greedy(model, ids)
    agrees, chances = _agreement(model, text[0], ids.shape[1], [exit_layer])[exit_layer]
    speculation = SelfSpeculation(exit_layer=exit_layer, draft_tokens=length)
    greedy(model, ids, speculation)
    at = rounds = accepted = 0
    while at < len(agrees):
        # decoding drafts one token fewer than are left, and chooses the last one by itself
        _, agreed = _draft(agrees[at:], chances[at:], min(length, len(agrees) - at - 1) or 1, 0.0)
        agreed = 0 if len(agrees) - at == 1 else agreed
        at, rounds, accepted = at + agreed + 1, rounds + 1, accepted + agreed
    assert (speculation.report.rounds, speculation.report.accepted) == (rounds, accepted)


def test_tuning_chooses_the_layers_behind_which_nothing_changes(model, monkeypatch, capsys):
    for layer in model.model.layers[2:]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    # Seconds that are those of a machine on which layers are all that costs.
    monkeypatch.setattr(module, "_times", lambda m, p, e, d: (5.0, {n: (5.0, n) for n in d}))
    monkeypatch.setattr(module, "_race", lambda *_: (0.2, 1.8, 1.0))
    found = tune_speculation(model, [token_ids(1)[0]], max_new_tokens=20, draft_tokens=(1, 3))
    assert (found.exit_layer, found.draft_tokens) == (2, 3)
    assert model.generation_config.self_speculation == found.settings()
    line = capsys.readouterr().out
    assert "drafts of 3 tokens from 2 layers" in line and "1.80 x plain decoding" in line
    speculation = SelfSpeculation()
    assert torch.equal(greedy(model, token_ids(1), speculation), greedy(model, token_ids(1)))
    assert speculation.report.drafted


def test_speculation_that_would_lose_is_switched_off(model, monkeypatch, capsys):
    monkeypatch.setattr(module, "_race", lambda *_: (100.0, 0.9, 0.3))
    found = tune_speculation(model, [token_ids(1)[0]], max_new_tokens=6, draft_tokens=(1,))
    assert found.exit_layer is None and found.draft_tokens is None
    assert "no self-speculation, which would not pay" in capsys.readouterr().out
    speculation = SelfSpeculation()
    assert torch.equal(greedy(model, token_ids(1), speculation), greedy(model, token_ids(1)))
    assert speculation.report.rounds == 0


def test_everything_is_measured_for_real(model):
    found = tune_speculation(model, token_ids(2), max_new_tokens=8, draft_tokens=(1, 2), store=False)
    assert [row["exit_layer"] for row in sorted(found.candidates, key=lambda row: row["exit_layer"])] == [1, 2, 3, 4]
    assert found.plain > 0 and found.speedup > 0 and 0 <= found.acceptance <= 1
    assert not hasattr(model.generation_config, "self_speculation")
    assert_untouched(model)


def test_length_of_another_models_drafts(model, capsys):
    draft = make_draft(model, Depth(layers=(3,)))
    found = tune_speculation(model, token_ids(1), draft=draft, max_new_tokens=6, draft_tokens=(1, 2))
    assert {row["draft_tokens"] for row in found.candidates} == {1, 2} and found.exit_layer is None
    assert not hasattr(model.generation_config, "self_speculation")
    assert "from another model" in capsys.readouterr().out


def test_what_cannot_be_tuned_on_is_refused(model):
    prompt = token_ids(1)
    for message, prompts, settings in (
        ("at least one prompt", [], {}),
        ("a single string", "text", {}),
        ("pass tokenizer", ["text"], {}),
        ("int64", [torch.rand(3)], {}),
        ("between 1 and 4", prompt, {"exit_layers": [5]}),
        ("positive", prompt, {"draft_tokens": [0]}),
    ):
        with pytest.raises(ValueError, match=message):
            tune_speculation(model, prompts, **settings)


def test_prompts_answered_by_one_token_are_left_out(model):
    ids = token_ids(1)
    model.generation_config.eos_token_id = int(greedy(model, ids, new=1)[0, -1])
    with pytest.raises(ValueError, match="answered by a single token"):
        tune_speculation(model, ids, max_new_tokens=6)
