"""Block-wise training: errors fall, never rise, and a killed run ends with the same bits."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_llama, token_ids
from torch import nn
from walk_models import tiny_model

from optimum_slim.blockwise import relative_error, train_blocks
from optimum_slim.memory import shared_copy


TOKENS = token_ids(60, 24)
SETTINGS = {"steps": 30, "learning_rate": 3e-3, "batch_size": 6, "held_out": 0.2, "evaluate_every": 10}


class RowSigns(nn.Linear):
    """Signs times one magnitude per row, trained straight through; the simplest layer that loses something."""

    def quantized(self):
        return self.weight.sign() * self.weight.abs().mean(1, keepdim=True)

    def forward(self, x):
        weight = self.weight + (self.quantized() - self.weight).detach()
        return F.linear(x, weight.to(x.dtype), self.bias)


def linears(layer, kind):
    return [(name, module) for name, module in layer.named_modules() if type(module) is kind]


def prepare(block):
    for name, dense in linears(block.layer, nn.Linear):
        latent = RowSigns(dense.in_features, dense.out_features, bias=dense.bias is not None)
        latent.weight = nn.Parameter(dense.weight.detach().float().clone())
        latent.bias = dense.bias
        block.layer.set_submodule(name, latent)


def finish(block):
    for name, latent in linears(block.layer, RowSigns):
        dense = nn.Linear(latent.in_features, latent.out_features, bias=latent.bias is not None)
        dense.weight = nn.Parameter(latent.quantized().detach().to(block.inputs[0].dtype))
        dense.bias = latent.bias
        block.layer.set_submodule(name, dense)


def trained(model, **changes):
    return list(train_blocks(model, TOKENS, prepare, finish, **(SETTINGS | changes)))


def states_behind(model, layers):
    with torch.no_grad():
        return model(TOKENS, output_hidden_states=True).hidden_states[layers]


@pytest.mark.parametrize("micro", [None, 2], ids=["whole", "micro-batches"])
def test_the_error_of_each_layer_falls(micro):
    model = tiny_llama(num_hidden_layers=3)
    reports = trained(model, micro_batch_size=micro)
    assert [(report.index, report.name) for report in reports] == [(i, f"model.layers.{i}") for i in range(3)]
    for report in reports:
        assert report.after < 0.9 * report.before and report.finished == pytest.approx(report.after, rel=1e-3)
        assert report.steps == 30 and report.best_step > 0 and not report.resumed
    assert not any(isinstance(module, RowSigns) for module in model.modules())


def test_trained_layers_bring_the_model_closer_to_the_dense_one():
    dense, model, start = (tiny_llama() for _ in range(3))
    trained(model)
    trained(start, learning_rate=1e-9)
    errors = [relative_error(states_behind(m, 1), states_behind(dense, 1)) for m in (model, start)]
    assert errors[0] < 0.9 * errors[1]


def test_a_rate_that_only_harms_leaves_every_layer_as_it_was_prepared():
    model, start = tiny_llama(), tiny_llama()
    reports = trained(model, learning_rate=30.0, max_grad_norm=None, warmup_steps=0)
    trained(start, learning_rate=1e-12)
    assert all(report.after == report.before and report.best_step == 0 for report in reports)
    for (name, ours), theirs in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9), name


def test_inputs_come_from_the_slimmed_layers_and_targets_from_the_dense_ones():
    dense, model, seen = tiny_llama(), tiny_llama(), []

    def look(block):
        seen.append(torch.cat(list(block.inputs)))
        prepare(block)

    for report in train_blocks(model, TOKENS, look, finish, **SETTINGS | {"held_out": 0, "batch_size": 60}):
        if report.index == 0:
            assert torch.allclose(seen[0], dense.model.embed_tokens(TOKENS))
            behind = states_behind(model, 1)
            error = relative_error(behind, states_behind(dense, 1))
            assert report.finished == pytest.approx(float(error), rel=1e-4)
    assert torch.allclose(seen[1], behind, atol=1e-5)


def test_an_untouched_layer_has_no_error():
    model = tiny_llama()
    reports = list(train_blocks(model, TOKENS, lambda b: b.layer.mlp.requires_grad_(True), lambda b: None, **SETTINGS))
    assert [report.before for report in reports] == [0, 0]


def test_a_layer_in_which_nothing_is_prepared_is_left_as_it_is():
    model, dense = tiny_llama(num_hidden_layers=3), tiny_llama(num_hidden_layers=3)
    blocks = train_blocks(model, TOKENS, lambda b: prepare(b) if b.index != 1 else None, finish, **SETTINGS)
    reports = list(blocks)
    assert [report.steps for report in reports] == [30, 0, 30]
    assert reports[1].before == reports[1].after == reports[1].finished > 0  # what the first layer left over
    assert same_bits(model.model.layers[1], dense.model.layers[1])


def test_one_layer_is_trained_at_a_time_and_the_dense_tensors_stay():
    model = tiny_llama(num_hidden_layers=3)
    model.model.layers[0].input_layernorm.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    teacher = shared_copy(model)
    before = copy.deepcopy(teacher.state_dict())

    def check(block):
        latents = sum(isinstance(module, RowSigns) for module in model.modules())
        assert latents == 7 and len(linears(block.layer, RowSigns)) == 7
        assert {
            type(m) for m in block.layer.modules() if any(p.requires_grad for p in m.parameters(recurse=False))
        } == {RowSigns}
        finish(block)

    list(train_blocks(model, TOKENS, prepare, check, **SETTINGS | {"steps": 2}))
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert after == flags
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize("model_type", ["opt", "gpt2", "phi3"])
def test_other_architectures(model_type):
    model = tiny_model(model_type)

    def release(block):
        for module in block.layer.modules():
            if isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__:
                module.weight = nn.Parameter(module.weight.detach().clone() * 1.5)

    for report in train_blocks(model, TOKENS % 90 + 1, release, lambda b: None, **SETTINGS):
        assert report.after < report.before and report.finished == pytest.approx(report.after, rel=1e-4)


def test_a_bf16_model_is_trained_with_fp32_latents():
    model = tiny_llama().to(torch.bfloat16)
    reports = trained(model, mixed_precision="bf16")
    assert all(report.after < report.before for report in reports)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def same_bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path):
    whole, killed, again = (tiny_llama(num_hidden_layers=3) for _ in range(3))
    expected = trained(whole)

    def die(block):
        if block.index == 2:
            raise KeyboardInterrupt
        finish(block)

    with pytest.raises(KeyboardInterrupt):
        list(train_blocks(killed, TOKENS, prepare, die, **SETTINGS, journal=tmp_path))
    reports = trained(again, journal=tmp_path)
    assert [report.resumed for report in reports] == [True, True, False]
    assert same_bits(again, whole)
    for ours, theirs in zip(reports, expected, strict=True):
        changes = {"seconds": 0.0, "resumed": False}
        assert dataclasses.replace(ours, **changes) == dataclasses.replace(theirs, **changes)


def test_the_journal_of_another_run_is_refused(tmp_path):
    next(train_blocks(tiny_llama(), TOKENS, prepare, finish, **SETTINGS, journal=tmp_path, settings={"bits": 1}))
    for changes, message in (
        ({"settings": {"bits": 2}}, "settings"),
        ({"settings": {"bits": 1}, "steps": 3}, "steps"),
    ):
        with pytest.raises(ValueError, match=f"belongs to another run: {message}"):
            trained(tiny_llama(), journal=tmp_path, **changes)
    with pytest.raises(ValueError, match="other weights"):
        trained(tiny_llama(seed=1), journal=tmp_path, settings={"bits": 1})


def test_what_cannot_work_is_refused_before_anything_is_changed(monkeypatch):
    model, dense = tiny_llama(), tiny_llama()
    with pytest.raises(ValueError, match="another one must be held out"):
        train_blocks(model, TOKENS[:3], prepare, finish, **SETTINGS)
    with pytest.raises(ValueError, match="does not divide"):
        train_blocks(model, TOKENS, prepare, finish, **SETTINGS, micro_batch_size=4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        train_blocks(model, TOKENS, prepare, finish, **SETTINGS)
    assert same_bits(model, dense)
