"""What the tests of several processes run, in each of them and, to compare with, in one.

    torchrun --nproc-per-node 2 process_cases.py FOLDER CASE ...

writes what each case returned, by its name, to FOLDER/0.pt and FOLDER/1.pt.
"""

import contextlib
import copy
import importlib.util
import os
import signal
import sys
import traceback
from functools import partial
from pathlib import Path

import torch
from helpers import tiny_llama, token_ids
from torch import nn
from torch.distributed.tensor import DTensor

from optimum_slim import BitNet, BitNetTraining, Calibration, Heal, LayerSkipLoss, Minitron, OneBit, save, slim
from optimum_slim.distance import block_influence, last_token_states
from optimum_slim.hidden_states import projected
from optimum_slim.importance import importance
from optimum_slim.lens import lens
from optimum_slim.losses import TEACHER
from optimum_slim.student import own_tensors
from optimum_slim.teacher_correction import RATE, CorrectedDistillation, trained_along
from optimum_slim.train import Distillation, fit, next_token_loss


SETTINGS = {"steps": 6, "learning_rate": 1e-2, "batch_size": 4, "held_out": 0.2, "evaluate_every": 2}
TOKENS = token_ids(20, 8, seed=3) % 16  # few different tokens, so that there is something to learn


class Stop(Exception):
    pass


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained(model=None, loss=next_token_loss, **changes):
    """What `fit` leaves: the parameters and the report."""
    model = tiny_llama() if model is None else model
    report = fit(model, TOKENS, loss, **SETTINGS | changes)
    assert all(type(p) is nn.Parameter for p in model.parameters()) and type(model).__name__[:4] != "FSDP"
    return {"values": values(model), "history": report.history}


def same(ours, theirs):
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def sharing(model):
    """A second model over the same parameter tensors."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def under_fsdp(function, version="2"):
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": version}
    try:
        return function()
    finally:
        del os.environ["ACCELERATE_USE_FSDP"], os.environ["FSDP_VERSION"]


# --- in one process, in two, and in two sharded: `fit`


def next_token():
    return trained(micro_batch_size=1)


def one_held_out():
    """Fewer held-out samples than processes."""
    return trained(held_out=0.05, max_grad_norm=0.1, weight_decay=0.1)


def tied():
    """Tied embeddings, odd sizes, activation checkpointing, no held-out samples."""
    model = tiny_llama(tie_word_embeddings=True, vocab_size=127, intermediate_size=51)
    return trained(model, held_out=0.0, activation_checkpointing=True)


def distilled():
    """Norms and a matrix learn from a teacher that shares everything else; the best step is not the last one."""
    model = tiny_llama(num_hidden_layers=3)
    teacher = sharing(model)
    expected = teacher(TOKENS).logits
    model.requires_grad_(False)
    names = [name for name in values(model) if "norm" in name or name.endswith("1.mlp.down_proj.weight")]
    own_tensors(model, names, {}, trained=True)
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    found = trained(model, loss := Distillation(teacher, hidden_weight=0.5, seams=[(0, 0), (2, 2)]))
    assert loss.teacher is teacher and torch.equal(teacher(TOKENS).logits, expected)
    return found


def narrow():
    """A student of another width, behind a map that is trained with it and called outside of its forward pass.

    The dynamic weight is that of a micro-batch, so those must be the same.
    """
    model = tiny_llama(seed=1, hidden_size=48, head_dim=16, num_hidden_layers=3)
    teacher = tiny_llama(num_hidden_layers=3)
    loss = Distillation(teacher, hidden_weight="dynamic", seams=[(-1, -1), (0, 0)], hidden_distance="cosine")
    with projected(model, teacher):
        return trained(model, loss, micro_batch_size=1)


def corrected_alongside():
    """Student and teacher take their steps together, at rates of their own."""
    student, teacher = tiny_llama(seed=1), tiny_llama()
    with trained_along(student, teacher):
        return trained(student, CorrectedDistillation(teacher), rates={TEACHER: RATE})


def exits():
    """The last layer, skipped by every sample, is in the loss of no process; the exit before it is trained."""
    loss = LayerSkipLoss(p_max=1.0, e_scale=1.0, curriculum="none")
    return trained(loss=loss, micro_batch_size=1)


def exits_taught():
    """Exits learn from the last layer, one at a time; their logits are computed twice."""
    loss = LayerSkipLoss(
        p_max=0.0, exit_scales="uniform", rotation=2, exit_target="last_layer", activation_checkpointing=True
    )
    return trained(tiny_llama(num_hidden_layers=3), loss, before_step=loss.before_step, activation_checkpointing=True)


def lora():
    """Adapters in fp32 on a frozen base in bf16, half of it packed."""
    import peft

    model = tiny_llama().to(torch.bfloat16)
    slim(model, BitNet(force=True, modules_to_not_convert=["lm_head", "layers.0"]))
    torch.manual_seed(1)
    targets = ["up_proj", "down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    assert any(p.dtype is torch.uint8 for p in model.parameters())
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    return trained(model, learning_rate=0.1)


def in_bf16():
    return trained(mixed_precision="bf16")


# --- in the same ways: whole recipes, and what is measured in shares


def slimmed(step, spread=0.2):
    model = tiny_llama(initializer_range=spread)
    report = slim(model, step, data=Calibration(source=TOKENS))
    tables = report.steps[-1].tables
    return {"values": values(model), "history": tables.get("healing") or tables["training"]}


def recipe():
    """A model made narrower and healed."""
    heal = Heal(method="full", steps=4, batch_size=4, learning_rate=1e-3, evaluate_every=2)
    return slimmed([Minitron(intermediate_size=64, hidden_size=48), heal])


def bitnet():
    """Layers that round their weights, in part at first, and a loss with a part that needs the teacher, too."""
    training = {"steps": 4, "lambda_steps": 2, "batch_size": 4, "evaluate_every": 2, "learning_rate": 1e-3}
    return slimmed(BitNetTraining(**training, relation_weight=1.0))


def onebit():
    return slimmed(OneBit(steps=4, batch_size=4, evaluate_every=2), spread=0.02)


def measured():
    """Scores, from more samples than processes, whose number they do not divide, and from fewer."""
    model = tiny_llama()
    found = {
        f"{name} of {count}": getattr(importance(model, TOKENS[:count], batch_size=2), name)
        for count in (5, 1)
        for name in ("neurons", "heads", "channels", "layers", "energy")
    }
    found["last states"] = last_token_states(model, TOKENS[:5], batch_size=2)
    found["block influence"] = block_influence(model, TOKENS[:5], batch_size=2)
    found |= {
        f"{name} of {count}": torch.tensor(getattr(lens(model, TOKENS[:count], batch_size=2), name))
        for count in (5, 1)
        for name in ("agreement", "settled", "first", "loss", "top_probability")
    }
    return found


TRAINED = [next_token, one_held_out, tied, distilled, narrow, corrected_alongside, in_bf16, recipe, bitnet, onebit]
TRAINED += [exits, exits_taught]
TRAINED += [lora] if importlib.util.find_spec("peft") else []
CASES = {f.__name__: f for f in [*TRAINED, measured]}
CASES |= {f"{f.__name__}_sharded": partial(under_fsdp, f) for f in TRAINED}


# --- what only several processes do, some with a folder of theirs


def skipping():
    """One sample at a time, so that either process skips whole layers that the other one enters."""
    loss = LayerSkipLoss(p_max=1.0, e_scale=1.0, rotation=2)
    model = tiny_llama(num_hidden_layers=4)
    return trained(model, loss, micro_batch_size=1, before_step=loss.before_step)


CASES |= {"skipping": skipping, "skipping_sharded": partial(under_fsdp, skipping)}


FOLDER: Path | None = None


def case(function):
    CASES[function.__name__] = function
    return function


@case
def shards():
    """Elements of parameters and of the optimizer's state in this process, and in all."""
    counts, step = {}, torch.optim.AdamW.step

    def counted(self, *args, **kwargs):
        found = step(self, *args, **kwargs)
        moments = [t for state in self.state.values() for t in state.values() if t.dim()]
        assert all(isinstance(t, DTensor) for t in moments)
        counts["moments"] = sum(t.to_local().numel() for t in moments)
        counts["gradients"] = sum(p.grad.to_local().numel() for group in self.param_groups for p in group["params"])
        return found

    def loss(model, ids):
        counts["parameters"] = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
        counts["whole"] = sum(p.numel() for p in model.parameters())
        counts["uncut"] = sum(not isinstance(p, DTensor) for p in model.parameters())
        return next_token_loss(model, ids)

    torch.optim.AdamW.step = counted
    try:
        under_fsdp(lambda: trained(loss=loss))
    finally:
        torch.optim.AdamW.step = step
    return counts


@case
def fsdp1():
    try:
        under_fsdp(trained, version="1")
    except ValueError as error:
        return str(error)


@case
def resumed():
    """A sharded run that was stopped twice and went on, against one that was not."""
    calls = 0

    def stopping(at):
        def loss(model, ids):
            nonlocal calls
            calls += torch.is_grad_enabled()
            if calls == at:
                raise Stop
            return next_token_loss(model, ids)

        return loss

    def run(loss, **options):
        model = tiny_llama(attention_dropout=0.3)
        report = fit(model, TOKENS, loss, **SETTINGS | {"steps": 9, "micro_batch_size": 1} | options)
        return values(model), report.history, report.resumed_from

    def all_runs():
        nonlocal calls
        journal = {"journal": FOLDER / "journal", "journal_every": 2}
        for at in (5, 9):
            calls = 0
            with contextlib.suppress(Stop):
                run(stopping(at), **journal)
        return run(stopping(-1)), run(stopping(-1), **journal), run(stopping(1), **journal)

    return under_fsdp(all_runs)


@case
def not_a_number():
    """The parameters after a NaN at step 4, against the best before."""

    def spoilt(model, ids):
        nonlocal calls
        calls += torch.is_grad_enabled()
        value = next_token_loss(model, ids)
        return value * float("nan") if calls == 4 else value

    def run():
        try:
            fit(model, TOKENS, spoilt, **SETTINGS | {"journal": FOLDER / "nan"})
        except FloatingPointError as error:
            return str(error)

    model, calls = tiny_llama(), 0
    message = under_fsdp(run)
    return message, values(model), [path.name for path in FOLDER.glob("nan/*")]


@case
def saved():
    """Where both save to, what is there, what comes of an existing folder, and the main process saving alone."""
    model = tiny_llama()
    out = save(model, FOLDER / "saved")
    written = sorted(path.name for path in out.iterdir())
    try:
        save(model, FOLDER / "saved")
    except (FileExistsError, RuntimeError) as error:
        failure = f"{type(error).__name__}: {error}"
    if os.environ["RANK"] == "0":
        save(model, FOLDER / "saved", overwrite=True)
    return str(out), model.name_or_path, written, failure


@case
def refused():
    """What is said about different weights, and about files."""
    model, messages = tiny_llama(seed=int(os.environ["RANK"])), []
    for act in (
        lambda: importance(model, TOKENS),
        lambda: slim("somewhere", "bitnet", out=FOLDER / "out"),
    ):
        try:
            act()
        except ValueError as error:
            messages.append(str(error))
    return messages


@case
def killable():
    """A run with a journal that ends with a kill at the training call KILL_AT, if that is set."""
    calls = 0

    def loss(model, ids):
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls == int(os.environ.get("KILL_AT", "-1")):
            os.kill(os.getpid(), signal.SIGKILL)
        return next_token_loss(model, ids)

    model = tiny_llama(attention_dropout=0.3)
    settings = {"journal": FOLDER and FOLDER / "journal", "journal_every": 2, "micro_batch_size": 2}
    report = fit(model, TOKENS, loss, **SETTINGS | settings)
    return values(model), report.history, report.resumed_from


if __name__ == "__main__":
    torch.set_num_threads(1)
    FOLDER, results = Path(sys.argv[1]), {}
    for name in sys.argv[2:]:
        try:
            results[name] = CASES[name]()
        except Exception:
            results[name] = traceback.format_exc()
    torch.save(results, FOLDER / f"{os.environ.get('RANK', '0')}.pt")
