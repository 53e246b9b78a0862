"""OneBit: the split of a matrix, what it becomes without training, and the two kinds of training."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import tiny_llama, token_ids
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from optimum_slim import Calibration, Depth, OneBit, SignLinear, SlimConfig, merge_and_repack, slim
from optimum_slim._kernels import unpack_signs
from optimum_slim.memory import shared_copy
from optimum_slim.methods.onebit import svid
from optimum_slim.packed import PackedLinear
from optimum_slim.sign_training import LatentSignLinear, SignDistillation


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = token_ids()


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def distance(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


def packed_state(model) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": getattr(module, key).clone()
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
        for key in module.packed_tensors()
    }


def split(weight):
    """The matrix that SVID puts in the place of `weight`."""
    scale_out, scale_in = svid(weight)
    return torch.where(weight < 0, -1.0, 1.0) * torch.outer(scale_out, scale_in)


# --- SVID


def test_a_matrix_of_rank_1_magnitudes_is_split_exactly():
    a, b, signs = gaussian(30).abs(), gaussian(50, seed=1).abs(), gaussian(30, 50, seed=2).sign()
    weight = signs * torch.outer(a, b)
    torch.testing.assert_close(split(weight), weight, rtol=1e-5, atol=1e-6)
    scale_out, scale_in = svid(weight)
    assert scale_out.norm() == pytest.approx(scale_in.norm().item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (7, 300), (1, 9), (9, 1)])
@pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "structured"])
def test_it_is_the_largest_singular_pair_of_the_magnitudes(shape, kind):
    """Non-negative vectors, the error identity ||W - S ∘ abᵀ||² = ||W||² - σ₁(|W|)², and the optimum itself."""
    weight = gaussian(*shape)
    if kind == "heavy tails":
        weight = weight**3
    if kind == "structured":
        weight = weight * torch.outer(gaussian(shape[0], seed=1).exp(), gaussian(shape[1], seed=2).exp())
    scale_out, scale_in = svid(weight)
    assert (scale_out >= 0).all() and (scale_in >= 0).all()
    weight = weight.double()
    u, sigma, v = torch.linalg.svd(weight.abs(), full_matrices=False)
    torch.testing.assert_close(
        torch.outer(scale_out, scale_in).double(), sigma[0] * torch.outer(u[:, 0], v[0]), **FP32
    )
    error = (weight - split(weight.float())).square().sum() / weight.square().sum()
    torch.testing.assert_close(error, 1 - sigma[0] ** 2 / weight.square().sum(), rtol=0, atol=2e-6)


FP32 = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("seed", range(5))
def test_it_loses_no_more_than_the_best_rank_1_matrix_for_the_weight_itself(seed):
    """Proposition 2, with the errors that the literature's example has: 46.65 and 76.4 for Gaussian 64 x 96."""
    weight = gaussian(64, 96, seed=seed)
    ours = (weight - split(weight)).norm()
    theirs = torch.linalg.svdvals(weight)[1:].norm()
    rows = (weight - weight.sign() * weight.abs().mean(1, keepdim=True)).norm()
    assert ours < rows < theirs
    assert ours.item() == pytest.approx(46.65, rel=0.02) and theirs.item() == pytest.approx(76.4, rel=0.02)


def test_it_is_the_same_every_time_and_follows_the_scale():
    weight = gaussian(40, 60)
    first = svid(weight)
    assert all(torch.equal(one, other) for one, other in zip(first, svid(weight.clone()), strict=True))
    for factor in (2.0**-80, 2.0**80):
        for scale, scaled in zip(first, svid(weight * factor), strict=True):
            torch.testing.assert_close(scaled / factor**0.5, scale)


def test_zeros_split_into_zeros():
    assert not split(torch.zeros(5, 6)).any()
    weight = gaussian(6, 8)
    weight[2], weight[:, 5] = 0, 0
    scale_out, scale_in = svid(weight)
    assert scale_out[2] == 0 and scale_in[5] == 0 and torch.isfinite(split(weight)).all()


def test_equal_blocks_have_no_single_best_pair():
    weight = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3))
    assert (weight - split(weight)).square().sum().item() == pytest.approx(9, rel=1e-5)


# --- without training


def test_layers_hold_signs_and_vectors():
    model = tiny_llama()
    weight = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    report = slim(model, OneBit())
    layer = model.model.layers[1].mlp.up_proj
    assert type(layer) is SignLinear and not layer.post_norm and layer.weight.shape == (96, 8)
    assert torch.equal(unpack_signs(layer.weight, 64), weight < 0)
    assert layer.weight_in.dtype == layer.weight_out.dtype == torch.float16
    torch.testing.assert_close(layer.dense(), split(weight), rtol=2e-3, atol=1e-6)
    row = next(row for row in report.steps[0].layers if row["name"] == "model.layers.1.mlp.up_proj")
    assert row["bits_per_weight"] == pytest.approx(1 + 16 * (1 / 64 + 1 / 96))
    assert row["relative_error"] == pytest.approx(0.36, abs=0.02)  # 1 - 2 / π for Gaussian weights
    assert not isinstance(model.lm_head, PackedLinear)


def test_the_two_variants_differ_by_the_norm_alone():
    plain, paper = tiny_llama(), tiny_llama()
    dense = logits(plain)
    slim(plain, OneBit())
    slim(paper, OneBit(variant="paper"))
    one, other = packed_state(plain), packed_state(paper)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert distance(logits(plain), dense) < 0.7 < distance(logits(paper), dense)


@pytest.mark.parametrize("variant", ["plain", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packing_while_loading_saving_and_reloading(dense_folder, tmp_path, variant, dtype):
    step = OneBit(variant=variant)
    model = AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=SlimConfig(step), dtype=dtype)
    other = AutoModelForCausalLM.from_pretrained(dense_folder, dtype=dtype)
    slim(other, step)
    assert torch.equal(logits(model), logits(other))
    assert len(model.slim_report.steps[0].layers) == 14
    model.save_pretrained(tmp_path / "slim")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "slim", dtype=dtype)
    assert torch.equal(logits(again), logits(model)) and again.model.layers[0].mlp.up_proj.post_norm == (
        variant == "paper"
    )
    ours, theirs = packed_state(again), packed_state(model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_streamed_run_gives_the_same_files(dense_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    slim(model, OneBit())
    slim(dense_folder, OneBit(), out=tmp_path / "streamed")
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
    ours, theirs = packed_state(streamed), packed_state(model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(logits(streamed), logits(model))


def test_a_damaged_checkpoint_is_refused(dense_folder, tmp_path):
    model = tiny_llama(hidden_size=60, num_attention_heads=6)
    slim(model, OneBit())
    model.model.layers[0].mlp.up_proj.weight.data[0, -1] |= 1 << 7
    model.save_pretrained(tmp_path / "slim")
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj: .*past the last column"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "slim")


def test_transposed_layers_with_bias():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=128, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().T.clone()
    slim(model, OneBit())
    layer = model.transformer.h[0].mlp.c_fc
    assert layer.transposed and layer.bias is not None
    torch.testing.assert_close(layer.dense(), split(weight), rtol=2e-3, atol=1e-6)
    packed = logits(model)
    model.dequantize()
    torch.testing.assert_close(logits(model), packed, rtol=1e-4, atol=1e-5)


def test_weights_that_are_not_finite_are_refused_before_anything_changes():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        slim(model, OneBit())
    assert not packed_state(model)


# --- adapters on top


def adapted(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    return model.eval()


@pytest.mark.parametrize("variant", ["plain", "paper"])
def test_lora_learns_on_top_and_leaves_the_bits_alone(variant):
    model = tiny_llama()
    slim(model, OneBit(variant=variant))
    before, packed = logits(model), packed_state(model)
    model = adapted(model)
    assert all(
        torch.equal(value, packed[name.replace("base_model.model.", "").replace(".base_layer", "")])
        for name, value in packed_state(model).items()
    )
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert not torch.equal(logits(model), before)


def test_lora_merges_into_dense_layers_or_is_packed_again():
    model = tiny_llama()
    slim(model, OneBit())
    model = adapted(model)
    expected = logits(model)
    repacked = tiny_llama()
    slim(repacked, OneBit())
    repacked = merge_and_repack(adapted(repacked))
    assert type(repacked.model.layers[0].mlp.up_proj) is SignLinear
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert distance(logits(merged), expected) < 1e-5


def test_a_layer_with_post_norm_is_neither_merged_nor_dequantized():
    model = tiny_llama()
    slim(model, OneBit(variant="paper"))
    before = logits(model)
    with pytest.raises(ValueError, match="normalizes its outputs"):
        model.dequantize()
    assert torch.equal(logits(model), before)
    model = adapted(model)
    before = logits(model)
    with pytest.raises(ValueError, match="normalizes its outputs"):
        model.merge_and_unload()
    assert torch.equal(logits(model), before)


# --- training

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


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"variant": "svd"}, "variant must be one of"),
        ({"start": "zeros"}, "start must be one of"),
        ({"activation_bits": 4}, "activation_bits must be one of"),
        ({"scale_dtype": "int8"}, "scale_dtype must be one of"),
        ({"steps": -1}, "steps must be an integer of at least 0"),
        ({"block_steps": 1.5}, "block_steps must be an integer of at least 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"hidden_weight": -1.0}, "hidden_weight must not be negative"),
    ],
)
def test_wrong_fields(fields, says):
    with pytest.raises(ValueError, match=says):
        OneBit(**fields)


def test_what_each_stage_needs():
    plain, distill, blocks, both = (OneBit(**stage) for stage in ({}, *STAGES.values(), BOTH))
    assert not (plain.needs_data or plain.needs_teacher or plain.trains)
    for step in (distill, blocks, both):
        assert step.needs_data and step.trains and step.needs_teacher == (step is not blocks)
    data = Calibration(source=token_ids(16, 12))
    assert OneBit(steps=1, samples=8, length=6).calibration(data).source.shape == (8, 6)
