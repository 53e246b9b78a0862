"""LayerSkip in Transformers' Trainer: its losses against LayerSkipLoss, and errors when half of it is missing."""

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_llama, token_ids
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from walk_models import assert_untouched

from optimum_slim import LayerSkipCallback, LayerSkipLoss
from optimum_slim.exit_schedules import exit_scales, exit_weights, exits_trained


LAYERS = 4
TOKENS = token_ids(16, 10, seed=2) % 16


def model(**changes):
    return tiny_llama(num_hidden_layers=LAYERS, **changes)


def samples(padding=0, tokens=TOKENS):
    """Samples for a Trainer; the first `padding` positions of every second one are padding."""
    rows = []
    for i, ids in enumerate(tokens):
        mask = torch.ones_like(ids)
        mask[: padding * (i % 2)] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[0] = -100  # nothing predicts it, yet older versions of the Trainer count it
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


class Seen(TrainerCallback):
    """What the Trainer logs."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs, **_):
        self.rows.append(logs)

    def of(self, key):
        return [row[key] for row in self.rows if key in row]


def trainer(tmp_path, callback, student=None, data=None, batch=4, together=True, callbacks=None, **settings):
    seen = Seen()
    settings = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no"} | settings
    arguments = TrainingArguments(
        tmp_path, use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=batch, **settings
    )
    run = Trainer(
        student or model(),
        arguments,
        train_dataset=data or samples(),
        eval_dataset=samples()[:8],
        data_collator=default_data_collator,
        compute_loss_func=callback.compute_loss if together else None,
        callbacks=[callback, seen] if callbacks is None else callbacks,
    )
    return run, seen


def in_order(run):
    """Batches in the order of the samples."""
    run._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(run.train_dataset)
    return run


@pytest.mark.parametrize("target", ["tokens", "last_layer"])
@pytest.mark.parametrize("p_max", [0.0, 0.8])
def test_the_first_loss_is_that_of_layerskip_loss_and_the_next_are_lower(tmp_path, target, p_max):
    settings = {"p_max": p_max, "e_scale": 1.0, "curriculum": "none", "exit_target": target}
    direct = LayerSkipLoss(**settings)
    student = model().train()
    expected = float(direct(student, TOKENS[:4]).detach())
    direct.release()
    run, seen = trainer(tmp_path, LayerSkipCallback(LayerSkipLoss(**settings)), student, max_steps=12)
    in_order(run).train()
    losses = seen.of("loss")
    assert losses[0] == pytest.approx(expected, rel=1e-5) and losses[-1] < losses[0] - 0.3
    assert_untouched(student)


@pytest.mark.parametrize("target", ["tokens", "last_layer"])
def test_padding_and_accumulation_are_those_of_one_batch(tmp_path, target):
    """Micro-batches with unequal numbers of tokens give the loss of all tokens together."""
    data, results = samples(padding=4), []
    for batch in (4, 1):
        loss = LayerSkipLoss(p_max=0.0, e_scale=0.5, curriculum="none", exit_target=target)
        settings = {"gradient_accumulation_steps": 4 // batch, "max_steps": 1}
        run, seen = trainer(tmp_path, LayerSkipCallback(loss), data=data, batch=batch, **settings)
        in_order(run).train()
        results += seen.of("loss")
    assert results[0] == pytest.approx(results[1], rel=1e-4)

    student, batch = model(), default_data_collator(data[:4])
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        states = student.model(**inputs, output_hidden_states=True).hidden_states
        logits = [student.lm_head(student.model.norm(s)) for s in states[1:-1]] + [student.lm_head(states[-1])]
    counted = batch["labels"][:, 1:] != -100
    rows = [found[:, :-1][counted] for found in logits]
    labels = batch["labels"][:, 1:][counted]
    values = [F.cross_entropy(found, labels) for found in rows]
    if target == "last_layer":
        p = rows[-1].softmax(-1)
        values[:-1] = [(p * (p.log() - found.log_softmax(-1))).sum(-1).mean() for found in rows[:-1]]
    weights = exit_weights(exit_scales(LAYERS, 0.5), [True] * LAYERS)
    expected = sum(weight * values[layer] for layer, weight in weights.items())
    assert results[0] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("batch", [4, 1])
def test_without_early_exits_and_dropout_it_is_the_trainer_s_own_loss_and_gradient(tmp_path, batch):
    found = []
    callback = LayerSkipCallback(LayerSkipLoss(p_max=0.0, e_scale=0.0))
    for own in (True, False):
        seen = Seen()
        callbacks = [seen] if own else [callback, seen]
        settings = {"gradient_accumulation_steps": 4 // batch, "batch": batch, "together": not own}
        run, _ = trainer(tmp_path, callback, data=samples(padding=4), callbacks=callbacks, **settings)
        in_order(run).train()
        found.append((seen.of("loss"), seen.of("grad_norm")))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


def test_steps_and_schedules_follow_the_trainer(tmp_path):
    loss = LayerSkipLoss(p_max=0.5, rotation=2, dropout_schedule="exponential", curriculum="gradual")
    seen = []

    class Watching(TrainerCallback):
        def on_substep_end(self, args, state, control, **_):
            seen.append((state.global_step, loss.step, loss._calls, loss.skip_rates(LAYERS)[-1], loss.steps))

    callback = LayerSkipCallback(loss)
    run, _ = trainer(tmp_path, callback, callbacks=[callback, Watching()], batch=2, gradient_accumulation_steps=2)
    run.train()
    rates = [0.0, 0.5 * (2**0.5 - 1), 0.5]
    assert seen == [(step, step, 1, pytest.approx(rate, abs=1e-12), 3) for step, rate in enumerate(rates)]
    assert exits_trained(loss.curriculum, LAYERS, loss.step, loss.steps, 2) == [True] * LAYERS


def test_evaluation_is_of_all_exits_without_dropout_and_training_goes_on_behind_it(tmp_path):
    settings = {"p_max": 0.8, "e_scale": 1.0, "rotation": 2}
    callback = LayerSkipCallback(LayerSkipLoss(**settings))
    start = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "per_device_eval_batch_size": 8}
    run, seen = trainer(tmp_path, callback, **start)
    plain, without = trainer(tmp_path, LayerSkipCallback(LayerSkipLoss(**settings)))
    run.train()
    plain.train()
    assert seen.of("loss") == without.of("loss")
    with torch.no_grad():
        for found, student in ((seen.of("eval_loss")[0], model()), (seen.of("eval_loss")[-1], run.model.eval())):
            expected = LayerSkipLoss(p_max=0.0, e_scale=1.0)(student, TOKENS[:8])
            assert found == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_changes_no_loss(tmp_path):
    losses = []
    for on in (False, True):
        loss = LayerSkipLoss(p_max=0.8, e_scale=1.0, curriculum="none", activation_checkpointing=on)
        student = model(attention_dropout=0.1)
        run, seen = trainer(tmp_path, LayerSkipCallback(loss), student, gradient_checkpointing=on)
        run.train()
        assert student.is_gradient_checkpointing is on
        losses.append(seen.of("loss"))
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_adapters_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    student = peft.get_peft_model(model(), peft.LoraConfig(r=4, target_modules=["up_proj", "down_proj"]))
    callback = LayerSkipCallback(LayerSkipLoss(e_scale=1.0, curriculum="none"))
    run, seen = trainer(tmp_path, callback, student, max_steps=8, learning_rate=0.1)
    run.train()
    assert seen.of("loss")[-1] < seen.of("loss")[0] - 0.05
    assert_untouched(student)


# --- half of it


def test_a_trainer_with_a_loss_of_its_own_is_stopped_before_its_first_step(tmp_path):
    student = model()
    run, _ = trainer(tmp_path, LayerSkipCallback(LayerSkipLoss()), student, together=False)
    with pytest.raises(RuntimeError, match=r"pass compute_loss_func=callback.compute_loss to it"):
        run.train()
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), model().parameters(), strict=True))
    assert_untouched(student)


def test_a_trainer_without_the_callback_is_stopped_before_its_first_step(tmp_path):
    student = model()
    run, _ = trainer(tmp_path, LayerSkipCallback(LayerSkipLoss()), student, callbacks=[])
    with pytest.raises(RuntimeError, match=r"pass callbacks=\[callback\] to the Trainer as well"):
        run.train()
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), model().parameters(), strict=True))


def test_an_evaluation_outside_of_the_training_is_refused_or_attached_by_hand(tmp_path):
    callback = LayerSkipCallback(LayerSkipLoss(e_scale=1.0))
    run, _ = trainer(tmp_path, callback, per_device_eval_batch_size=8)
    with pytest.raises(RuntimeError, match=r"call callback.attach\(trainer.model\) before"):
        run.evaluate()
    callback.attach(run.model)
    found = run.evaluate()["eval_loss"]
    with torch.no_grad():
        expected = LayerSkipLoss(e_scale=1.0)(run.model.eval(), TOKENS[:8])
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_samples_without_labels_are_refused(tmp_path):
    data = [{"input_ids": row["input_ids"]} for row in samples()]
    run, _ = trainer(tmp_path, LayerSkipCallback(LayerSkipLoss()), data=data)
    with pytest.raises(ValueError, match="LayerSkip needs labels; use a collator"):
        run.train()


def test_one_process_for_several_devices_is_refused(tmp_path):
    callback, student = LayerSkipCallback(LayerSkipLoss()), model()
    run, _ = trainer(tmp_path, callback, student)
    run.args._n_gpu = 2
    with pytest.raises(ValueError, match="one process per device, and this one has 2"):
        callback.on_train_begin(run.args, run.state, run.control, model=student)
    assert_untouched(student)
