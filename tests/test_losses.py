import copy

import pytest
import torch
from helpers import tiny_llama, token_ids
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_slim import losses
from optimum_slim.losses import Distillation, next_token_loss, token_loss


def plain(logits, ids, teacher=None, temperature=1.0, kl_weight=1.0, divergence="forward"):
    """The formulas as one would write them down, in fp32."""
    logits, labels = logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
    nll = cross_entropy(logits, labels)
    if teacher is None:
        return nll
    teacher = teacher[:, :-1].flatten(0, 1).float()
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (teacher, logits))
    pair = (log_q, log_p) if divergence == "forward" else (log_p, log_q)
    distance = kl_div(*pair, log_target=True, reduction="batchmean")
    return kl_weight * temperature**2 * distance + (1 - kl_weight) * nll


CASES = {
    "next token": (False, 1.0, 1.0, "forward"),
    "divergence": (True, 1.0, 1.0, "forward"),
    "temperature": (True, 2.0, 1.0, "forward"),
    "mixture": (True, 3.0, 0.7, "forward"),
    "reverse": (True, 2.0, 1.0, "reverse"),
    "reverse mixture": (True, 1.0, 0.4, "reverse"),
}


@pytest.mark.parametrize(("taught", "temperature", "kl_weight", "divergence"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_token_loss_has_the_value_and_gradient_of_the_plain_formula(
    dtype, taught, temperature, kl_weight, divergence, monkeypatch
):
    monkeypatch.setattr(losses, "ROWS", 4)  # 9 rows a sample: two full chunks and one of a single row
    torch.manual_seed(0)
    ids = token_ids(3, 10, vocabulary=50)
    logits, teacher = (torch.randn(3, 10, 50).mul(3).to(dtype) for _ in range(2))
    teacher = teacher if taught else None
    found, wanted = (logits.clone().requires_grad_() for _ in range(2))
    settings = {"temperature": temperature, "kl_weight": kl_weight, "divergence": divergence}
    value = token_loss(found, ids, teacher, **settings)
    expected = plain(wanted, ids, teacher, **settings)
    assert value.dtype == torch.float32 and value.shape == ()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    (0.5 * value).backward()
    (0.5 * expected).backward()
    assert found.grad.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(
        found.grad, wanted.grad, rtol=tolerance, atol=tolerance * float(wanted.grad.abs().max())
    )


class Widest(TorchDispatchMode):
    """Remember the most rows of an fp32 tensor as wide as the vocabulary, and count 16-bit ones of full size."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows, self.full = vocabulary, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.dim() and output.shape[-1] == self.vocabulary:
            rows = output.numel() // self.vocabulary
            if output.dtype == torch.float32:
                self.rows = max(self.rows, rows)
            elif output.untyped_storage().nbytes() >= 2 * 2 * 300 * self.vocabulary:
                self.full.add(output.untyped_storage().data_ptr())
        return output


def test_token_loss_turns_few_rows_at_a_time_into_fp32_and_keeps_one_gradient():
    logits, teacher = (torch.randn(2, 300, 40).to(torch.bfloat16) for _ in range(2))
    logits.requires_grad_()
    with Widest(40) as seen:
        token_loss(logits, token_ids(2, 300, 40), teacher, kl_weight=0.5).backward()
    own = {logits.data_ptr(), teacher.data_ptr()}
    assert seen.rows == losses.ROWS
    assert len(seen.full - own) == 1 and logits.grad.data_ptr() in seen.full


def test_token_loss_differentiates_once_and_says_so():
    logits = torch.randn(1, 4, 5, requires_grad=True)
    value = token_loss(logits, token_ids(1, 4, 5))
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        value.backward()


def test_small_fp16_gradients_survive_because_the_mean_is_taken_last():
    logits = torch.zeros(1, 2001, 8, dtype=torch.float16, requires_grad=True)
    (token_loss(logits, torch.zeros(1, 2001, dtype=torch.int64)) * 2.0**14).backward()
    torch.testing.assert_close(logits.grad[0, 0, 1].float(), torch.tensor(2.0**14 / 8 / 2000), rtol=1e-3, atol=0)


def test_next_token_loss_is_that_of_transformers():
    model, ids = tiny_llama(), token_ids()
    torch.testing.assert_close(next_token_loss(model, ids), model(input_ids=ids, labels=ids).loss)


def test_a_model_distils_from_itself_without_loss():
    model = tiny_llama()
    loss = Distillation(model, temperature=2.0, hidden_weight=1.0, seams=[(0, 0), (1, 1)])
    assert abs(loss(model, token_ids()).item()) < 1e-6


def test_distillation_is_the_stated_sum():
    teacher, student, ids = tiny_llama(num_hidden_layers=3), tiny_llama(seed=1), token_ids()
    loss = Distillation(teacher, temperature=2.0, kl_weight=0.25, hidden_weight=0.5, seams=[(0, 1), (1, 2)])
    found = []
    for model, layers in ((student, (0, 1)), (teacher, (1, 2))):
        states = []
        handles = [
            model.model.layers[i].register_forward_hook(lambda m, a, out, s=states: s.append(out)) for i in layers
        ]
        logits = model(ids).logits
        for handle in handles:
            handle.remove()
        found.append((logits, states))
    (ours, student_states), (theirs, teacher_states) = found
    pairs = zip(student_states, teacher_states, strict=True)
    hidden = [((t - s).square().sum(-1) / t.square().sum(-1)).mean() for s, t in pairs]
    expected = plain(ours, ids, theirs, 2.0, 0.25) + 0.5 * sum(hidden) / 2
    torch.testing.assert_close(loss(student, ids), expected)


def test_hidden_term_alone_trains_what_is_before_the_seam():
    teacher, student = tiny_llama(num_hidden_layers=3), tiny_llama(seed=1)
    loss = Distillation(teacher, kl_weight=0.0, hidden_weight=1.0, seams=[(0, 1)])
    (loss(student, token_ids()) - next_token_loss(student, token_ids())).backward()
    assert student.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 1e-4
    assert student.model.layers[1].mlp.up_proj.weight.grad.abs().max() < 1e-6


def test_the_teacher_keeps_its_modes_flags_and_gradients():
    teacher, student = tiny_llama(attention_dropout=0.5), tiny_llama(seed=1)
    teacher.model.layers[1].train()
    modes = [module.training for module in teacher.modules()]
    loss = Distillation(teacher)
    first, second = (loss(student, token_ids()) for _ in range(2))
    assert torch.equal(first, second)  # no dropout in the teacher
    first.backward()
    assert [module.training for module in teacher.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_hooks_are_gone_afterwards_even_after_an_error():
    teacher, student = tiny_llama(), tiny_llama(seed=1)
    loss = Distillation(teacher, hidden_weight=1.0, seams=[(0, 1)])
    loss(student, token_ids())
    with pytest.raises(IndexError):
        loss(student, torch.full((1, 4), 1000))
    assert not any(module._forward_hooks for model in (teacher, student) for module in model.modules())


def test_a_peft_student_is_compared_at_its_own_layers():
    peft = pytest.importorskip("peft")
    teacher = tiny_llama()
    student = peft.get_peft_model(copy.deepcopy(teacher), peft.LoraConfig(r=2, target_modules=["up_proj"]))
    loss = Distillation(teacher, hidden_weight=1.0, seams=[(0, 0)])
    assert abs(loss(student, token_ids()).item()) < 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"kl_weight": 1.5}, "between 0 and 1"),
        ({"hidden_weight": -1.0}, "number of at least 0"),
        ({"hidden_weight": "adaptive"}, "must be 'dynamic'"),
        ({"hidden_distance": "l1"}, "relative, cosine"),
        ({"hidden_weight": 1.0}, "needs seams="),
        ({"kl_weight": 0.0}, "use next_token_loss"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Distillation(nn.Linear(1, 1), **settings)


@pytest.mark.parametrize(
    ("student", "seams", "message"),
    [
        ({"vocab_size": 120}, [(0, 0)], "same vocabulary"),
        ({"hidden_size": 32}, [(0, 0)], "or set hidden_weight=0"),
        ({}, [(2, 0)], "seams name student layer 2, but its layers are 0 to 1"),
        ({}, [(0, -2)], "seams name teacher layer -2"),
    ],
    ids=["vocabulary", "width", "student layer", "teacher layer"],
)
def test_models_that_do_not_fit_together_are_refused(student, seams, message):
    loss = Distillation(tiny_llama(), hidden_weight=1.0, seams=seams)
    with pytest.raises(ValueError, match=message):
        loss(tiny_llama(**student), token_ids(vocabulary=100))


def test_one_token_predicts_nothing():
    with pytest.raises(ValueError, match="at least 2 tokens"):
        next_token_loss(tiny_llama(), token_ids(1, 1))
