"""The steps that binarize layers: compensation, and whole models in memory, while loading, from files."""

import dataclasses
import json

import pytest
import torch
from binary_problems import output_error, problem
from helpers import tiny_llama, token_ids
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from optimum_slim import ARBLLM, BiLLM, BinaryLinear, Calibration, SlimConfig, save, slim
from optimum_slim.binary_step import NOMINAL, go_through, improve
from optimum_slim.block import Group
from optimum_slim.hessian import Hessian
from optimum_slim.stored import stored_bits


TOKENS = token_ids(8, 32)
STEPS = {
    "billm": BiLLM(),
    "billm paper": BiLLM(variant="paper"),
    "billm official": BiLLM(variant="official"),
    "billm offset": BiLLM(offset=True, group_size=32),
    "arbllm": ARBLLM(group_size=32),
    "arbllm paper": ARBLLM(variant="paper"),
}
EVERY = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, BinaryLinear)}


def slimmed(step, model=None):
    model = model or tiny_llama()
    report = slim(model, step, data=Calibration(source=TOKENS))
    return model, report.steps[0]


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, n_positions=64)).eval()


def moments(columns, seed=0):
    weight, gram = problem(24, columns, seed)
    return weight, Hessian(gram)


# Compensation


def least_squares_groups(weight, hessian, step, size):
    """The triangular compensation by its definition: all columns to come at their best, in float64."""
    matrix, weight = hessian.matrix.double(), weight.double()
    done = torch.empty_like(weight)
    for start in range(0, weight.shape[1], size):
        group, rest = slice(start, start + size), slice(start, None)
        owed = (weight - done)[:, :start] @ matrix[:start, rest]
        moved = weight[:, rest] + torch.linalg.solve(matrix[rest, rest], owed, left=False)
        target = moved[:, :size].float()
        levels = step.fit(target, hessian.matrix.diagonal()[group], hessian.factor.diagonal()[group])
        done[:, group] = levels.stored(torch.float32).dense().double()
    return done


@pytest.mark.parametrize("columns", [64, 45])
def test_triangular_compensation_is_least_squares_on_the_columns_to_come(columns):
    weight, hessian = moments(columns)
    step = BiLLM(variant="paper", group_size=16, scale_dtype="float32")
    found = step.binarize(weight, hessian).dense().double()
    expected = least_squares_groups(weight, hessian, step, 16)
    near = (found - expected).abs() < 1e-4
    assert near[:, :16].all() and near.float().mean() > 0.97  # a weight at a threshold may fall to either side


def test_the_first_and_the_only_group_is_binarized_as_it_is():
    weight, hessian = moments(64)
    for compensation in ("triangular", "diagonal", "none"):
        step = BiLLM(variant="paper", group_size=64, compensation=compensation, scale_dtype="float32")
        alone = step.fit(weight, hessian.matrix.diagonal(), hessian.factor.diagonal())
        assert torch.equal(step.binarize(weight, hessian).dense(), alone.dense())


def test_triangular_is_better_than_diagonal_is_better_than_none():
    errors = {name: [] for name in ("triangular", "diagonal", "none")}
    for seed in range(6):
        weight, hessian = moments(64, seed)
        for name, found in errors.items():
            step = BiLLM(variant="paper", group_size=16, compensation=name)
            found.append(output_error(weight, step.binarize(weight, hessian).dense(), hessian.matrix))
    triangular, diagonal, none = (sum(errors[name]) for name in ("triangular", "diagonal", "none"))
    assert triangular < 0.97 * diagonal < 0.97 * 0.97 * none


def test_without_correlations_there_is_nothing_to_make_up_for():
    weight, _ = problem()
    hessian = Hessian(torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.1))
    found = [
        BiLLM(variant="paper", group_size=16, compensation=name).binarize(weight, hessian).dense()
        for name in ("triangular", "diagonal", "none")
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("step", [BiLLM(group_size=16), ARBLLM(group_size=16)], ids=["billm", "arbllm"])
def test_rounding_columns_one_by_one_and_each_round_lower_the_error(step):
    totals = [0.0] * 4
    for seed in range(3):
        weight, hessian = moments(80, seed)

        def fit(target, group, hessian=hessian):
            return step.fit(target, hessian.matrix.diagonal()[group], hessian.factor.diagonal()[group])

        for number, by_column in enumerate((False, True)):
            settings = {"compensation": "triangular", "by_column": by_column}
            levels = go_through(weight, hessian, 16, torch.float32, fit, **settings)
            totals[number] += output_error(weight, levels.dense(), hessian.matrix)
        for number in (2, 3):
            better = improve(weight, hessian, levels, torch.float32, number - 1)
            error = output_error(weight, better.dense(), hessian.matrix)
            assert error <= output_error(weight, levels.dense(), hessian.matrix) * (1 + 1e-5)
            totals[number] += error
        assert improve(weight, hessian, levels, torch.float32, 0) is levels
    assert totals[0] > totals[1] > totals[2] > totals[3]


# One matrix


@EVERY
@pytest.mark.parametrize(("rows", "columns"), [(24, 64), (7, 45), (1, 3), (5, 1), (3, 130)])
def test_packed_is_the_fake_quantized_weight_bit_for_bit(step, rows, columns):
    weight, gram = problem(rows, columns)
    levels = step.binarize(weight, Hessian(gram))
    layer = step.empty(nn.Linear(columns, rows, bias=False))
    layer.load_packed(step.compress(weight, gram))
    layer.validate()
    assert torch.equal(layer.dense(), levels.dense())
    assert torch.equal(layer.salient(), levels.salient)


@EVERY
def test_salient_columns_and_values_of_a_row(step):
    weight, gram = problem(24, 64)
    step = dataclasses.replace(step, group_size=32, rounds=0)
    levels = step.binarize(weight, Hessian(gram))
    assert levels.salient.shape == (64,)
    for start, group in ((0, slice(0, 32)), (32, slice(32, 64))):
        assert levels.salient[group].sum() <= 31
        if step.has_columns:
            continue
        dense = levels.dense()[:, group]
        for row in dense:
            plain, twice = row[~levels.salient[group]], row[levels.salient[group]]
            assert len(plain.unique()) <= 4 and len(twice.unique()) <= 4 and len(row.unique()) <= 8, start


@EVERY
def test_scaling_the_inputs_changes_nothing(step):
    weight, gram = problem()
    one, other = (step.compress(weight, scale * gram) for scale in (1, 1024))
    assert all(torch.equal(one[name], other[name]) for name in one)


@EVERY
def test_weights_of_dead_inputs_do_not_matter(step):
    weight, gram = problem()
    gram[:, ::9] = gram[::9] = 0
    changed = weight.clone()
    changed[:, ::9] = 1e3
    one, other = (step.compress(w, gram) for w in (weight, changed))
    assert all(torch.equal(one[name], other[name]) for name in one)


@EVERY
def test_the_arguments_are_left_alone(step):
    weight, gram = problem()
    hessian = Hessian(gram)
    before = weight.clone(), gram.clone(), hessian.matrix.clone(), hessian.factor.clone()
    step.compress(weight, hessian)
    step.compress(weight, gram)
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, gram, hessian.matrix, hessian.factor), strict=True))


@EVERY
@pytest.mark.parametrize("weight", [torch.zeros(6, 40), torch.ones(6, 40), torch.eye(40)[:6]], ids=["0", "1", "eye"])
def test_weights_without_a_bell_curve(step, weight):
    layer = step.empty(nn.Linear(40, 6, bias=False))
    layer.load_packed(step.compress(weight, problem(6, 40)[1]))
    assert torch.isfinite(layer.dense()).all()
    if not weight.any():
        assert (layer.dense() == 0).all()


@EVERY
def test_without_data_nothing_is_made_up_for(step):
    weight, _ = problem()
    one, other = step.compress(weight), step.compress(weight, torch.eye(64))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_refused():
    weight, gram = problem()
    with pytest.raises(ValueError, match=r"shape \(3, 3\), expected \(64, 64\)"):
        BiLLM().compress(weight, torch.eye(3))
    with pytest.raises(ValueError, match="NaN or infinite"):
        BiLLM().share(Group(["layer"], torch.full((4, 4), torch.nan), 500))
    with pytest.raises(ValueError, match="layer: the Gram matrix is not positive definite"):
        BiLLM().pack("layer", weight, torch.ones(64, 64).fill_diagonal_(0.01))
    with pytest.raises(ValueError, match=r"layer: scales.*out of the range of torch.float16; pass scale_dtype"):
        BiLLM().pack("layer", 1e7 * weight, gram)
    assert torch.isfinite(BiLLM(scale_dtype="bfloat16").compress(1e7 * weight, gram)["weight_scale"]).all()


@pytest.mark.parametrize("method", [BiLLM, ARBLLM])
@pytest.mark.parametrize(
    "fields",
    [
        {"variant": "best"},
        {"group_size": 12},
        {"group_size": 0},
        {"compensation": "full"},
        {"iterations": -1},
        {"rounds": 1.5},
        {"dampening": 0},
        {"dampening": 2},
        {"asymmetric": 2},
        {"scale_dtype": "int8"},
    ],
    ids=str,
)
def test_bad_fields_are_named(method, fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} must.*found {next(iter(fields.values()))!r}"):
        method(**fields)


# Whole models


@EVERY
def test_saved_and_loaded_again_the_logits_are_the_same(tmp_path, step):
    dtype = torch.float32 if step.variant == "paper" else torch.bfloat16
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(tiny_llama(num_hidden_layers=1).config, dtype=dtype).eval()
    model, report = slimmed(step, dense)
    out = save(model, tmp_path / "slim")
    again = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(model), logits(again))
    tensors = load_file(out / "model.safetensors")
    layers = layers_of(again).values()
    assert 8 * stored_bits(out).packed_bytes == sum(layer.stored_bits() for layer in layers)
    for row in report.layers:
        layer = again.get_submodule(row["name"])
        stored = sum(t.nbytes for name, t in tensors.items() if name.startswith(f"{row['name']}.weight"))
        assert row["bits_per_weight"] == 8 * stored / (layer.in_features * layer.out_features)
        assert row["nominal_bits"] == 1 + float(layer.salient().float().mean())
        assert 0 < row["relative_error"] < 0.5 and "note" not in row
    assert NOMINAL in json.loads((out / "slim_report.json").read_text())["notes"]


def timeless(folder):
    report = json.loads((folder / "slim_report.json").read_text())
    for step in report["steps"]:
        step["seconds"] = 0
    return report


SOME = pytest.mark.parametrize(
    "step", [BiLLM(group_size=32), ARBLLM(group_size=32, rounds=1)], ids=["billm", "arbllm"]
)


@SOME
def test_a_streamed_run_gives_what_memory_gives(tmp_path, step):
    tiny_llama(intermediate_size=64).to(torch.bfloat16).save_pretrained(tmp_path / "dense", max_shard_size=20_000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    slim(model, step, data=Calibration(source=TOKENS))
    one, other = save(model, tmp_path / "memory"), tmp_path / "streamed"
    slim(tmp_path / "dense", step, data=Calibration(source=TOKENS), out=other)
    a, b = ({k: t for f in x.glob("*.safetensors") for k, t in load_file(f).items()} for x in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert timeless(one) == timeless(other)
    found, expected = (logits(AutoModelForCausalLM.from_pretrained(folder)) for folder in (one, other))
    assert torch.equal(found, expected)


def test_while_loading(tmp_path):
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "dense")
    config = SlimConfig(BiLLM(group_size=32), calibration=Calibration(source=TOKENS))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    expected, _ = slimmed(BiLLM(group_size=32), tiny_llama(num_hidden_layers=1))
    assert torch.equal(logits(loaded), logits(expected))


@SOME
def test_transposed_layers(tmp_path, step):
    model, report = slimmed(step, tiny_gpt2())
    assert len(report.layers) == len(layers_of(model)) == 4
    out = save(model, tmp_path / "slim")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model))


@SOME
def test_layers_that_saw_too_few_tokens(step):
    model = tiny_llama(num_hidden_layers=1)
    report = slim(model, step, data=Calibration(source=TOKENS[:1, :20])).steps[0]
    assert all(
        row["note"] == "binarized without data: only 20 calibration tokens reached this layer" for row in report.layers
    )
    name, layer = next(iter(layers_of(model).items()))
    dense = tiny_llama(num_hidden_layers=1).get_submodule(name).weight.detach()
    assert torch.equal(layer.dense(), step.binarize(dense, Hessian(torch.eye(64))).dense())


def test_dampening_that_was_raised_is_reported():
    model = tiny_llama(num_hidden_layers=1)
    step = BiLLM(dampening=1e-9, asymmetric=0.0)
    report = slim(model, step, data=Calibration(source=TOKENS[:4].repeat(2, 1))).steps[0]
    raised = [row["note"] for row in report.layers if "note" in row]
    assert all(note.startswith("dampening raised to ") for note in raised)


def test_modules_that_stay_dense():
    step = BiLLM(variant="paper", modules_to_not_convert=("mlp", "lm_head"))
    model, report = slimmed(step)
    assert {name.split(".")[-2] for name in layers_of(model)} == {"self_attn"}
    assert report.step["modules_to_not_convert"] and type(model.model.layers[0].mlp.up_proj) is nn.Linear
