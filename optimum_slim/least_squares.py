"""The best weights for a mask, and a better mask for the weights.

Both minimize the output error of a layer, tr((T - Q) H (T - Q)ᵀ) with T the weights aimed at, over Q that is 0 where
the mask drops. For a given mask that is least squares, solved for all rows at once by conjugate gradients (`refit`,
the last step of ALPS, arXiv 2406.07831). The mask improves by hard thresholding pursuit (Foucart, SIAM J. Numer. Anal.
49, 2011): follow the gradient to where dropped weights would like to be, keep the best again, and refit (`pursue`).
"""

from collections.abc import Callable

import torch
from torch import Tensor


PURSUIT_STEPS = 2  # of conjugate gradients for each mask that is tried


def refit(weight: Tensor, target: Tensor, mask: Tensor, hessian: Tensor, iterations: int) -> Tensor:
    """The kept weights that come closest to `target` in the layer's outputs, every row by itself.

    Conjugate gradients with the diagonal of H as preconditioner, starting from `weight`.

    Args:
        weight, target: (out, in).
        mask: bool (out, in), true where a weight is dropped.
        hessian: positive definite (in, in).
        iterations: most steps; ALPS takes 10.
    """
    return _refit(weight, target, mask, hessian, iterations)[0]


def _refit(weight: Tensor, target: Tensor, mask: Tensor, hessian: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """`refit`, and what is left of the gradient, (target - weight) H, for dropped weights too."""
    kept, diagonal = ~mask, hessian.diagonal()
    solution = weight * kept
    gradient = (target - solution) @ hessian
    scaled = (gradient / diagonal).mul_(kept)
    direction = scaled.clone()
    product = (gradient * scaled).sum(1, keepdim=True)
    floor = 1e-12 * product
    for _ in range(iterations):
        image = direction @ hessian
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where(curvature > 0, product / curvature, 0)
        solution.addcmul_(step, direction)
        gradient.addcmul_(step, image, value=-1)
        torch.div(gradient, diagonal, out=scaled).mul_(kept)
        previous, product = product, (gradient * scaled).sum(1, keepdim=True)
        if bool((product <= floor).all()):
            break
        direction.mul_(torch.where(previous > 0, product / previous, 0)).add_(scaled)
    return solution, gradient


def pursue(
    weight: Tensor, target: Tensor, mask: Tensor, hessian: Tensor, choose: Callable[[Tensor], Tensor], rounds: int
) -> tuple[Tensor, Tensor]:
    """A mask with less output error than `mask`, and weights that are nearly the best for it.

    A round is kept if the error fell; the first that does not ends the search, so that the result is never worse.

    Args:
        weight, target, mask, hessian: as for `refit`.
        choose: turns scores (out, in) into a mask of what is dropped.
        rounds: most rounds; each costs about 3 products of `weight` with `hessian`.

    Returns:
        The weight and the mask.
    """
    diagonal = hessian.diagonal()
    weight, gradient = _refit(weight, target, mask, hessian, PURSUIT_STEPS)
    error = _error(target - weight, gradient)
    for _ in range(rounds):
        moved = weight + gradient / diagonal
        tried_mask = choose(moved.square().mul_(diagonal))
        tried, gradient = _refit(weight, target, tried_mask, hessian, PURSUIT_STEPS)
        tried_error = _error(target - tried, gradient)
        if not tried_error < error:
            break
        weight, mask, error = tried, tried_mask, tried_error
    return weight, mask


def _error(delta: Tensor, gradient: Tensor) -> float:
    return float(torch.sum(delta.mul_(gradient), dtype=torch.float64))
