"""LayerSkip's loss: exits against norm and head by hand, layer dropout against samples run alone."""

import copy

import pytest
import torch
from helpers import tiny_llama, token_ids
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from walk_models import MODELS, assert_untouched, tiny_model

from optimum_slim import LayerSkipLoss
from optimum_slim.exit_schedules import exit_scales, exit_weights, exits_trained
from optimum_slim.losses import token_loss
from optimum_slim.train import fit
from optimum_slim.walk import decoder_layers, skipping


LAYERS = 5
IDS = token_ids(6, 9)
ALIBI = {  # layers get tensors that have no row for each sample, here as many as samples
    "bloom": {"vocab_size": 97, "hidden_size": 36, "n_layer": 3, "n_head": 6},
    "mpt": {"vocab_size": 97, "d_model": 36, "n_layers": 3, "n_heads": 6, "max_seq_len": 32},
}


def deep(**changes):
    return tiny_llama(num_hidden_layers=LAYERS, initializer_range=0.2, **changes)


def exits_by_hand(model, ids=IDS):
    """The logits of every exit of a Llama."""
    states = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    return [model.lm_head(model.model.norm(state)) for state in states[1:-1]] + [model.lm_head(states[-1])]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- the exits


@pytest.mark.parametrize("kind", ["sum", "linear", "uniform"])
@pytest.mark.parametrize("curriculum", ["rotational", "gradual", "none"])
@pytest.mark.parametrize("always_last", [True, False])
def test_the_loss_is_the_weighted_mean_over_norm_and_head(kind, curriculum, always_last):
    model = deep().train()
    settings = {"exit_scales": kind, "curriculum": curriculum, "rotation": 2, "always_last": always_last}
    loss = LayerSkipLoss(p_max=0.0, e_scale=0.4, steps=8, **settings)
    values = [token_loss(logits, IDS) for logits in exits_by_hand(model)]
    for step in (0, 1, 2, 5):
        trained = exits_trained(curriculum, LAYERS, step, 8, 2)
        trained[-1] = trained[-1] or always_last
        weights = exit_weights(exit_scales(LAYERS, 0.4, kind), trained)
        loss.before_step(step)
        expected = sum(weight * values[layer] for layer, weight in weights.items())
        torch.testing.assert_close(loss(model, IDS), expected, rtol=1e-6, atol=1e-6)


def test_its_gradient_is_that_of_the_mean_by_hand():
    model = deep().train()
    loss = LayerSkipLoss(p_max=0.0, e_scale=1.0, curriculum="none")
    loss(model, IDS).backward()
    ours = gradients(model)
    loss.release()
    model.zero_grad()
    weights = exit_weights(exit_scales(LAYERS, 1.0), [True] * LAYERS)
    logits = exits_by_hand(model)
    sum(weight * token_loss(logits[layer], IDS) for layer, weight in weights.items()).backward()
    for name, expected in gradients(model).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-6)


def test_evaluation_is_of_all_exits_and_without_dropout():
    model = deep(attention_dropout=0.5).eval()
    loss = LayerSkipLoss(p_max=1.0, e_scale=0.4, rotation=2)
    values = [token_loss(logits, IDS) for logits in exits_by_hand(model)]
    expected = sum(w * values[i] for i, w in exit_weights(exit_scales(LAYERS, 0.4), [True] * LAYERS).items())
    first, second = loss(model, IDS), loss(model, IDS)
    torch.testing.assert_close(first, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(first, second) and torch.equal(LayerSkipLoss(p_max=0.0, e_scale=0.4)(model, IDS), first)


@pytest.mark.parametrize("model_type", MODELS)
def test_exits_of_other_architectures_have_the_logits_of_the_model_cut_there(model_type):
    model, ids = tiny_model(model_type), token_ids(2, 9, vocabulary=97)
    loss, found = LayerSkipLoss(exit_scales="uniform"), []
    loss.attach(model)
    with torch.no_grad():
        loss.over_exits(model(input_ids=ids).logits, lambda logits: found.append(logits) or logits.sum())
        loss.release()
        for layer, logits in enumerate([*found[1:], found[0]]):
            with skipping(decoder_layers(model)[1][layer + 1 :]):
                torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert len(found) == 3


# --- exits that learn from the last layer


def only_the_exit_behind_layer(layer, **settings):
    settings = {"p_max": 0.0, "exit_scales": "uniform", "rotation": LAYERS, "always_last": False} | settings
    loss = LayerSkipLoss(**settings, exit_target="last_layer")
    loss.before_step(layer)
    return loss


def test_exits_match_the_last_layer_which_learns_nothing_from_them():
    model = deep().train()
    value = only_the_exit_behind_layer(1)(model, IDS)
    logits = exits_by_hand(model)
    log_q, log_p = (logits[layer][:, :-1].log_softmax(-1) for layer in (1, -1))
    torch.testing.assert_close(value, (log_p.exp() * (log_p - log_q)).sum(-1).mean(), rtol=1e-4, atol=1e-6)
    value.backward()
    for name, gradient in gradients(model).items():
        above = any(f"layers.{layer}." in name for layer in (2, 3, 4))
        assert gradient.any() != above, name


def test_nothing_is_left_to_learn_where_the_late_layers_do_nothing():
    model = deep().train()
    for layer in model.model.layers[2:]:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            nn.init.zeros_(module.weight)
    assert abs(float(only_the_exit_behind_layer(1)(model, IDS).detach())) < 1e-6
    assert float(only_the_exit_behind_layer(0)(model, IDS).detach()) > 0.1


def test_the_last_layer_still_learns_the_text():
    model = deep().train()
    loss = LayerSkipLoss(p_max=0.0, exit_scales="uniform", e_scale=1.0, rotation=LAYERS, exit_target="last_layer")
    last, divergence = loss(model, IDS), only_the_exit_behind_layer(0)(model, IDS)
    expected = (token_loss(model(IDS).logits, IDS) + divergence) / 2
    torch.testing.assert_close(last, expected, rtol=1e-6, atol=1e-6)


# --- the dropout


def passed(model, loss, ids, **arguments):
    """The logits of a forward pass in training mode, and who did not skip which layer, bool (layers, batch)."""
    loss.attach(model)
    with torch.no_grad():
        logits = model(input_ids=ids, **arguments).logits
    return logits, loss._keep


@pytest.mark.parametrize("model_type", [*MODELS, *ALIBI])
def test_each_sample_ends_as_if_it_ran_alone_through_the_layers_it_did_not_skip(model_type):
    if model_type in ALIBI:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **ALIBI[model_type]))
    else:
        model = tiny_model(model_type)
    ids = token_ids(6, 9, vocabulary=96) + 1
    for module in model.modules():  # GPT-2 and OPT drop activations by default
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in ("dropout", "attention_dropout"):
        if getattr(model.config, name, 0):
            for module in model.modules():
                if hasattr(module, name):
                    setattr(module, name, 0.0)
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[4, :5] = 0
    loss = LayerSkipLoss(p_max=0.9, seed=3)
    logits, keep = passed(model.train(), loss, ids, attention_mask=mask)
    loss.release()
    assert 3 < (~keep).sum() < keep.numel() - 3 and any(0 < row.sum() < 6 for row in keep)
    model.eval()
    layers = decoder_layers(model)[1]
    for sample in range(6):
        left_out = [layer for layer, kept in zip(layers, keep[:, sample], strict=True) if not kept]
        with torch.no_grad(), skipping(left_out):
            alone = model(input_ids=ids[sample : sample + 1], attention_mask=mask[sample : sample + 1]).logits[0]
        real = mask[sample].bool()
        torch.testing.assert_close(logits[sample][real], alone[real], rtol=1e-4, atol=1e-4)


def test_skipped_samples_leave_the_batch_and_come_back_as_they_were():
    model, loss, seen, before, after = deep().train(), LayerSkipLoss(p_max=0.9, seed=1), {}, {}, {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _, args, i=index: before.update({i: args[0]}))
        layer.mlp.register_forward_pre_hook(lambda _, args, i=index: seen.update({i: len(args[0])}))
    loss.attach(model)
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _, args, output, i=index: after.update({i: output}))
    _, keep = passed(model, loss, IDS)
    assert [seen[i] for i in range(LAYERS)] == [max(1, int(row.sum())) for row in keep]
    for index, row in enumerate(keep):
        assert torch.equal(after[index][~row], before[index][~row])
        assert not any(torch.equal(after[index][i], before[index][i]) for i in row.nonzero().flatten())


def test_at_probability_1_the_deepest_layer_is_an_identity_and_trains_no_more():
    model, ids = deep().train(), IDS[:1]
    loss = LayerSkipLoss(p_max=1.0, e_scale=0.0)
    value = loss(model, ids)
    keep = loss._keep[:, 0]
    assert keep[0] and not keep[-1]
    value.backward()
    assert not any(f"layers.{LAYERS - 1}." in name for name in gradients(model))
    loss.release()
    with skipping([layer for layer, kept in zip(model.model.layers, keep, strict=True) if not kept]):
        assert torch.equal(token_loss(model(ids).logits, ids), value)


def test_layers_are_skipped_at_the_rates_of_the_schedule():
    model, loss, batch, steps = deep(hidden_size=8, head_dim=2).train(), LayerSkipLoss(p_max=0.6), 64, 40
    counts, ids = [0] * LAYERS, token_ids(64, 2)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _, args, i=index: counts.__setitem__(i, counts[i] + len(args[0])))
    for step in range(steps):
        loss.before_step(step)
        passed(model, loss, ids)
    trials = batch * steps
    for count, rate in zip(counts, loss.skip_rates(LAYERS), strict=True):
        assert abs(1 - count / trials - rate) <= 3 * (rate * (1 - rate) / trials) ** 0.5
    assert counts[0] == trials and loss.skip_rates(LAYERS)[-1] == pytest.approx(0.6)


def test_who_skips_follows_from_seed_step_and_micro_batch():
    def drawn(seed, step, passes):
        loss, model = LayerSkipLoss(p_max=0.9, seed=seed), deep().train()
        loss.before_step(step)
        return [passed(model, loss, IDS)[1] for _ in range(passes)]

    first = drawn(0, 4, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(0, 4, 2), strict=True))
    others = [first[1], *drawn(1, 4, 1), *drawn(0, 5, 1)]
    assert not any(torch.equal(first[0], other) for other in others)


def test_from_scratch_the_rates_grow_with_the_steps():
    loss, constant = LayerSkipLoss(p_max=0.2, dropout_schedule="exponential", steps=11), LayerSkipLoss(p_max=0.2)
    assert loss.skip_rates(4) == [0.0] * 4
    loss.before_step(5)
    assert loss.skip_rates(4)[-1] == pytest.approx(0.2 * (2**0.5 - 1))
    loss.before_step(10)
    assert loss.skip_rates(4) == pytest.approx(constant.skip_rates(4))


# --- activation checkpointing


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("target", ["tokens", "last_layer"])
@pytest.mark.parametrize("model_type", MODELS)
def test_activation_checkpointing_changes_no_bit(model_type, target):
    ids, results = token_ids(4, 9, vocabulary=97), []
    for on in (False, True):
        model = tiny_model(model_type).train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        settings = {"e_scale": 1.0, "curriculum": "none", "exit_target": target, "activation_checkpointing": on}
        loss = LayerSkipLoss(p_max=0.7, **settings)
        torch.manual_seed(0)
        value = loss(model, ids)
        value.backward()
        results.append((value.detach(), gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    assert all(torch.equal(gradient, results[1][1][name]) for name, gradient in results[0][1].items())


# --- hooks, journals, wrong use


def test_released_hooks_are_gone_and_a_second_loss_takes_the_place_of_the_first():
    model = deep().train()
    first, second = LayerSkipLoss(), LayerSkipLoss()
    first(model, IDS)
    once = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    second(model, IDS)
    assert once == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 2 * LAYERS + 1
    first(copy.deepcopy(tiny_llama()), IDS)
    second.release()
    assert_untouched(model)


def test_a_run_goes_on_with_a_loss_that_was_in_use_and_with_other_checkpointing(tmp_path):
    settings = {"steps": 4, "learning_rate": 1e-2, "batch_size": 2, "journal": tmp_path}
    loss = LayerSkipLoss(p_max=0.5)
    assert fit(deep(), IDS, loss, **settings).resumed_from is None
    assert fit(deep(), IDS, loss, **settings).resumed_from == 4
    loss = LayerSkipLoss(p_max=0.5, activation_checkpointing=True)
    assert fit(deep(), IDS, loss, **settings, activation_checkpointing=True).resumed_from == 4
    with pytest.raises(ValueError, match=r"p_max=0.5.* there, .*p_max=0.25.* here"):
        fit(deep(), IDS, LayerSkipLoss(p_max=0.25), **settings)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"p_max": 1.1}, r"p_max must be in \[0, 1\], found 1.1"),
        ({"p_max": float("nan")}, r"p_max must be in \[0, 1\], found nan"),
        ({"e_scale": -0.1}, r"e_scale must be in \[0, 1\], found -0.1"),
        ({"exit_scales": "square"}, "exit_scales must be one of sum, linear, uniform, found 'square'"),
        ({"curriculum": None}, "curriculum must be one of rotational, gradual, none, found None"),
        ({"dropout_schedule": "linear"}, "dropout_schedule must be one of constant, exponential"),
        ({"exit_target": "text"}, "exit_target must be one of tokens, last_layer"),
        ({"rotation": 0}, "rotation must be a positive integer, found 0"),
        ({"steps": 2.0}, "steps must be a positive integer, found 2.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LayerSkipLoss(**fields)


def test_a_loss_of_no_pass_and_a_pass_from_embeddings_are_refused():
    model, loss = deep(), LayerSkipLoss()
    logits = model(IDS).logits
    loss.attach(model)
    with pytest.raises(RuntimeError, match="attach the loss to the model, then call that model"):
        loss.over_exits(logits, torch.sum)
    loss.over_exits(model(IDS).logits, torch.sum)
    with pytest.raises(RuntimeError, match="no exits to train"):
        loss.over_exits(logits, torch.sum)
    model(inputs_embeds=model.model.embed_tokens(IDS))
    with pytest.raises(ValueError, match="pass those to the model, not inputs_embeds"):
        loss.over_exits(logits, torch.sum)


def test_what_has_no_decoder_layers_is_refused_and_not_hooked():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="not a Transformers model with a decoder"):
        LayerSkipLoss().attach(model)
    assert_untouched(model)
