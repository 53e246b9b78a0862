"""Healing after weights were dropped one by one: it helps, and no dropped weight comes back."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import tiny_llama, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from optimum_slim import BitNet, Depth, Heal, Magnitude, SlimConfig, SparseGPT, Wanda, save, slim
from optimum_slim.batches import draw
from optimum_slim.losses import Distillation
from optimum_slim.memory import shared_copy
from optimum_slim.sparse import SparseLinear


pytest.importorskip("peft")


def heal(**fields):
    rate = 1e-4 if fields.get("method") == "full" else 1e-3
    settings = {"steps": 20, "batch_size": 8, "rank": 4, "learning_rate": rate, "evaluate_every": 5, "held_out": 0.1}
    return Heal(**(settings | fields))


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


def dense():
    return tiny_llama(initializer_range=0.08)


def texts(model):
    """What the model itself says: something to learn."""
    return model.generate(token_ids(48, 1), max_new_tokens=23, do_sample=False, pad_token_id=0)


def healed(prune, step):
    model = dense()
    return model, slim(model, [prune, step], data=texts(model)).steps[-1]


def pruned(prune):
    model = dense()
    slim(model, prune, data=texts(model))
    return model


def curve(report):
    history = [row["held_out"] for row in report.tables["healing"]]
    return history[0], min(history)


def linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "proj" in name}


@pytest.mark.parametrize(
    "prune",
    [SparseGPT(sparsity="2:4"), Magnitude(sparsity=0.5), Wanda(sparsity=0.5), SparseGPT(sparsity="4:8")],
    ids=["sparsegpt 2:4", "magnitude", "wanda", "sparsegpt 4:8"],
)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_held_out_loss_falls_and_the_mask_stays(tmp_path, prune, method):
    before = pruned(prune)
    model, report = healed(prune, heal(method=method))
    first, last = curve(report)
    assert last < first and "14 sparse layers kept their mask" in report.notes[1]
    for name, layer in linears(model).items():
        old = before.get_submodule(name)
        assert type(layer) is SparseLinear and torch.equal(layer.weight, old.weight)
        assert layer.weight_rows is old.weight_rows is None or torch.equal(layer.weight_rows, old.weight_rows)
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        changed = method == "full" or "mlp" in name
        assert torch.equal(layer.weight_values, old.weight_values) != changed
    assert not hasattr(model, "peft_config")
    save(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert [step.name for step in again.config.quantization_config.steps] == [prune.name, "heal"]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_zeros_of_ordinary_layers_stay_zeros(method, dtype):
    model = dense().to(dtype)
    data = texts(model)
    slim(model, Magnitude(sparsity=0.5, packed=False))
    before = {name: module.weight.clone() for name, module in linears(model).items()}
    student = shared_copy(model)
    settings = {"method": method, "loss": "next_token", "learning_rate": 3e-3}
    report = slim(student, heal(**settings), data=data).steps[-1]
    assert curve(report)[1] < curve(report)[0]
    for name, old in before.items():
        new = student.get_submodule(name).weight
        assert type(student.get_submodule(name)) is nn.Linear and new.dtype == dtype and new.requires_grad
        assert bool((new[old == 0] == 0).all())
        changed = method == "full" or "mlp" in name
        assert torch.equal(new, old) != changed
        assert torch.equal(model.get_submodule(name).weight, old)


def test_norms_heal_around_sparse_layers():
    before = pruned(Magnitude(sparsity=0.5))
    model, report = healed(Magnitude(sparsity=0.5), heal(method="norms"))
    assert curve(report)[1] < curve(report)[0]
    assert all(torch.equal(m.weight_values, before.get_submodule(n).weight_values) for n, m in linears(model).items())


def test_packed_or_not_heals_alike():
    packed, _ = healed(Magnitude(sparsity=0.5), heal(dropout=0.0))
    zeros, report = healed(Magnitude(sparsity=0.5, packed=False), heal(dropout=0.0))
    assert "14 sparse layers kept their mask" in report.notes[1] and not hasattr(zeros.config, "quantization_config")
    torch.testing.assert_close(logits(packed), logits(zeros), rtol=1e-4, atol=1e-4)


def test_layers_of_codes_end_as_good_as_the_training_says():
    prune, step = Magnitude(sparsity="2:4", bits=4), heal(learning_rate=3e-3, target_modules="all-linear")
    teacher, before = dense(), pruned(prune)
    model, report = healed(prune, step)
    assert curve(report)[1] < curve(report)[0]
    data = texts(teacher)
    held, _ = draw(len(data), step.held_out, step.steps, step.batch_size, step.seed)
    with torch.no_grad():
        found = float(Distillation(teacher)(model, data[held]))
    assert found == pytest.approx(curve(report)[1], rel=1e-3)
    changed = 0
    for name, layer in linears(model).items():
        old = before.get_submodule(name)
        for key in ("weight", "weight_scale", "weight_zero"):
            assert torch.equal(getattr(layer, key), getattr(old, key))
        changed += not torch.equal(layer.weight_values, old.weight_values)
    assert changed


def test_transposed_layers_heal():
    torch.manual_seed(0)
    for packed in (True, False):
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=128, n_positions=64, n_inner=48)
        model = GPT2LMHeadModel(config).eval()
        data = model.generate(token_ids(24, 1), max_new_tokens=23, do_sample=False, pad_token_id=0)
        report = slim(model, [Magnitude(sparsity="2:4", packed=packed), heal()], data=data).steps[-1]
        assert curve(report)[1] < curve(report)[0]
        layer = model.transformer.h[0].mlp.c_fc
        weight = layer.dense() if packed else layer.weight.T
        assert bool((weight.view(48, 8, 4).count_nonzero(-1) <= 2).all())


def test_an_adapter_that_stays_is_masked_and_saved_with_its_sparse_base(tmp_path):
    from peft import PeftModel

    model, _ = healed(SparseGPT(sparsity="2:4"), heal(merge=False))
    out = save(model, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(base), logits(pruned(SparseGPT(sparsity="2:4"))))
    again = PeftModel.from_pretrained(base, out / "adapter")
    torch.testing.assert_close(logits(again), logits(model))
    merged = again.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) is SparseLinear
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prune", [SparseGPT(sparsity="2:4"), Magnitude(sparsity="2:4")])
def test_while_loading(tmp_path, prune):
    model = dense()
    data = texts(model)
    model.save_pretrained(tmp_path / "dense")
    config = SlimConfig([prune, heal()], calibration=data)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    expected, _ = healed(prune, heal())
    torch.testing.assert_close(logits(loaded), logits(expected))
    loaded.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(loaded))


@pytest.mark.parametrize("prune", [SparseGPT(sparsity="2:4"), Magnitude(sparsity=0.5, packed=False)])
def test_a_training_that_fails_leaves_the_pruned_model(prune):
    model, expected = dense(), pruned(prune)
    broken = heal(loss="next_token", learning_rate=1e38, max_grad_norm=1e38)
    with pytest.raises(FloatingPointError, match="learning_rate"):
        slim(model, [prune, broken], data=texts(model))
    assert torch.equal(logits(model), logits(expected))
    assert {type(layer) for layer in linears(model).values()} == {type(m) for m in linears(expected).values()}


KILLED = """
import os, signal, sys, torch
from helpers import tiny_llama, token_ids
from optimum_slim import Heal, SparseGPT, slim
import optimum_slim.journal as journal

write, count = journal.Journal.write, 0
def counted(self, entry):
    global count
    write(self, entry)
    count += 1
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
journal.Journal.write = counted
model = tiny_llama()
step = Heal(steps=60, batch_size=2, rank=4, learning_rate=3e-3, evaluate_every=20, held_out=0.1)
report = slim(model, [SparseGPT(sparsity="2:4"), step], data=token_ids(16, 12))
torch.save([model.state_dict(), report.notes], sys.argv[1])
"""


@pytest.mark.slow
def test_a_run_killed_while_healing_goes_on_and_ends_with_the_same_bits(tmp_path):
    def run(cache, out, kill_at):
        paths = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "OPTIMUM_SLIM_CACHE": str(tmp_path / cache),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        words = [sys.executable, "-c", KILLED, str(tmp_path / out), str(kill_at)]
        return subprocess.run(words, env=environment, capture_output=True, text=True)

    assert run("one", "left_alone.pt", 0).returncode == 0
    assert run("two", "resumed.pt", 1).returncode == -signal.SIGKILL
    done = run("two", "resumed.pt", 0)
    assert done.returncode == 0, done.stderr[-2000:]
    (expected, _), (found, notes) = (torch.load(tmp_path / name) for name in ("left_alone.pt", "resumed.pt"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any("resumed from step 50" in note for note in notes)


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([Magnitude(sparsity="2:4"), Heal(method="qlora")], "use method='lora', which keeps the mask"),
        ([Magnitude(sparsity="2:4", packed=False), Heal(method="qlora")], "use method='lora', which keeps the mask"),
        ([Magnitude(sparsity="2:4", bits=4), Heal(method="full")], "codes of 4 bits"),
        ([Magnitude(sparsity="2:4", packed=False), Heal(merge=False)], "PEFT knows no mask"),
        ([Magnitude(sparsity="2:4"), Depth(drop=1)], "put depth before magnitude"),
        ([BitNet(force=True), Magnitude(sparsity="2:4"), Heal()], "put heal before bitnet"),
        ([Magnitude(sparsity="2:4"), BitNet(force=True), Heal()], "put heal before bitnet"),
    ],
)
def test_recipes_that_cannot_work_are_refused_before_anything_is_done(steps, says):
    with pytest.raises(ValueError, match=says):
        SlimConfig(steps)


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (heal(loss="next_token", method="qlora"), "use method='lora'"),
        (heal(loss="next_token", merge=False), "PEFT knows no mask"),
    ],
)
def test_models_that_came_pruned_are_refused_where_the_mask_would_be_lost(step, says):
    pytest.importorskip("bitsandbytes")
    model = pruned(Magnitude(sparsity=0.5, packed=False))
    expected = logits(model)
    with pytest.raises(ValueError, match=says):
        slim(model, step, data=token_ids(16, 12))
    assert torch.equal(logits(model), expected) and not model._hf_peft_config_loaded
    assert all(type(layer) is nn.Linear for layer in linears(model).values())
