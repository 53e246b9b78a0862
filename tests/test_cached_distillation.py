"""The divergence from a teacher's k likeliest tokens: its value, its gradient, and what it leaves out."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import kl_div

from optimum_slim.cached_distillation import top_divergence


def grouped(logits, ids, log_p):
    """KL_k as one would write it down."""
    q, p = logits.softmax(-1), log_p.softmax(-1)
    top = q.gather(-1, ids)
    both = torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)
    return (p * (p / both).log()).sum()


def problem(rows=7, vocabulary=50, k=5, seed=0, scale=2.0):
    torch.manual_seed(seed)
    target, logits = (torch.randn(rows, vocabulary, dtype=torch.float64) * scale for _ in range(2))
    return logits, target, *kept(target, k)


def kept(target, k):
    log_p = target.log_softmax(-1)
    top, ids = log_p.topk(k)
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return ids, torch.cat([top, rest], -1)


@pytest.mark.parametrize("k", [1, 5, 49])
def test_value_and_gradient_are_those_of_autograd(k):
    logits, _, ids, log_p = problem(k=k)
    logits.requires_grad_()
    expected = grouped(logits, ids, log_p)
    expected.backward()
    value, slope = top_divergence(logits.detach(), ids, log_p)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(slope, logits.grad)


def whole(logits, target):
    """The full divergence and its gradient."""
    logits = logits.clone().requires_grad_()
    value = kl_div(logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="sum")
    value.backward()
    return value.detach(), logits.grad


def test_it_is_a_lower_bound_that_grows_with_k_and_is_exact_with_the_whole_vocabulary():
    logits, target, *_ = problem()
    full, gradient = whole(logits, target)
    values = [top_divergence(logits, *kept(target, k))[0] for k in (1, 2, 8, 20, 40, 50)]
    assert all(0 < low < high for low, high in pairwise(values))
    torch.testing.assert_close(values[-1], full)
    torch.testing.assert_close(top_divergence(logits, *kept(target, 50))[1], gradient)


def test_what_it_leaves_out_is_how_the_other_tokens_share_their_probability():
    logits, target, ids, log_p = problem()
    others = [x.scatter(-1, ids, -torch.inf).log_softmax(-1) for x in (target, logits)]
    share = (others[0].exp() * (others[0] - others[1]).nan_to_num()).sum(-1)
    left_out = (log_p[:, -1].exp() * share).sum()
    torch.testing.assert_close(whole(logits, target)[0], top_divergence(logits, ids, log_p)[0] + left_out)


def renormalized(log_p):
    """The usual top-k: nothing is left for the other tokens."""
    return torch.cat([log_p[:, :-1], torch.full_like(log_p[:, -1:], -torch.inf)], -1)


def test_a_student_that_agrees_has_nothing_to_learn_unlike_from_renormalized_probabilities():
    _, target, ids, log_p = problem()
    value, slope = top_divergence(target, ids, log_p)
    assert abs(value) < 1e-12 and slope.abs().max() < 1e-12
    assert top_divergence(target, ids, renormalized(log_p))[1].abs().max() > 1e-2


def test_the_gradient_comes_near_the_whole_one_on_a_peaked_distribution():
    torch.manual_seed(0)
    ranks = -1.2 * torch.arange(1, 5001).log()[torch.randperm(5000)]  # about as words are distributed
    target = ranks + torch.randn(20, 5000)
    logits = target + 0.5 * torch.randn(20, 5000)  # a student that is on its way
    _, gradient = whole(logits, target)
    errors = []
    for k in (64, 256, 1024):
        ids, log_p = kept(target, k)
        slopes = [top_divergence(logits, ids, kind)[1] for kind in (log_p, renormalized(log_p))]
        ours, cut = ((slope - gradient).norm() / gradient.norm() for slope in slopes)
        assert ours < 0.5 * cut
        errors.append(ours)
    assert errors[0] > errors[1] > errors[2] and errors[1] < 0.1


def test_probabilities_of_zero_are_no_trouble():
    logits, _, ids, log_p = problem()
    log_p[0, 2:] = -torch.inf  # two tokens have it all
    logits[1, ids[1, 0].item()] = 2000.0  # the student is sure
    logits[2, :10] = -torch.inf
    keep = ~(ids < 10).any(-1)
    logits, ids, log_p = (x[keep | (torch.arange(7) < 2)] for x in (logits, ids, log_p))
    value, slope = top_divergence(logits.float(), ids, log_p.float())
    assert value.isfinite() and slope.isfinite().all()
    torch.testing.assert_close(slope.sum(-1), torch.zeros(len(slope)), atol=1e-5, rtol=0)
