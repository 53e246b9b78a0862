import copy
import logging
import random

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from helpers import tiny_llama, token_ids
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from optimum_slim.batches import cut_batch, draw
from optimum_slim.schedules import warmup_cosine
from optimum_slim.train import Distillation, fit, next_token_loss


SETTINGS = {"steps": 6, "learning_rate": 1e-2, "batch_size": 4, "held_out": 0.2, "evaluate_every": 2}
TOKENS = token_ids(20, 8, seed=3) % 16  # few different tokens, so that there is something to learn


def trained(model=None, loss=next_token_loss, **changes):
    """A model after `fit`, and the report."""
    model = tiny_llama() if model is None else model
    return model, fit(model, TOKENS, loss, **SETTINGS | changes)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(ours, theirs):
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Counting:
    """The next-token loss with a log of the training calls; `act` happens at training call `at`."""

    def __init__(self, at=0, act=None):
        self.at, self.act, self.seen = at, act, []

    def __call__(self, model, ids):
        value = next_token_loss(model, ids)
        if torch.is_grad_enabled():
            self.seen.append(ids)
            if len(self.seen) == self.at:
                return self.act(value)
        return value


# --- the result


def test_training_lowers_the_held_out_loss_and_reports_it():
    model, report = trained(steps=10)
    assert report.held_out_after < report.held_out_before - 0.5
    assert (report.steps, report.best_step, report.tokens, report.resumed_from) == (10, 10, 10 * 4 * 8, None)
    assert [row["step"] for row in report.history] == [0, 2, 4, 6, 8, 10]
    assert report.history[0] == {"step": 0, "loss": None, "held_out": report.held_out_before, "learning_rate": 0.0}
    held, _ = draw(20, 0.2, 10, 4, 0)
    torch.testing.assert_close(float(next_token_loss(model, TOKENS[held]).detach()), report.held_out_after)


def test_a_run_repeats_to_the_bit_and_depends_on_the_seed():
    first, second, other = (values(trained(tiny_llama(attention_dropout=0.3), seed=seed)[0]) for seed in (1, 1, 2))
    assert same(first, second) and not same(first, other)


def test_it_never_ends_worse_than_it_began():
    model, report = trained(learning_rate=30.0, max_grad_norm=None, warmup_steps=0)
    assert same(values(model), values(tiny_llama()))
    assert report.best_step == 0 and report.held_out_after == report.held_out_before
    assert report.history[-1]["held_out"] > report.held_out_before and report.steps == 6


def test_the_best_parameters_are_kept_not_the_last():
    def spoilt(value):
        model.lm_head.weight.data.mul_(-5.0)
        return value

    model = tiny_llama()
    _, report = trained(model, Counting(at=5, act=spoilt), steps=6)
    _, shorter = trained(steps=6)
    assert report.best_step == 4 and report.held_out_after == shorter.history[2]["held_out"]
    assert report.history[-1]["held_out"] > report.held_out_after


def test_without_held_out_samples_the_last_parameters_stay():
    model, report = trained(held_out=0.0, steps=5)
    assert (report.best_step, report.held_out_before, report.held_out_after) == (5, None, None)
    assert [row["step"] for row in report.history] == [0, 2, 4, 5] and report.history[-1]["held_out"] is None
    assert not same(values(model), values(tiny_llama()))


def test_patience_stops_after_so_many_evaluations_without_a_new_best():
    _, report = trained(learning_rate=30.0, max_grad_norm=None, warmup_steps=0, steps=50, patience=2)
    assert report.steps == 4 and report.best_step == 0


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro, monkeypatch):
    gradients, step = [], torch.optim.AdamW.step

    def recorded(self, *args, **kwargs):
        gradients.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    for size in (4, micro):
        trained(steps=1, micro_batch_size=size)
    assert len(gradients) == 2
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-6)


def test_gradients_are_clipped_together(monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def recorded(self, *args, **kwargs):
        norms.append(float(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    trained(steps=1, max_grad_norm=0.01)
    trained(steps=1, max_grad_norm=None)
    assert norms[0] == pytest.approx(0.01, rel=1e-3) and norms[1] > 0.1


def test_only_matrices_decay():
    def flat(model, ids):
        return 0 * next_token_loss(model, ids)

    model, before = tiny_llama(), values(tiny_llama())
    fit(model, TOKENS, flat, steps=1, learning_rate=0.1, warmup_steps=0, weight_decay=0.5, batch_size=2, held_out=0)
    after = values(model)
    torch.testing.assert_close(after["lm_head.weight"], before["lm_head.weight"] * 0.95)
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_the_rate_warms_up_for_a_fifth_at_most_and_falls_to_zero():
    _, report = trained(steps=10, evaluate_every=1, warmup_steps=100)
    rates = [row["learning_rate"] / 1e-2 for row in report.history[1:]]
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[-1] < 0.1


@pytest.mark.parametrize(("warmup", "steps"), [(0, 5), (3, 20), (1, 1)])
def test_the_schedule_is_that_of_transformers(warmup, steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps):
        assert warmup_cosine(step, warmup, steps) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


# --- the data


def test_held_out_samples_are_never_trained_on_and_an_epoch_sees_the_others_once():
    loss = Counting()
    trained(loss=loss, steps=8, micro_batch_size=2)
    held, order = draw(20, 0.2, 8, 4, 0)
    assert torch.equal(torch.cat(loss.seen), TOKENS[order.flatten()])
    assert len(held) == 4 and not set(held.tolist()) & set(order.flatten().tolist())
    assert sorted(order[:4].flatten().tolist()) == sorted(order[4:].flatten().tolist())
    assert len(set(order[:4].flatten().tolist())) == 16


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.001, 1), (0.26, 5)])
def test_held_out_share_is_rounded_to_at_least_one(share, expected):
    assert len(draw(20, share, 1, 1, 0)[0]) == expected


def test_sizes_that_do_not_divide_are_refused_with_sizes_that_do():
    assert cut_batch(12, None, 2) == (6, 1) and cut_batch(12, 3, 2) == (3, 2)
    with pytest.raises(ValueError, match=r"batch_size=10 .*of 4; use batch_size=8 or 12, or micro_batch_size=1 or 2"):
        cut_batch(10, 4, 1)
    with pytest.raises(ValueError, match=r"of 2 in 2 processes; use batch_size=4 or 8$"):
        cut_batch(5, None, 2)


# --- what is left as it was


def test_only_parameters_with_gradients_change_and_flags_modes_and_random_states_stay():
    model = tiny_llama()
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    model.model.layers[0].train()
    before, modes = values(model), [module.training for module in model.modules()]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    states = random.getstate(), torch.get_rng_state()
    with torch.no_grad():  # as steps are applied
        trained(model)
    changed = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    assert changed == {"model.norm.weight"}
    assert [module.training for module in model.modules()] == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_active_in_training_and_not_in_evaluation():
    seen = set()

    def loss(model, ids):
        seen.add((torch.is_grad_enabled(), model.training))
        return next_token_loss(model, ids)

    trained(loss=loss)
    assert seen == {(True, True), (False, False)}


def test_the_accelerator_of_the_caller_is_untouched():
    try:
        mine = Accelerator(mixed_precision="no", gradient_accumulation_steps=3)
        trained(mixed_precision="bf16", micro_batch_size=2)
        assert mine.mixed_precision == "no" and mine.gradient_accumulation_steps == 3
        assert AcceleratorState().mixed_precision == "no"
    finally:
        AcceleratorState._reset_state()
        GradientState._reset_state()


def test_bf16_computes_in_bf16_and_keeps_fp32_parameters():
    dtypes = set()

    def loss(model, ids):
        dtypes.add(model(input_ids=ids).logits.dtype)
        return next_token_loss(model, ids)

    model, report = trained(loss=loss, mixed_precision="bf16")
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert report.held_out_after < report.held_out_before
    assert "forward" not in model.__dict__ and model(TOKENS).logits.dtype == torch.float32


def test_16_bit_parameters_are_trained_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "optimum_slim.train"):
        trained(tiny_llama().to(torch.bfloat16), steps=1)
    assert "parameters are torch.bfloat16" in caplog.text and "small updates are lost" in caplog.text


# --- LoRA, activation checkpointing, a teacher


def lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["up_proj", "down_proj"]))


def sharing(model):
    """A second model over the same parameter tensors."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_activation_checkpointing_over_frozen_embeddings_changes_nothing_but_memory(monkeypatch):
    calls, original = [], torch.utils.checkpoint.checkpoint

    def counted(*args, use_reentrant, **kwargs):
        calls.append(use_reentrant)
        return original(*args, use_reentrant=use_reentrant, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    results = []
    for on in (False, True):
        model = lora(tiny_llama(num_hidden_layers=3))
        teacher = tiny_llama(seed=7, num_hidden_layers=3)
        loss = Distillation(teacher, hidden_weight=1.0, seams=[(0, 0), (1, 2)])
        start = values(model)
        trained(model, loss, activation_checkpointing=on, steps=3, held_out=0.0)
        results.append(values(model))
        assert bool(calls) is on and not any(calls)
        base = model.get_base_model()
        assert not base.is_gradient_checkpointing and not base.model.embed_tokens._forward_hooks
        assert all(not torch.equal(results[-1][name], start[name]) for name in start if "lora" in name)
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_activation_checkpointing_that_was_on_stays_on():
    model = tiny_llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    trained(model, activation_checkpointing=True, steps=1)
    assert model.is_gradient_checkpointing


def test_a_teacher_may_share_frozen_parameters_and_does_not_change():
    base = tiny_llama()
    teacher = sharing(base)
    base.model.layers[1].mlp.down_proj = nn.Linear(96, 64, bias=False)  # what healing has to make up for
    student = lora(base)
    assert student.get_base_model().lm_head.weight is teacher.lm_head.weight
    expected, flags = teacher(TOKENS).logits, [p.requires_grad for p in teacher.parameters()]
    _, report = trained(student, Distillation(teacher), learning_rate=3e-2, steps=10)
    assert report.held_out_after < 0.8 * report.held_out_before
    assert torch.equal(teacher(TOKENS).logits, expected)
    assert [p.requires_grad for p in teacher.parameters()] == flags


def test_a_teacher_that_would_be_trained_along_is_refused():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"shares 21 trained parameters .*embed_tokens.*train adapters instead"):
        trained(model, Distillation(sharing(model)))


# --- the journal


class Stop(Exception):
    pass


def stop(value):
    raise Stop


def test_a_stopped_run_goes_on_and_ends_with_the_same_bits(tmp_path):
    model, whole = trained(tiny_llama(attention_dropout=0.3), micro_batch_size=2, steps=9)
    expected = values(model)
    options = {"journal": tmp_path, "journal_every": 2, "micro_batch_size": 2, "steps": 9}
    for at in (5, 9):  # micro-batches: within step 3, then within step 7
        with pytest.raises(Stop):
            trained(tiny_llama(attention_dropout=0.3), Counting(at, stop), **options | {"description": "again"})
    model, report = trained(tiny_llama(attention_dropout=0.3), Counting(), **options)
    assert report.resumed_from == 6
    assert same(values(model), expected)
    assert report.history == whole.history and report.best_step == whole.best_step


def test_a_finished_run_is_not_done_again(tmp_path):
    model, report = trained(loss=Counting(), journal=tmp_path)
    again, taken = trained(loss=Counting(1, stop), journal=tmp_path)
    assert same(values(again), values(model))
    assert taken.resumed_from == 6 and (taken.history, taken.steps) == (report.history, report.steps)
    torch.load(tmp_path / "fit.pt", weights_only=True)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_a_damaged_journal_is_set_aside_and_the_run_starts_over(tmp_path, damage, caplog):
    expected, _ = trained()
    trained(journal=tmp_path)
    file = tmp_path / "fit.pt"
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 4
    file.write_bytes({"truncated": data[:-1000], "flipped": data, "empty": b"", "foreign": b"x" * 500}[damage])
    with caplog.at_level(logging.WARNING, "optimum_slim.journal"):
        model, report = trained(journal=tmp_path)
    assert "is damaged (its checksum is wrong)" in caplog.text
    assert report.resumed_from is None and same(values(model), values(expected))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit.damaged", "fit.pt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 7}, "steps: 6 there, 7 here"),
        ({"seed": 1, "learning_rate": 0.5}, "learning_rate: 0.01 there, 0.5 here; seed: 0 there, 1 here"),
        ({"loss": Distillation(tiny_llama())}, "loss: next_token_loss there, Distillation.*; other teacher"),
        ({"model": tiny_llama(hidden_size=32)}, "other trainable parameters"),
    ],
    ids=["steps", "two", "loss", "model"],
)
def test_the_journal_of_another_run_is_refused_by_what_differs(tmp_path, changes, message):
    trained(journal=tmp_path)
    with pytest.raises(ValueError, match=f"belongs to another run: {message}"):
        trained(**{"journal": tmp_path} | changes)


def test_other_tokens_and_other_frozen_weights_are_noticed(tmp_path):
    first, second = tiny_llama(), tiny_llama(seed=1)
    for model in (first, second):
        model.model.embed_tokens.requires_grad_(False)
    trained(first, journal=tmp_path)
    with pytest.raises(ValueError, match="other frozen parameters"):
        trained(second, journal=tmp_path)
    trained(journal=tmp_path / "tokens")
    with pytest.raises(ValueError, match="other tokens"):
        fit(tiny_llama(), TOKENS + 1, next_token_loss, journal=tmp_path / "tokens", **SETTINGS)


# --- failures


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nan_stops_with_the_best_parameters(tmp_path, kind):
    def spoilt(value):
        model.lm_head.weight.data.mul_(2.0)
        return value * float("nan") if kind == "loss" else value * 1e38 * 1e38

    model = tiny_llama()
    reference, _ = trained(steps=4)
    message = r"at step 4 of 4; lower learning_rate \(now 0.01\)"
    with pytest.raises(FloatingPointError, match=message):
        trained(model, Counting(4, spoilt), steps=4, journal=tmp_path, journal_every=2)
    held, _ = draw(20, 0.2, 4, 4, 0)
    kept = float(next_token_loss(model, TOKENS[held]).detach())
    _, report = trained(steps=4)
    assert kept == pytest.approx(report.history[1]["held_out"], abs=1e-6)
    assert not same(values(model), values(reference)) and not list(tmp_path.iterdir())
    assert all(p.grad is None for p in model.parameters()) and not model.training


def test_a_damaged_model_is_not_trained():
    model = tiny_llama()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="held-out loss is nan before training: the model is damaged"):
        trained(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"patience": 0}, "patience must be at least 1 or None"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"warmup_steps": -1}, "must not be negative"),
        ({"max_grad_norm": 0.0}, "None leaves gradients alone"),
        ({"held_out": 1.0}, r"share of the samples in \[0, 1\)"),
        ({"held_out": 0.99}, "leaves none to train on"),
        ({"held_out": 0.0, "patience": 1}, "patience watches the held-out loss"),
        ({"mixed_precision": "int8"}, "'bf16' or 'fp16', found 'int8'"),
        ({"mixed_precision": "fp16"}, "fp16"),
        ({"micro_batch_size": 3}, "use batch_size=3 or 6"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused_before_anything_is_done(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trained(journal=tmp_path, **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "tokens", [TOKENS[0], TOKENS.int(), TOKENS[:0], TOKENS[:, :1]], ids=["1-D", "int32", "none", "short"]
)
def test_tokens_of_another_form_are_refused(tokens):
    with pytest.raises(ValueError, match="int64 matrix"):
        fit(tiny_llama(), tokens, next_token_loss, **SETTINGS)


def test_a_model_with_nothing_to_train_is_refused():
    model = tiny_llama()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires gradients"):
        trained(model)
