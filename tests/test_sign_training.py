import copy

import pytest
import torch
from helpers import tiny_llama, token_ids

from optimum_slim import SignLinear
from optimum_slim._kernels import unpack_signs
from optimum_slim.losses import token_loss
from optimum_slim.methods.onebit import svid
from optimum_slim.sign_training import (
    LatentSignLinear,
    SignDistillation,
    Signs,
    direction_distance,
    first_latents,
)
from optimum_slim.sparse_training import product


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latent_layer(out_features=12, in_features=21, bias=True, start="weights", **layout) -> LatentSignLinear:
    weight = gaussian(out_features, in_features) / 5
    packed = SignLinear(in_features, out_features, bias, device="meta", **layout)
    bias = gaussian(out_features, seed=9) if bias else None
    return LatentSignLinear(packed, first_latents(weight, start), *svid(weight), bias)


LAYOUTS = {
    "plain": {},
    "no bias": {"bias": False},
    "post norm": {"post_norm": True},
    "int8": {"activation_bits": 8},
    "bf16 scales": {"scale_dtype": torch.bfloat16},
    "signs": {"start": "signs"},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_packed_layer_computes_what_the_one_in_training_does(layout):
    """Also after training: in between, latents and scales move to where no start puts them."""
    latent, first = latent_layer(**layout), latent_layer(**layout).packed()
    x, target = gaussian(32, 21, seed=1), gaussian(32, 12, seed=2)
    optimizer = torch.optim.Adam(latent.parameters(), lr=1e-3)
    for _ in range(14):
        optimizer.zero_grad()
        (latent(x) - target).square().mean().backward()
        optimizer.step()
    packed = latent.packed()
    assert type(packed) is SignLinear and not torch.equal(packed.weight_out, first.weight_out)
    assert 0 < (unpack_signs(packed.weight, 21) ^ unpack_signs(first.weight, 21)).float().mean() < 1
    with torch.no_grad():
        torch.testing.assert_close(packed(x), latent(x), rtol=1e-5, atol=2e-5)


def test_training_in_16_bits_computes_in_16_bits():
    latent, packed = latent_layer(), latent_layer().packed()
    x = gaussian(8, 21, seed=1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = latent(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), packed(x), rtol=0.03, atol=0.03)
    assert latent(x).dtype == torch.float32


def test_the_sign_gradient_is_the_stated_one():
    latent = gaussian(5, 7).requires_grad_()
    x, slope = gaussian(3, 7, seed=1), gaussian(3, 5, seed=2)
    product(x, Signs(), latent).backward(slope)
    of_the_signs = slope.T @ x
    torch.testing.assert_close(latent.grad, of_the_signs * (1.001 - torch.tanh(latent.detach()) ** 2))


def test_the_gradients_of_scales_input_and_bias_are_those_of_the_formula():
    latent = latent_layer(scale_dtype=torch.float32)
    x, slope = gaussian(6, 21, seed=1).requires_grad_(), gaussian(6, 12, seed=2)
    latent(x).backward(slope)
    signs = Signs().weight(latent.weight).detach()
    a, b = latent.weight_out.detach().requires_grad_(), latent.weight_in.detach().requires_grad_()
    (((x.detach() * b) @ signs.T) * a).backward(slope)
    torch.testing.assert_close(latent.weight_out.grad, a.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(latent.weight_in.grad, b.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(latent.bias.grad, slope.sum(0))
    torch.testing.assert_close(x.grad, slope @ latent.packed().dense(), rtol=1e-5, atol=1e-5)


def test_rounding_the_scales_lets_the_gradient_through():
    coarse, fine = (latent_layer(scale_dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    x = gaussian(6, 21, seed=1)
    for layer in (coarse, fine):
        layer(x).sum().backward()
    assert not torch.equal(coarse(x), fine(x))
    torch.testing.assert_close(coarse.weight_out.grad, fine.weight_out.grad, rtol=0.02, atol=0.02)


def test_where_latents_start():
    weight = torch.tensor([[0.5, -0.25, 0.0], [-1.0, 0.125, -0.125]])
    torch.testing.assert_close(first_latents(weight, "signs"), 0.01 * torch.tensor([[1, -1, 1], [-1, 1, -1.0]]))
    torch.testing.assert_close(first_latents(weight, "weights"), weight * 0.03)  # the mean magnitude is a third
    for start in ("signs", "weights"):
        assert torch.equal(first_latents(gaussian(9, 9), start) < 0, gaussian(9, 9) < 0)
        assert torch.isfinite(first_latents(torch.zeros(2, 3), start)).all()


def test_the_sign_of_zero_is_plus_in_training_and_packed():
    latent = latent_layer(bias=False)
    with torch.no_grad():
        latent.weight.zero_()
        latent.weight[0, 0] = -0.0
    assert (Signs().weight(latent.weight) == 1).all()
    assert not latent.packed().weight.any()


# --- the loss


def test_the_loss_is_zero_for_the_teacher_itself():
    teacher = tiny_llama()
    assert SignDistillation(teacher)(copy.deepcopy(teacher), token_ids()) == 0


def test_the_loss_by_hand():
    teacher, student, ids = tiny_llama(seed=0), tiny_llama(seed=1), token_ids()
    with torch.no_grad():
        theirs, ours = (model(ids, output_hidden_states=True) for model in (teacher, student))
        p, q = (out.logits[:, :-1].log_softmax(-1) for out in (theirs, ours))
        divergence = (p.exp() * (p - q)).sum(-1).mean()
        hidden = 0
        for layer in (0, 1):  # what leaves the embeddings and the first of two decoder layers, not the last one
            t, s = (out.hidden_states[layer] for out in (theirs, ours))
            t, s = (x / x.norm(dim=-1, keepdim=True) for x in (t, s))
            hidden += (t - s).norm(dim=-1).square().mean()
        assert len(ours.hidden_states) == 3
        torch.testing.assert_close(SignDistillation(teacher, 0.0)(student, ids), divergence)
        torch.testing.assert_close(SignDistillation(teacher)(student, ids), divergence + hidden)
        torch.testing.assert_close(SignDistillation(teacher, 0.25)(student, ids), divergence + hidden / 4)


def test_no_text_is_predicted():
    """Other labels, the same predictions of the teacher: the loss of the logits is the same."""
    teacher, student = gaussian(2, 5, 11), gaussian(2, 5, 11, seed=1)
    one, other = (token_loss(student, token_ids(2, 5, 11, seed), teacher) for seed in (0, 1))
    assert one == other > 0


def test_hidden_states_count_by_direction():
    t, s = gaussian(2, 4, 8), gaussian(2, 4, 8, seed=1)
    torch.testing.assert_close(direction_distance(3 * s, 0.1 * t), direction_distance(s, t))
    torch.testing.assert_close(direction_distance(-t, t), torch.tensor(4.0))
    torch.testing.assert_close(direction_distance(5 * t, t), torch.tensor(0.0), rtol=0, atol=1e-12)


def test_teachers_of_another_depth_need_no_hidden_term():
    teacher, student = tiny_llama(num_hidden_layers=3), tiny_llama()
    with pytest.raises(ValueError, match=r"3 and 4 hidden states.*hidden_weight=0"):
        SignDistillation(teacher)(student, token_ids())
    assert SignDistillation(teacher, 0.0)(student, token_ids()) > 0


def test_the_teacher_is_left_as_it_was():
    teacher, student = tiny_llama().train(), tiny_llama(seed=1)
    SignDistillation(teacher)(student, token_ids()).backward()
    assert teacher.training and all(parameter.grad is None for parameter in teacher.parameters())
    assert any(parameter.grad is not None for parameter in student.parameters())
