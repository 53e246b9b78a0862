"""Teachers that learn the data, before the distillation or alongside it."""

import pytest
import torch
from helpers import tiny_llama, token_ids

from optimum_slim import Heal, Minitron, slim
from optimum_slim.losses import TEACHER, token_loss
from optimum_slim.teacher_correction import RATE, CorrectedDistillation, corrected, trained_along
from optimum_slim.train import fit, next_token_loss


TEXT = (torch.arange(12)[None] * 3 + torch.arange(32)[:, None]) % 100  # which a random model can learn
SETTINGS = {"steps": 30, "batch_size": 4, "learning_rate": 2e-2, "evaluate_every": 10, "held_out": 0.2}


def loss_on_text(model):
    with torch.no_grad():
        return float(token_loss(model(TEXT).logits, TEXT))


@pytest.mark.parametrize("how", [30, "alongside"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_corrected_teacher_teaches_the_text(how, method):
    found = {}
    for correction in (0, how):
        model = tiny_llama()
        heal = Heal(method=method, teacher_correction=correction, **SETTINGS)
        report = slim(model, [Minitron(intermediate_size=64), heal], data=TEXT)
        found[correction] = loss_on_text(model)
        assert not hasattr(model, TEACHER)
        assert any("teacher corrected" in note for note in report.notes) == (correction == 30)
    assert found[how] < found[0] - 0.05


def test_correction_is_next_token_training_at_a_fifth_of_the_rate():
    teacher, plain = tiny_llama(), tiny_llama()
    found = corrected(teacher, TEXT, **SETTINGS)
    fit(plain, TEXT, next_token_loss, **SETTINGS | {"learning_rate": RATE * SETTINGS["learning_rate"]})
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), plain.parameters(), strict=True))
    assert "held-out loss" in found.correction
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), tiny_llama().parameters(), strict=True))
    half = corrected(tiny_llama().to(torch.bfloat16), TEXT, **SETTINGS | {"steps": 2, "mixed_precision": "bf16"})
    assert half.dtype == torch.bfloat16


def test_alongside_each_learns_from_its_own_part_and_the_teacher_at_its_own_rate():
    student, teacher, ids = tiny_llama(seed=1), tiny_llama(), token_ids()
    with trained_along(student, teacher):
        copied = getattr(student, TEACHER)
        CorrectedDistillation(teacher)(student, ids).backward()
        ours, theirs = (model.model.norm.weight.grad.clone() for model in (student, copied))
        with torch.no_grad():  # an evaluation looks at the student alone
            value = CorrectedDistillation(teacher)(student, ids)
            torch.testing.assert_close(value, token_loss(student(ids).logits, ids))
    student.zero_grad()
    token_loss(student(ids).logits, ids, teacher(ids).logits.detach()).backward()
    torch.testing.assert_close(ours, student.model.norm.weight.grad)
    next_token_loss(teacher, ids).backward()
    torch.testing.assert_close(theirs, teacher.model.norm.weight.grad)

    student = tiny_llama(seed=1)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    with trained_along(student, teacher):
        start = [p.detach().clone() for p in getattr(student, TEACHER).parameters()]
        one = {"steps": 1, "batch_size": 2, "learning_rate": 1e-3, "held_out": 0, "rates": {TEACHER: RATE}}
        fit(student, TEXT, CorrectedDistillation(teacher), max_grad_norm=None, **one)
        moved = max(
            float((a - b).abs().max()) for a, b in zip(getattr(student, TEACHER).parameters(), start, strict=True)
        )
    own = max(float((p - before[name]).abs().max()) for name, p in student.named_parameters())
    assert moved == pytest.approx(RATE * own, rel=0.05)  # a first step of Adam is as long as the rate


def test_a_corrected_teacher_may_be_cached(tmp_path):
    model = tiny_llama()
    heal = Heal(method="full", teacher_correction=20, teacher_top_k=32, **SETTINGS)
    report = slim(model, [Minitron(intermediate_size=64), heal], data=TEXT)
    assert any("teacher corrected" in note for note in report.notes)
    assert any("cache" in note or "likeliest" in note for note in report.notes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher_correction": -1}, "number of steps or 'alongside'"),
        ({"teacher_correction": "before"}, "number of steps or 'alongside'"),
        ({"teacher_correction": "alongside", "teacher_bits": 4}, "leave out teacher_bits"),
        ({"teacher_correction": "alongside", "hidden_weight": 1.0, "hidden_layers": "ends"}, "compares logits alone"),
        ({"teacher_correction": 5, "hidden_weight": 1.0}, "hidden_layers='ends'"),
        ({"teacher_correction": 5, "loss": "next_token"}, "loss='distill'"),
    ],
    ids=str,
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Heal(**fields)
