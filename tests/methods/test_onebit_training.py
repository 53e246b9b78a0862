"""OneBit trained, block by block and by distillation."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import tiny_llama, token_ids
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from optimum_slim import Calibration, Depth, OneBit, SignLinear, SlimConfig, slim
from optimum_slim.memory import shared_copy
from optimum_slim.sign_training import LatentSignLinear, SignDistillation


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = token_ids()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def distance(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


FAST = {"batch_size": 4, "evaluate_every": 5, "held_out": 0.2, "learning_rate": 2e-3, "block_learning_rate": 2e-3}
STAGES = {"distill": {"steps": 20}, "blocks": {"block_steps": 20}}
BOTH = {"steps": 20, "block_steps": 20}


def texts(model, samples=64, length=16):
    """What the model itself says: something to learn."""
    return model.generate(token_ids(samples, 1), max_new_tokens=length - 1, do_sample=False, pad_token_id=0)


def trained(stage, model=None, **fields):
    """A model trained on its own texts, the report of the step, and the untrained start."""
    model, start = model or tiny_llama(), tiny_llama()
    data = texts(start)
    report = slim(model, OneBit(**(FAST | {"samples": 24} | stage | fields)), data=data).steps[-1]
    slim(start, OneBit(variant=fields.get("variant", "plain")))
    return model, report, start


EACH_STAGE = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)


@EACH_STAGE
@pytest.mark.parametrize("variant", ["plain", "paper"])
def test_training_lowers_the_held_out_loss(tmp_path, stage, variant):
    dense = logits(tiny_llama())
    model, report, start = trained(stage, variant=variant)
    if "steps" in stage:
        rows = report.tables["training"]
        assert min(row["held_out"] for row in rows) < 0.95 * rows[0]["held_out"]
    else:
        assert all(row["after"] < 0.95 * row["before"] for row in report.tables["blocks"])
    if variant == "plain":
        assert distance(logits(model), dense) < 0.95 * distance(logits(start), dense)
    layers = [module for module in model.modules() if isinstance(module, SignLinear)]
    assert len(layers) == 14 and all(layer.post_norm == (variant == "paper") for layer in layers)
    assert not any(isinstance(module, LatentSignLinear) for module in model.modules())
    assert any(not torch.equal(ours, theirs) for ours, theirs in zip(signs(model), signs(start), strict=True))
    assert report.step["start"] == ("signs" if variant == "paper" else "weights")
    model.save_pretrained(tmp_path / "slim")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert torch.equal(logits(again), logits(model))


def signs(model):
    return [module.weight for module in model.modules() if isinstance(module, SignLinear)]


def test_reports_say_how_it_went():
    _, report, _ = trained(STAGES["distill"])
    rows = report.tables["training"]
    assert [row["step"] for row in rows] == [0, 5, 10, 15, 20] and rows[-1]["held_out"] < rows[0]["held_out"]
    assert report.notes[0].startswith("trained all layers together: 20 steps, 1,280 tokens, held-out loss")
    assert len(report.layers) == 14 and report.layers[0]["relative_error"] > 0.3
    _, report, _ = trained(STAGES["blocks"])
    rows = report.tables["blocks"]
    assert [row["name"] for row in rows] == ["model.layers.0", "model.layers.1"]
    for row in rows:
        assert row["after"] < row["before"]
        assert row["finished"] == pytest.approx(row["after"], rel=1e-3)  # packed layers do what was trained
    assert report.notes[0].startswith("trained 2 decoder layers one by one: 40 steps")


def test_the_second_stage_goes_on_where_the_first_ended():
    fields = {"block_steps": 4, "learning_rate": 5e-4, "samples": 64}
    both, report, start = trained(fields | {"steps": 20})
    blocks, alone, _ = trained(fields)
    for ours, theirs in zip(report.tables["blocks"], alone.tables["blocks"], strict=True):
        assert ours["after"] == pytest.approx(theirs["after"], rel=1e-3)
    teacher = tiny_llama()
    loss = SignDistillation(teacher)
    with torch.no_grad():
        losses = [float(loss(model, texts(teacher))) for model in (start, blocks, both)]
    assert losses[2] < 0.9 * losses[1] < 0.8 * losses[0]
    rows = [row["held_out"] for row in report.tables["training"]]
    assert rows[-1] < 0.9 * rows[0] and len(report.notes) == 2


def test_decoder_layers_left_dense_are_passed_through():
    model, report, _ = trained(STAGES["blocks"], modules_to_not_convert=("model.layers.0",))
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert [row["steps"] for row in report.tables["blocks"]] == [0, 20] and len(report.layers) == 7


@EACH_STAGE
def test_embeddings_head_and_norms_are_frozen_and_the_teacher_is_left_alone(stage):
    teacher = tiny_llama()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = shared_copy(teacher)
    step = OneBit(**FAST | stage).resolve(student)
    with torch.no_grad():
        step.apply(student, texts(teacher), teacher=teacher)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    shared = {name for name, p in student.named_parameters() if any(p is q for q in teacher.parameters())}
    norms = {f"model.layers.{i}.{name}_layernorm.weight" for i in (0, 1) for name in ("input", "post_attention")}
    assert shared == {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} | norms
    assert all(parameter.requires_grad for name, parameter in student.named_parameters() if name in shared)
    assert not any(parameter.requires_grad for name, parameter in student.named_parameters() if name not in shared)


def test_exactly_latents_scales_and_biases_are_trained(monkeypatch):
    from optimum_slim.methods import onebit

    def fit(model, *args, **kwargs):
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert names == {
            f"{layer}.{key}"
            for layer, module in model.named_modules()
            if isinstance(module, LatentSignLinear)
            for key in ("weight", "weight_in", "weight_out", "bias")
        }
        assert len(names) == 2 * 6 * 4
        raise FloatingPointError("seen")

    monkeypatch.setattr(onebit, "fit", fit)
    torch.manual_seed(0)
    config = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 128}
    model = OPTForCausalLM(OPTConfig(**config, max_position_embeddings=64, word_embed_proj_dim=32)).eval()
    with pytest.raises(FloatingPointError, match="seen"):
        slim(model, OneBit(**FAST | STAGES["distill"]), data=token_ids(24, 16))


@EACH_STAGE
def test_biases_are_trained_and_stay_in_their_dtype(stage):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=128, n_positions=64)
    model = GPT2LMHeadModel(config).to(torch.bfloat16).eval()
    before = {name: p for name, p in model.named_parameters() if name.endswith("c_fc.bias")}
    slim(model, OneBit(**FAST | stage), data=texts(model))
    for name, old in before.items():
        new = model.get_parameter(name)
        assert new.dtype == torch.bfloat16 and not torch.equal(new, old) and not old.any()


@EACH_STAGE
def test_training_that_diverges_leaves_the_model_as_it_was(stage):
    model = tiny_llama()
    before, modules = logits(model), dict(model.named_modules())
    with pytest.raises(FloatingPointError, match="learning_rate"):
        slim(model, OneBit(**FAST | stage | {"learning_rate": 1e38, "block_learning_rate": 1e38}), data=texts(model))
    assert torch.equal(logits(model), before)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@EACH_STAGE
def test_training_while_loading_and_from_a_pruned_model(dense_folder, stage):
    data = Calibration(source=texts(tiny_llama()))
    step = OneBit(hidden_weight=0.0, **FAST | dict.fromkeys(stage, 6))
    model = AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=SlimConfig(step, calibration=data))
    other = tiny_llama()
    slim(other, step, data=data)
    assert torch.equal(logits(model), logits(other))
    cut = tiny_llama(num_hidden_layers=3)
    slim(cut, [Depth(layers=(1,)), step], data=data)
    assert len(cut.model.layers) == 2 and type(cut.model.layers[1].mlp.up_proj) is SignLinear


def test_a_trained_step_is_not_streamed(dense_folder, tmp_path):
    model, _, _ = trained(STAGES["distill"], model=AutoModelForCausalLM.from_pretrained(dense_folder))
    step = OneBit(samples=24, **FAST | STAGES["distill"])
    report = slim(dense_folder, step, data=texts(tiny_llama()), out=tmp_path / "out")
    assert any("whole model in memory" in note for note in report.notes)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_layers_outside_the_decoder_layers():
    torch.manual_seed(0)
    config = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 128}
    model = OPTForCausalLM(OPTConfig(**config, max_position_embeddings=64, word_embed_proj_dim=16)).eval()
    with pytest.raises(ValueError, match=r"outside model.decoder.layers: \['model.decoder.project_out'.*steps alone"):
        slim(model, OneBit(**FAST | STAGES["blocks"]), data=token_ids(24, 16))
    slim(model, OneBit(**FAST | STAGES["distill"]), data=token_ids(24, 16))
    assert type(model.model.decoder.project_out) is SignLinear


KILLED = """
import json, os, signal, sys, torch
from helpers import tiny_llama, token_ids
from optimum_slim import OneBit, slim
import optimum_slim.journal as journal

write, count = journal.Journal.write, 0
def counted(self, entry):
    global count
    write(self, entry)
    count += 1
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
journal.Journal.write = counted
model = tiny_llama(num_hidden_layers=4)
step = OneBit(**json.loads(sys.argv[3]), batch_size=2, evaluate_every=30, held_out=0.2)
report = slim(model, step, data=token_ids(16, 12))
torch.save([model.state_dict(), report.notes], sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kill_at", "says"),
    [({"steps": 60}, 1, "resumed from step 50"), ({"block_steps": 10, "steps": 2}, 2, "2 taken from the journal")],
    ids=["distill", "blocks"],
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path, stage, kill_at, says):
    def run(cache, out, kill_at):
        paths = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "OPTIMUM_SLIM_CACHE": str(tmp_path / cache),
            "OPTIMUM_SLIM_CPU": "reference",  # the new cache holds no kernels, and building them takes longer
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        words = [sys.executable, "-c", KILLED, str(tmp_path / out), str(kill_at), json.dumps(stage)]
        return subprocess.run(words, env=environment, capture_output=True, text=True)

    alone = run("one", "left_alone.pt", 0)
    assert alone.returncode == 0, alone.stderr[-2000:]
    assert run("two", "resumed.pt", kill_at).returncode == -signal.SIGKILL
    assert list((tmp_path / "two" / "runs").rglob("fit.pt"))
    done = run("two", "resumed.pt", 0)
    assert done.returncode == 0, done.stderr[-2000:]
    (expected, _), (found, notes) = (torch.load(tmp_path / name) for name in ("left_alone.pt", "resumed.pt"))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert says in notes[0]
    assert not list((tmp_path / "two" / "runs").rglob("fit.pt"))


def test_what_each_stage_needs():
    plain, distill, blocks, both = (OneBit(**stage) for stage in ({}, *STAGES.values(), BOTH))
    assert not (plain.needs_data or plain.needs_teacher or plain.trains)
    for step in (distill, blocks, both):
        assert step.needs_data and step.trains and step.needs_teacher == (step is not blocks)
    data = Calibration(source=token_ids(16, 12))
    assert OneBit(steps=1, samples=8, length=6).calibration(data).source.shape == (8, 6)
