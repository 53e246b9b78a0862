"""Attention relations: the loss by hand, nothing to learn from oneself, and where it cannot be taken."""

import copy

import pytest
import torch
from helpers import tiny_llama, token_ids
from transformers import GPT2Config, GPT2LMHeadModel

from optimum_slim.losses import Distillation
from optimum_slim.relations import RelationDistillation, log_relations, projections, relation_loss


TOKENS = token_ids(3, 9)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_relations_by_hand():
    states = random(2, 5, 6)
    relations = log_relations(states, heads=3).exp()
    assert relations.shape == (2, 3, 5, 5)
    second = states[1, :, 2:4]  # of the second sample the second head
    expected = torch.softmax(second @ second.T / 2**0.5, -1)
    torch.testing.assert_close(relations[1, 1], expected)


def test_the_loss_is_a_mean_of_divergences_and_zero_for_equal_relations():
    student, teacher = random(2, 5, 6), random(2, 5, 6, seed=1)
    p, q = (log_relations(states, 3).exp() for states in (teacher, student))
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(relation_loss(student, teacher, 3), expected)
    assert relation_loss(student, student, 3) == 0
    wider = torch.cat([student.unflatten(-1, (3, 2)), torch.zeros(2, 5, 3, 2)], -1).flatten(-2) * 2**0.25
    assert relation_loss(student, wider, 3).abs() < 1e-6  # widths may differ: only relations count


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    model = tiny_llama()
    loss = RelationDistillation(copy.deepcopy(model), layer=1, heads=2)(model, TOKENS)
    loss.backward()
    assert loss.abs() < 1e-6
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in model.parameters())


def test_it_is_the_logits_loss_plus_the_weighted_relations_of_queries_keys_and_values():
    student, teacher = tiny_llama(seed=1), tiny_llama()
    with torch.no_grad(), projections(teacher, 1) as taught, projections(student, 1) as learned:
        logits = Distillation(teacher, 2.0, 0.5)(student, TOKENS)
        relations = sum(relation_loss(learned[key], taught[key], 2) for key in ("q_proj", "k_proj", "v_proj"))
        assert learned["q_proj"].shape == (3, 9, 64) and learned["k_proj"].shape == (3, 9, 32)
        loss = RelationDistillation(teacher, 2.0, 0.5, relation_weight=7.0, layer=1, heads=2)(student, TOKENS)
    assert relations > 0
    torch.testing.assert_close(loss, logits + 7 * relations)
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


def test_gradients_reach_the_projections_of_the_layer():
    student = tiny_llama(seed=1)
    student.requires_grad_(False)
    weights = [getattr(student.model.layers[1].self_attn, key).weight for key in ("q_proj", "k_proj", "v_proj")]
    gradients = []
    for relation_weight in (0.0, 5.0):
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        loss = RelationDistillation(tiny_llama(), relation_weight=relation_weight, layer=1, heads=2)
        loss(student, TOKENS).backward()
        gradients.append([weight.grad.clone() for weight in weights])
    assert all((a - b).norm() > 0.1 * a.norm() for a, b in zip(*gradients, strict=True))


def test_what_cannot_be_compared_is_said():
    model = tiny_llama()
    with pytest.raises(ValueError, match="layers 0 to 1"):
        RelationDistillation(model, layer=2, heads=2)(model, TOKENS)
    with pytest.raises(ValueError, match="3 heads do not divide"):
        RelationDistillation(model, layer=1, heads=3)(model, TOKENS)
    fused = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=128)).eval()
    with pytest.raises(ValueError, match=r"no q_proj or k_proj or v_proj: .*relation_weight=0"):
        RelationDistillation(fused, layer=1, heads=2)(fused, TOKENS)
