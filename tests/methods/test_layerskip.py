"""LayerSkip as a step: middle layers learn to be outputs, and what comes out is an ordinary model."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import tiny_llama, token_ids
from transformers import AutoModelForCausalLM
from walk_models import assert_untouched

from optimum_slim import LayerSkip, Magnitude, SlimConfig, slim
from optimum_slim.losses import next_token_loss
from optimum_slim.methods.layerskip import PRESETS
from optimum_slim.sparse import SparseLinear
from optimum_slim.walk import skipping


LAYERS = 4
TEXT = (
    torch.arange(12) * torch.arange(1, 5).repeat(8)[:, None] + torch.arange(32)[:, None]
) % 32  # counting by 1 to 4


def layerskip(**fields):
    rate = 3e-3 if fields.get("method", "full") == "full" else 3e-2
    settings = {"steps": 24, "batch_size": 4, "rank": 4, "learning_rate": rate, "evaluate_every": 6, "held_out": 0.1}
    return LayerSkip(**settings | {"e_scale": 1.0, "rotation": 2, "tune": False} | fields)


def untrained():
    return tiny_llama(num_hidden_layers=LAYERS)


def trained(step, model=None):
    model = model or untrained()
    return model, slim(model, step, data=TEXT).steps[-1]


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


def loss_at(model, layer):
    """The next-token loss of the model cut behind a layer."""
    with torch.no_grad(), skipping(model.model.layers[layer + 1 :]):
        return float(next_token_loss(model, TEXT))


@pytest.mark.parametrize("method", ["full", "lora", "norms"])
def test_exits_in_the_middle_learn_and_the_model_is_an_ordinary_one(tmp_path, method):
    if method == "lora":
        pytest.importorskip("peft")
    model, report = trained(layerskip(method=method))
    before = untrained()
    for layer in (1, 2, LAYERS - 1):
        assert loss_at(model, layer) < loss_at(before, layer) - (0.01 if method == "norms" else 0.3)
    assert [row["step"] for row in report.tables["training"]] == [0, 6, 12, 18, 24]
    assert f"early exits trained ({method})" in report.notes[0]
    assert_untouched(model)
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.state_dict().keys() == before.state_dict().keys() and type(again) is type(before)
    assert torch.equal(logits(again), logits(model))
    assert model.config.slim[-1]["step"] == "layerskip"


def test_exits_that_imitate_the_last_layer_say_what_it_says():
    agreements = []
    for model in (untrained(), trained(layerskip(exit_target="last_layer", exit_scales="uniform", steps=40))[0]):
        with torch.no_grad():
            last = model(TEXT).logits.argmax(-1)
            with skipping(model.model.layers[2:]):
                agreements.append(float((model(TEXT).logits.argmax(-1) == last).float().mean()))
    assert agreements[1] > agreements[0] + 0.2


def test_a_loss_that_is_not_finite_leaves_the_model_as_it_was():
    model = untrained()
    with pytest.raises(FloatingPointError, match="learning_rate"):
        trained(layerskip(learning_rate=1e38, max_grad_norm=1e38), model)
    assert torch.equal(logits(model), logits(untrained()))
    assert_untouched(model)


def test_a_layer_that_all_samples_skip_keeps_its_weights():
    skipped, _ = trained(layerskip(p_max=1.0, weight_decay=0.1))
    kept = dict(untrained().named_parameters())
    changed = {name for name, value in skipped.named_parameters() if not torch.equal(value, kept[name])}
    assert not any(f"layers.{LAYERS - 1}." in name for name in changed) and any(
        "layers.0." in name for name in changed
    )


def weights(model):
    layers = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
    return {name: m.dense() if isinstance(m, SparseLinear) else m.weight for name, m in layers.items()}


@pytest.mark.parametrize("prune", [Magnitude(sparsity=0.5), Magnitude(sparsity="2:4", packed=False)])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_no_dropped_weight_of_a_sparse_model_comes_back(prune, method):
    if method == "lora":
        pytest.importorskip("peft")

    before = untrained()
    slim(before, prune)
    model, report = trained([prune, layerskip(method=method)])
    old, new = weights(before), weights(model)
    assert old.keys() == new.keys() and len(old) == 7 * LAYERS
    for name, weight in old.items():
        assert not new[name][weight == 0].any() and 0.45 < (weight == 0).float().mean() < 0.55
    assert any(not torch.equal(new[name], weight) for name, weight in old.items())
    assert f"{7 * LAYERS} sparse layers kept their mask" in report.notes[1]
    assert loss_at(model, 2) < loss_at(before, 2)


KILLED = """
import os, signal, sys, torch
from helpers import tiny_llama, token_ids
from optimum_slim import LayerSkip, slim
import optimum_slim.journal as journal

write, count = journal.Journal.write, 0
def counted(self, entry):
    global count
    write(self, entry)
    count += 1
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
journal.Journal.write = counted
model = tiny_llama(num_hidden_layers=3, attention_dropout=0.1)
settings = {"steps": 120, "batch_size": 2, "micro_batch_size": 1, "evaluate_every": 30, "held_out": 0.1}
step = LayerSkip(tune=False, p_max=0.5, rotation=2, dropout_schedule="exponential", curriculum="gradual", **settings)
report = slim(model, step, data=token_ids(16, 8))
torch.save([model.state_dict(), report.notes], sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path):
    def run(cache, out, kill_at):
        paths = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "OPTIMUM_SLIM_CACHE": str(tmp_path / cache),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        words = [sys.executable, "-c", KILLED, str(tmp_path / out), str(kill_at)]
        return subprocess.run(words, env=environment, capture_output=True, text=True)

    assert run("one", "left_alone.pt", 0).returncode == 0
    assert run("two", "resumed.pt", 2).returncode == -signal.SIGKILL
    done = run("two", "resumed.pt", 0)
    assert done.returncode == 0, done.stderr[-2000:]
    (expected, _), (found, notes) = (torch.load(tmp_path / name) for name in ("left_alone.pt", "resumed.pt"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any("resumed from step" in note for note in notes)


@pytest.mark.parametrize(
    ("name", "p_max", "e_scale", "curriculum", "rotation", "schedule", "rate"),
    [
        ("llama2-7b", 0.1, 0.2, "rotational", 8, "constant", 3e-5),
        ("llama2-13b", 0.1, 0.1, "rotational", 39, "constant", 2e-5),
        ("llama3", 0.1, 0.1, "rotational", 8, "constant", None),
        ("scratch-1.5b", 0.1, 0.2, "rotational", 23, "exponential", 8e-4),
        ("scratch-7b", 0.2, 0.2, "rotational", 31, "exponential", 8e-4),
        ("code", 0.1, 1.0, "rotational", 16, "constant", None),
        ("topv2", 0.2, 1.0, "gradual", None, "constant", None),
    ],
)
def test_presets_have_the_paper_s_values(name, p_max, e_scale, curriculum, rotation, schedule, rate):
    step = LayerSkip.preset(name, steps=7)
    assert (step.p_max, step.e_scale, step.curriculum, step.dropout_schedule) == (p_max, e_scale, curriculum, schedule)
    assert rotation in (None, step.rotation) and step.learning_rate == (rate or LayerSkip().learning_rate)
    assert (step.exit_scales, step.exit_target, step.method, step.steps) == ("sum", "tokens", "full", 7)
    assert LayerSkip.preset(name, p_max=0.3).p_max == 0.3


def test_unknown_presets_and_wrong_fields_are_refused():
    with pytest.raises(ValueError, match=f"unknown preset 'llama4'; .*{', '.join(PRESETS)}"):
        LayerSkip.preset("llama4")
    for fields, says in (
        ({"p_max": 2}, "p_max"),
        ({"rotation": 0}, "rotation"),
        ({"exit_target": "x"}, "exit_target"),
    ):
        with pytest.raises(ValueError, match=says):
            LayerSkip(**fields)


def test_it_runs_while_loading(tmp_path):
    untrained().save_pretrained(tmp_path / "dense")
    config = SlimConfig([layerskip(steps=6)], calibration=TEXT)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    direct, _ = trained(layerskip(steps=6))
    assert torch.equal(logits(model), logits(direct))
    assert_untouched(model)
