"""Hidden states in distillation: embeddings, other widths, the distances and the dynamic weight."""

import json

import pytest
import torch
from helpers import tiny_llama, token_ids
from torch.nn.functional import cosine_similarity

from optimum_slim import Depth, Heal, Minitron, slim
from optimum_slim.hidden_states import PROJECTION, hidden_distance, outputs, projected
from optimum_slim.losses import Distillation, token_loss
from optimum_slim.step import step_from_dict
from optimum_slim.student import ends
from optimum_slim.width import narrow


IDS = token_ids(2, 9)


def states(model, layers):
    with torch.no_grad(), outputs(model, layers, "student") as found:
        model(IDS)
    return found


def test_minus_one_stands_for_the_embeddings_and_other_layers_for_their_output():
    model = tiny_llama(num_hidden_layers=3)
    found = states(model, [-1, 0, 1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        expected = model(IDS, output_hidden_states=True).hidden_states
    assert sorted(found) == [-1, 0, 1]
    assert all(torch.equal(found[layer], expected[layer + 1]) for layer in found)


def test_the_distances_are_the_formulas():
    ours, theirs = torch.randn(2, 9, 64), torch.randn(2, 9, 64)
    relative = ((theirs - ours).square().sum(-1) / theirs.square().sum(-1)).mean()
    torch.testing.assert_close(hidden_distance(tiny_llama(), ours, theirs, "relative"), relative)
    cosine = (1 - cosine_similarity(ours, theirs, dim=-1)).mean()
    torch.testing.assert_close(hidden_distance(tiny_llama(), ours, theirs, "cosine"), cosine)


def test_the_map_between_widths_starts_as_the_identity_of_kept_channels_and_is_gone_afterwards():
    teacher = tiny_llama()
    student = tiny_llama()
    kept = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:48].sort().values
    narrow(student, channels=kept)
    names = [name for name, _ in student.named_parameters()]
    with projected(student, teacher):
        weight = getattr(student, PROJECTION).weight
        assert weight.requires_grad and weight.dtype == torch.float32
        torch.testing.assert_close(weight[kept], torch.eye(48), rtol=0, atol=1e-5)
        lost = [k for k in range(64) if k not in kept.tolist()]
        table, wide = student.get_input_embeddings().weight, teacher.get_input_embeddings().weight
        best = torch.linalg.lstsq(table, wide[:, lost]).solution  # the best guess of the other channels
        torch.testing.assert_close(weight[lost].T, best, rtol=1e-3, atol=1e-4)
    assert [name for name, _ in student.named_parameters()] == names
    with projected(tiny_llama(), teacher):
        pass  # of the same width: nothing to map


def test_a_map_is_removed_after_an_error_too():
    student = tiny_llama(hidden_size=32)
    with pytest.raises(KeyError), projected(student, tiny_llama()):
        raise KeyError
    assert not hasattr(student, PROJECTION)


@pytest.mark.parametrize("distance", ["relative", "cosine"])
def test_the_dynamic_weight_makes_both_terms_equal(distance):
    teacher, student = tiny_llama(num_hidden_layers=4), tiny_llama(seed=1, num_hidden_layers=3)
    settings = {"seams": ends(student, teacher), "hidden_distance": distance}
    assert settings["seams"] == [(-1, -1), (0, 1)]
    value = Distillation(teacher, hidden_weight="dynamic", **settings)(student, IDS)
    with torch.no_grad():
        logits = token_loss(student(IDS).logits, IDS, teacher(IDS).logits)
        hidden = Distillation(teacher, hidden_weight=1.0, **settings)(student, IDS) - logits
    torch.testing.assert_close(value.detach(), 2 * logits)
    # The weight is a constant: the gradient is that of a fixed one.
    value.backward()
    found = student.model.embed_tokens.weight.grad.clone()
    student.zero_grad()
    Distillation(teacher, hidden_weight=float(logits / hidden), **settings)(student, IDS).backward()
    torch.testing.assert_close(found, student.model.embed_tokens.weight.grad, rtol=1e-3, atol=1e-7)


def test_ends_need_three_layers():
    with pytest.raises(ValueError, match="at least 3 layers, found 2"):
        ends(tiny_llama(), tiny_llama(num_hidden_layers=4))


TEXT = (torch.arange(12)[None] * 3 + torch.arange(32)[:, None]) % 100  # which a random model can learn
FAST = {"steps": 4, "batch_size": 2, "evaluate_every": 2, "held_out": 0.2, "learning_rate": 1e-2}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_healing_a_narrow_and_shallow_model_by_hidden_states(method):
    model = tiny_llama(num_hidden_layers=5, initializer_range=0.1)
    settings = FAST | {"steps": 20, "evaluate_every": 5, "learning_rate": 3e-3}
    heal = Heal(method=method, hidden_weight="dynamic", hidden_layers="ends", hidden_distance="cosine", **settings)
    report = slim(model, [Minitron(hidden_size=48, num_hidden_layers=3), heal], data=TEXT)
    assert not hasattr(model, PROJECTION)
    history = report.steps[1].tables["healing"]
    assert min(row["held_out"] for row in history) < 0.9 * history[0]["held_out"]
    assert model(IDS).logits.isfinite().all()


def test_pairs_of_layers_and_where_seams_cannot_be_found():
    heal = Heal(method="full", hidden_weight=1.0, hidden_layers=[[0, 0], [1, 3]], **FAST)
    assert step_from_dict(json.loads(json.dumps(heal.to_dict()))) == heal
    slim(tiny_llama(num_hidden_layers=4), [Depth(layers=(1, 2)), heal], data=token_ids(8, 12))
    seams = Heal(method="full", hidden_weight=1.0, **FAST)
    with pytest.raises(ValueError, match="hidden_layers='ends'"):
        slim(tiny_llama(num_hidden_layers=4), [Minitron(hidden_size=48), seams], data=token_ids(8, 12))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_weight": 1.0, "hidden_layers": "all"}, "'seams', 'ends' or pairs"),
        ({"hidden_distance": "l1"}, "relative, cosine"),
        ({"hidden_weight": "auto"}, "'dynamic'"),
        ({"teacher_correction": -1}, "number of steps or 'alongside'"),
        ({"teacher_correction": 5, "loss": "next_token"}, "loss='distill'"),
    ],
    ids=str,
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Heal(**fields)
