"""BitNet training: what becomes of a model, how it is saved, and what a kill does to it."""

import copy
from functools import partial

import pytest
import torch
from helpers import tiny_llama, token_ids
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from optimum_slim import PT2LLM, BitNetTraining, SignLinear, TernaryLinear, slim
from optimum_slim.batches import draw
from optimum_slim.latent import LatentLinear
from optimum_slim.latent_model import LatentModel
from optimum_slim.memory import shared_copy
from optimum_slim.methods import bitnet_training
from optimum_slim.schedules import quantized_share
from optimum_slim.train import fit, next_token_loss


TOKENS = token_ids(48, 16) % 16  # few different tokens, so that there is something to learn
FIELDS = {"steps": 20, "batch_size": 8, "learning_rate": 3e-3, "evaluate_every": 10, "held_out": 0.1, "group_size": 32}


def trained(model=None, tokens=TOKENS, journal=None, **fields):
    """A tiny Llama after training, and the step's report."""
    model = model or tiny_llama()
    step = BitNetTraining(**(FIELDS | fields)).resolve(model)
    teacher = shared_copy(model)
    with torch.no_grad():
        return model, step.apply(model, tokens, teacher=teacher, journal=journal)


def logits(model):
    with torch.no_grad():
        return model(TOKENS[:4]).logits


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sub_norm": True},
        {"variant": "b1", "sub_norm": True},
        {"loss": "next_token", "lambda_steps": 0, "schedule": "cosine"},
        {"relation_weight": 10.0, "kl_weight": 0.5},
        {"block_steps": 10},
    ],
    ids=["ternary", "norms", "signs", "text", "relations", "blocks"],
)
def test_training_helps_and_ends_packed(fields):
    model, report = trained(**fields)
    history = [row["held_out"] for row in report.tables["training"]]
    assert min(history) < 0.97 * history[0]
    kind = SignLinear if fields.get("variant") == "b1" else TernaryLinear
    layers = [module for module in model.modules() if isinstance(module, kind)]
    assert len(layers) == len(report.layers) == 14
    assert not any(isinstance(module, LatentLinear) for module in model.modules())
    normed = [layer for layer in layers if layer.norm_eps is not None]
    assert len(normed) == (4 if fields.get("sub_norm") else 0)
    assert all(layer.norm_eps == model.config.rms_norm_eps for layer in normed)
    assert not any(p.requires_grad for layer in layers for p in layer.parameters())
    assert model.model.norm.weight.requires_grad and model.dtype == torch.float32


def test_what_is_kept_is_the_best_state_as_packed():
    model, report = trained(loss="next_token", lambda_steps=5)
    held, _ = draw(len(TOKENS), 0.1, 20, 8, 0)
    with torch.no_grad():
        found = float(next_token_loss(model, TOKENS[held]))
    assert found == pytest.approx(min(row["held_out"] for row in report.tables["training"]), rel=1e-4)


def test_block_by_block_alone():
    model, report = trained(block_steps=20, steps=0)
    assert [row["name"] for row in report.tables["blocks"]] == ["model.layers.0", "model.layers.1"]
    assert all(row["finished"] < 0.7 * row["before"] for row in report.tables["blocks"])
    assert "one by one: 40 steps" in report.notes[0]
    start, _ = trained(block_steps=1, steps=0, block_learning_rate=1e-9)
    dense = logits(tiny_llama())
    assert (logits(model) - dense).norm() < 0.8 * (logits(start) - dense).norm()


@pytest.mark.parametrize("fields", [{"steps": 2}, {"block_steps": 2, "steps": 0}], ids=["all", "blocks"])
def test_from_pt2llm_training_starts_where_that_ends(fields):
    fields = {"init": "pt2llm", "learning_rate": 1e-12, "block_learning_rate": 1e-12} | fields
    model, _ = trained(**fields)
    expected = tiny_llama()
    slim(expected, PT2LLM(group_size=32, asymmetric=0.0), data=TOKENS)
    first = "model.layers.0.self_attn.q_proj"
    ours, theirs = model.get_submodule(first), expected.get_submodule(first)
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.weight_offset, theirs.weight_offset)
    assert (logits(model) - logits(expected)).norm() < 0.05 * logits(expected).norm()


@pytest.mark.slow
def test_from_pt2llm_scales_and_offsets_are_trained_too():
    tokens = token_ids(120, 24)
    start, _ = trained(tokens=tokens, init="pt2llm", block_steps=1, steps=0, block_learning_rate=1e-12)
    model, report = trained(tokens=tokens, init="pt2llm", block_steps=20, steps=0, block_learning_rate=3e-4)
    assert all(row["after"] < row["before"] for row in report.tables["blocks"])
    for key in ("weight", "weight_scale", "weight_offset"):
        name = f"model.layers.0.mlp.down_proj.{key}"
        assert not torch.equal(model.get_parameter(name), start.get_parameter(name))


@pytest.mark.parametrize(
    "fields",
    [{}, {"sub_norm": True, "loss": "distill"}, {"variant": "b1", "sub_norm": True}, {"init": "pt2llm"}],
    ids=["ternary", "norms", "signs", "pt2llm"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_saved_model_reloads_without_training(tmp_path, monkeypatch, fields, dtype):
    tiny_llama().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    slim(model, BitNetTraining(**(FIELDS | {"loss": "next_token", "steps": 3} | fields)), data=TOKENS)
    model.save_pretrained(tmp_path / "slim")
    monkeypatch.setattr(BitNetTraining, "apply", None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert torch.equal(logits(again), logits(model))
    (step,) = again.config.quantization_config.steps
    assert isinstance(step, BitNetTraining) and step.steps == 3
    assert all(p.dtype == dtype for name, p in again.named_parameters() if name.endswith("weight_norm"))


def test_a_layer_with_a_norm_is_no_linear():
    model, _ = trained(sub_norm=True, steps=2)
    model.model.layers[0].self_attn.q_proj.to_linear(torch.float32)
    with pytest.raises(ValueError, match="RMSNorm of its own"):
        model.model.layers[0].self_attn.o_proj.to_linear(torch.float32)


def test_norms_start_at_the_size_of_their_inputs():
    changes = []
    for measured in (True, False):
        model = tiny_llama()
        step = BitNetTraining(**FIELDS, sub_norm=True, activation_bits=None).resolve(model)
        held = LatentModel(model, step.targets(model), step.latent)
        held.measure_inputs(TOKENS)
        held.hold_latent()
        held.share.value = 0.0
        norms = [m.norm for m in model.modules() if isinstance(m, LatentLinear) and m.norm is not None]
        assert len(norms) == 4 and all(len(norm.unique()) == 1 for norm in norms)
        with torch.no_grad():
            for norm in norms if not measured else ():
                norm.fill_(1)
            changes.append((model.train()(TOKENS[:4]).logits - logits(tiny_llama())).norm())
    assert 0 < changes[0] < 0.3 * changes[1]


def test_16_bit_models_and_their_teachers():
    model = tiny_llama().to(torch.bfloat16)
    teacher = shared_copy(model)
    before = copy.deepcopy(teacher.state_dict())
    step = BitNetTraining(**FIELDS, sub_norm=True).resolve(model)
    with torch.no_grad():
        report = step.apply(model, TOKENS, teacher=teacher)
    assert report.tables["training"][-1]["held_out"] < report.tables["training"][0]["held_out"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.uint8, torch.float32}  # scales are fp32
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert not torch.equal(model.model.norm.weight, before["model.norm.weight"])
    assert torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])


def test_conv1d_and_biases():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=128)
    model = GPT2LMHeadModel(config).eval()
    bias = model.transformer.h[0].mlp.c_fc.bias.detach().clone()
    model, report = trained(model, sub_norm=True, block_steps=10)
    assert report.tables["blocks"][0]["after"] < report.tables["blocks"][0]["before"]
    layer = model.transformer.h[0].mlp.c_fc
    assert layer.transposed and torch.equal(layer.bias, bias) and layer.norm_eps is None
    assert model.transformer.h[0].mlp.c_proj.norm_eps == 1e-5


def test_training_that_diverges_leaves_the_model_as_it_was():
    model, dense = tiny_llama(), tiny_llama()
    model.model.norm.requires_grad_(False)
    parts = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(FloatingPointError):
        trained(model, learning_rate=1e38, block_steps=2)
    assert {name: id(module) for name, module in model.named_modules()} == parts
    for (name, ours), theirs in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.requires_grad == (name != "model.norm.weight")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stage", ["blocks", "all"])
def test_a_killed_run_goes_on_with_its_lambda_and_ends_with_the_same_bits(tmp_path, monkeypatch, stage):
    fields = {"steps": 15, "lambda_steps": 12, "block_steps": 4, "evaluate_every": 7, "sub_norm": True}
    monkeypatch.setattr(bitnet_training, "fit", partial(fit, journal_every=5))
    whole, expected = trained(**fields)
    shares, hold = {}, LatentModel.hold_latent

    def share(step, *schedule):
        if step == 13 and not shares.get("again"):
            raise Killed
        shares[step] = quantized_share(step, *schedule)
        return shares[step]

    def hold_latent(self, block=None, start=None):
        if stage == "blocks" and block.index == 1:
            raise Killed
        hold(self, block, start)

    monkeypatch.setattr(bitnet_training, "quantized_share", share)
    monkeypatch.setattr(LatentModel, "hold_latent", hold_latent)
    with pytest.raises(Killed):
        trained(**fields, journal=tmp_path)
    monkeypatch.setattr(LatentModel, "hold_latent", hold)
    shares.clear()
    shares["again"] = True
    again, report = trained(**fields, journal=tmp_path)
    assert sum(row["resumed"] for row in report.tables["blocks"]) == (1 if stage == "blocks" else 2)
    del shares["again"]
    assert min(shares) == (0 if stage == "blocks" else 10)
    assert all(value == min(step / 12, 1) for step, value in shares.items())
    assert report.tables["training"] == expected.tables["training"]
    for (name, ours), theirs in zip(again.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"variant": "b2"}, "variant must be one of"),
        ({"lambda_schedule": "cosine"}, "lambda_schedule must be one of"),
        ({"steps": 0}, "train nothing"),
        ({"variant": "b1", "init": "pt2llm"}, "holds signs"),
        ({"relation_weight": 1.0, "loss": "next_token"}, "compares with the teacher"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_wrong_fields(fields, says):
    with pytest.raises(ValueError, match=says):
        BitNetTraining(**fields)


def test_defaults_and_what_depends_on_the_model():
    step = BitNetTraining()
    assert (step.lambda_steps, step.lambda_schedule, step.schedule) == (500, "linear", "two_stage")
    assert BitNetTraining(steps=5000).lambda_steps == 1000
    assert BitNetTraining(block_steps=10).lambda_steps == 0
    assert step.needs_teacher and not BitNetTraining(block_steps=10, steps=0).needs_teacher
    resolved = BitNetTraining(sub_norm=True, relation_weight=1.0).resolve(tiny_llama(num_hidden_layers=8))
    assert resolved.norm_eps == 1e-6 and resolved.relation_layer == 6
    with pytest.raises(ValueError, match="sub_norm looks for"):
        BitNetTraining(sub_norm=True, modules_to_not_convert=("o_proj", "down_proj")).resolve(tiny_llama())
