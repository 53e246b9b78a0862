"""The steps that drop single weights on whole models: in memory, while loading, from files."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from helpers import tiny_llama, token_ids
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from optimum_slim import Calibration, Magnitude, SlimConfig, SparseGPT, SparseLinear, Wanda, slim
from optimum_slim.block import Group
from optimum_slim.sparse_step import NOT_SMALLER
from optimum_slim.walk import walk


TOKENS = token_ids(8, 32)
METHODS = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "paper": lambda **fields: SparseGPT(variant="paper", **fields),
    "official": lambda **fields: SparseGPT(variant="official", **fields),
}
FORMS = [(0.5, None), ("2:4", None), ("1:4", None), ("4:8", None), (0.5, 4), ("2:4", 4), ("4:8", 3)]
CASES = [(name, *form) for name in ("magnitude", "wanda", "sparsegpt") for form in FORMS]
CASES += [(name, *form) for name in ("paper", "official") for form in ((0.5, None), ("2:4", 4))]


def load(folder, **fields):
    return AutoModelForCausalLM.from_pretrained(folder, **fields)


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def slimmed(step, model=None):
    model = model or tiny_llama()
    report = slim(model, step, data=Calibration(source=TOKENS))
    return model, report.steps[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("method", "sparsity", "bits"), CASES, ids=lambda value: str(value))
def test_saved_and_loaded_again_the_logits_are_the_same(tmp_path, method, sparsity, bits, dtype):
    step = METHODS[method](sparsity=sparsity, bits=bits)
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(tiny_llama(num_hidden_layers=1).config, dtype=dtype).eval()
    model, report = slimmed(step, dense)
    found = logits(model)
    assert found.dtype == dtype and torch.isfinite(found).all() and len(layers_of(model)) == 7
    assert all(layer.weight_values.dtype == (torch.uint8 if bits else dtype) for layer in layers_of(model).values())
    assert all(0 < row["relative_error"] < 1 and row["sparsity"] > 0.4 for row in report.layers)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=dtype)
    assert torch.equal(logits(again), found)
    assert again.config.quantization_config == model.config.quantization_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("step", [SparseGPT(), SparseGPT(sparsity="2:4", bits=4), Wanda()], ids=lambda s: s.name)
def test_slimmed_while_loading_as_in_memory(dense_folder, step, dtype):
    config = SlimConfig(step, calibration=Calibration(source=TOKENS))
    loaded = load(dense_folder, quantization_config=config, dtype=dtype)
    model, _ = slimmed(step, load(dense_folder, dtype=dtype))
    states = [found.state_dict() for found in (model, loaded)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_packed_layers_hold_the_counts(method):
    for sparsity in (0.5, "2:4"):
        model, _ = slimmed(METHODS[method](sparsity=sparsity, allocation="uniform"))
        for layer in layers_of(model).values():
            zeros = layer.dense() == 0
            assert int(zeros.sum()) >= zeros.numel() // 2 == int((~layer.mask()).sum())
            if sparsity == "2:4":
                assert (layer.mask().unflatten(1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_allocation_is_written_out_and_loads(tmp_path, method):
    model, report = slimmed(METHODS[method](allocation="owl", owl_threshold=2.0, owl_band=0.1))
    shares = report.step["shares"]
    assert len(shares) == 2 and sum(shares) / 2 == pytest.approx(0.5, abs=1e-3)
    assert abs(shares[0] - shares[1]) == pytest.approx(0.2, abs=1e-3)
    for name, layer in layers_of(model).items():
        dropped = float((~layer.mask()).float().mean())
        assert dropped == pytest.approx(shares[int(name.split(".")[2])], abs=0.02)
    model.save_pretrained(tmp_path)
    recorded = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["steps"][0]
    assert recorded["shares"] == shares and recorded["allocation"] == "owl"
    assert torch.equal(logits(load(tmp_path)), logits(model))
    again, report = slimmed(METHODS[method](shares=tuple(shares)))
    assert report.step["shares"] == shares and torch.equal(logits(again), logits(model))


def test_layers_and_modules_left_dense(tmp_path):
    for fields in ({"layers": (1, 3)}, {"layers": (1, 3), "allocation": "owl"}):
        step = Wanda(modules_to_not_convert=("down_proj",), **fields)
        model, _ = slimmed(step, tiny_llama(num_hidden_layers=4))
        found = {tuple(name.split(".")[2:5:2]) for name in layers_of(model)}
        kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
        assert found == {(index, kind) for index in "12" for kind in kinds}
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("bits", [None, 4])
def test_not_packed_an_ordinary_checkpoint_with_the_same_zeros(tmp_path, method, bits):
    step = METHODS[method](bits=bits, packed=False)
    model, report = slimmed(step)
    packed, _ = slimmed(dataclasses.replace(step, packed=True))
    for name, layer in layers_of(packed).items():
        plain = model.get_submodule(name)
        assert type(plain) is nn.Linear and torch.equal(plain.weight, layer.dense())
    assert report.notes == [NOT_SMALLER] and NOT_SMALLER in model.slim_report.notes
    assert all(row["bits_per_weight"] == 32 for row in report.layers)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    state = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(state[f"{name}.weight"], layer.dense()) for name, layer in layers_of(packed).items())
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.slow
def test_not_packed_loads_without_this_package(tmp_path):
    slimmed(Magnitude(packed=False))[0].save_pretrained(tmp_path)
    stock = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    subprocess.run([sys.executable, "-c", stock, tmp_path], check=True, capture_output=True)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=128, n_positions=64)).eval()


def opt(projected=32):
    torch.manual_seed(0)
    config = OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
    config.word_embed_proj_dim, config.max_position_embeddings = projected, 64
    return OPTForCausalLM(config).eval()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("make", [gpt2, opt, lambda: tiny_llama(attention_bias=True)], ids=["gpt2", "opt", "bias"])
def test_biases_and_transposed_layers(tmp_path, make, method):
    dense = make()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    for fields in ({}, {"sparsity": "2:4", "bits": 4}, {"packed": False}):
        model = make()
        model.load_state_dict(dense.state_dict())
        slimmed(METHODS[method](**fields), model)
        kinds = [type(module) for module in model.modules()]
        assert (SparseLinear in kinds) == fields.get("packed", True)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                assert torch.equal(parameter, dense.get_parameter(name))
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(load(tmp_path)), logits(model))
        assert sum((weight == 0).float().mean() > 0.4 for weight in dequantized(model)) >= 8


def dequantized(model):
    if model.config.to_dict().get("quantization_config"):
        model.dequantize()
    return [parameter for parameter in model.parameters() if parameter.dim() == 2]


class Routed(nn.Module):
    """Three experts: the second sees few tokens, the third none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x):
        flat = x.flatten(0, 1)
        output, chosen = torch.zeros_like(flat), (flat[:, 0] > 1).long()
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                output[rows] = expert(flat[rows])
        return output.view_as(x)


EXPERTS = {
    "sparsegpt": SparseGPT(),
    "official": SparseGPT(variant="official"),
    "bits": SparseGPT(bits=4),
    "wanda": Wanda(),
}


@pytest.mark.parametrize("step", EXPERTS.values(), ids=EXPERTS)
def test_experts_with_few_tokens_are_pruned_by_magnitude_and_say_so(step):
    model = tiny_llama(num_hidden_layers=1)
    model.model.layers[0].mlp = Routed()
    weights = [expert.weight.detach().clone() for expert in model.model.layers[0].mlp.experts]
    _, report = slimmed(dataclasses.replace(step, allocation="uniform"), model)
    rows = {row["name"][-1]: row for row in report.layers if "experts" in row["name"]}
    assert "note" not in rows["0"] and "only 0 calibration tokens" in rows["2"]["note"]
    assert ("note" in rows["1"]) == (step.name == "sparsegpt")
    assert 0.01 < rows["2"]["relative_error"] < 1
    if step.bits is None:
        for number in (1, 2) if step.name == "sparsegpt" else (2,):
            kept = model.model.layers[0].mlp.experts[number].dense()
            assert torch.equal(kept, torch.where(kept == 0, 0, weights[number]))
            by_row = step.name == "wanda"
            median = (
                weights[number].abs().median(dim=1, keepdim=True).values if by_row else weights[number].abs().median()
            )
            assert torch.equal(kept != 0, weights[number].abs() > median)


def test_raised_dampening_is_reported():
    linear = nn.Linear(24, 8, bias=False)
    model = nn.Sequential(linear)
    values, vectors = torch.linalg.eigh(torch.cov(torch.randn(24, 90, generator=torch.Generator().manual_seed(0))))
    values[0] = -0.05 * values.mean()
    group = Group(["0"], vectors @ torch.diag(values) @ vectors.T, 500)
    step = SparseGPT(variant="paper")
    row = step.replace(model, "0", group, step.share(group))
    assert row["note"] == "dampening raised to 0.1" and isinstance(model[0], SparseLinear)


def test_asymmetric_calibration_comes_closer_to_the_dense_model():
    dense = [block.inputs[0] for block in walk(tiny_llama(num_hidden_layers=4, initializer_range=0.12), TOKENS)][3]
    errors = []
    for strength in (0.0, 0.5, 1.0):
        step = SparseGPT(variant="paper", sparsity=0.6, sequential=True, asymmetric=strength)
        model, _ = slimmed(step, tiny_llama(num_hidden_layers=4, initializer_range=0.12))
        errors.append(float(([block.inputs[0] for block in walk(model, TOKENS)][3] - dense).square().mean()))
    assert errors[1] < errors[0] and errors[2] < errors[0]


def test_sparsegpt_comes_closer_than_wanda_and_magnitude():
    """On tokens it was calibrated on, in logits: the whole chain of layers at once."""
    errors = []
    for name in ("sparsegpt", "paper", "wanda", "magnitude"):
        model, _ = slimmed(METHODS[name](sparsity="2:4"), tiny_llama(initializer_range=0.12))
        with torch.no_grad():
            expected = tiny_llama(initializer_range=0.12)(TOKENS).logits
            errors.append(float((model(TOKENS).logits - expected).square().mean()))
    assert errors[0] < errors[1] < errors[2] < errors[3]


WRONG = [
    ({"sparsity": 1.5}, "sparsity"),
    ({"sparsity": "4:2"}, "sparsity"),
    ({"bits": 1}, "bits"),
    ({"bits": 9}, "bits"),
    ({"bits": 4.0}, "bits"),
    ({"group_size": 0}, "group_size"),
    ({"group_size": 12.5}, "group_size"),
    ({"allocation": "best"}, "allocation"),
    ({"allocation": "owl", "sparsity": "2:4"}, "nothing to allocate"),
    ({"shares": (0.5, 0.5), "sparsity": "2:4"}, "nothing to allocate"),
    ({"shares": (0.5, 1.5)}, "shares"),
    ({"owl_band": 0}, "owl_band"),
    ({"owl_threshold": -1}, "owl_threshold"),
    ({"layers": (2, 1)}, "layers"),
    ({"layers": (0, 1, 2)}, "layers"),
    ({"layers": (0.0, 1)}, "layers"),
    ({"layers": 3}, "layers"),
]


@pytest.mark.parametrize("method", [Magnitude, Wanda, SparseGPT], ids=lambda cls: cls.name)
@pytest.mark.parametrize(("fields", "named"), WRONG, ids=str)
def test_wrong_fields_are_named(method, fields, named):
    with pytest.raises(ValueError, match=named):
        method(**fields)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"layers": (0, 3)}, "goes past the 2 decoder layers"),
        ({"shares": (0.5,)}, "1 entries for the 2 decoder layers"),
        ({"shares": (0.5, 0.0)}, "shares"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_said_before_anything_changes(fields, match):
    model = tiny_llama()
    for step in (Magnitude(**fields), Wanda(**fields)):
        with pytest.raises(ValueError, match=match):
            slim(model, step, data=Calibration(source=TOKENS))
        assert not layers_of(model)


@pytest.mark.parametrize("fields", [{"allocation": "owl"}, {"shares": (0.4, 0.6)}], ids=str)
def test_layers_outside_the_decoder_have_no_share(fields):
    model = opt(projected=16)
    with pytest.raises(ValueError, match=r"outside model\.decoder\.layers.*project_in"):
        slim(model, Magnitude(**fields), data=Calibration(source=TOKENS))
    assert not layers_of(model)
    slimmed(Magnitude(modules_to_not_convert=("project_in", "project_out"), **fields), model)
    assert len(layers_of(model)) == 12


def test_a_damaged_index_is_refused_on_load(tmp_path):
    slimmed(Magnitude())[0].save_pretrained(tmp_path)
    good, key = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    damaged = good[key].clone()
    damaged[0, 0] ^= 1
    save_file(good | {key: damaged}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{key.removesuffix('.weight')}: .*damaged"):
        load(tmp_path)
    save_file(good | {f"{key}_values": good[f"{key}_values"][1:]}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{key}_values is F32 \(3071,\) in the checkpoint"):
        load(tmp_path)
