"""The second moments of a layer's inputs, dampened and factorized once for all layers that share them.

The layer-wise error of a weight Q in place of W is quadratic in their difference, and H is all it needs of the data:

    ||(W - Q) X||² / tokens = tr((W - Q) H (W - Q)ᵀ)        H = X Xᵀ / tokens

For a fixed order of the columns, all that OBS-like methods need is V, upper triangular with H = V Vᵀ. Its inverse is
SparseGPT's U, H⁻¹ = Uᵀ U (arXiv 2301.00774, Section 3.2), and 1 / V[j, j]² is the entry of column j in the inverse of
H restricted to columns j and later. No inverse is computed: what the later columns do to make up for a change of the
earlier ones follows from V as well (see `eliminate` in methods/sparsegpt.py).
"""

import torch
from torch import Tensor


MAX_DAMPENING = 1.0


class Hessian:
    """H of one input, with a mean diagonal of 1.

    Args:
        gram: fp32 (in, in), the mean of x xᵀ over the tokens; not changed.
        dampening: share of the mean diagonal added to the diagonal; raised tenfold, up to 1, for as long as the matrix
            cannot be factorized.

    Attributes:
        scale: what the Gram matrix was divided by, its mean diagonal.
        dead: bool (in,), inputs that were always 0; their diagonal is 1 and their weights are to be 0.
        dampening: the share that was added in the end.
        matrix: fp32 (in, in), the dampened H.
        factor: fp32 (in, in), V.

    Raises:
        ValueError: the matrix is not finite, or not positive definite at the largest dampening.
    """

    def __init__(self, gram: Tensor, dampening: float = 0.01):
        gram = gram.float()
        mean = gram.diagonal().mean()
        if not torch.isfinite(mean):
            raise ValueError("the inputs of the layer hold NaN or infinite values; calibrate in float32 or bfloat16")
        self.scale = mean.where(mean > 0, 1)
        self.matrix = gram / self.scale
        self.dead = self.matrix.diagonal() == 0
        self.matrix.diagonal()[self.dead] = 1
        self._factorize(dampening)

    def _factorize(self, dampening: float) -> None:
        mean, added = self.matrix.diagonal().mean().item(), 0.0
        while dampening <= MAX_DAMPENING * 1.001:
            self.matrix.diagonal().add_((dampening - added) * mean)
            factor, failed = torch.linalg.cholesky_ex(self.matrix.flip(0, 1))
            if not failed:
                self.factor, self.dampening = factor.flip(0, 1), dampening
                return
            added, dampening = dampening, dampening * 10
        raise ValueError(
            f"the Gram matrix is not positive definite, even with a dampening of {MAX_DAMPENING}; "
            "use more calibration samples, or calibrate in float32"
        )

    def divide(self, matrix: Tensor) -> Tensor:
        """matrix H⁻¹ for a matrix (rows, in)."""
        half = torch.linalg.solve_triangular(self.factor.T, matrix, upper=False, left=False)
        return torch.linalg.solve_triangular(self.factor, half, upper=True, left=False)

    def error(self, delta: Tensor) -> float:
        """tr(D H Dᵀ) of a difference of weights (out, in)."""
        return float(torch.sum((delta @ self.matrix).mul_(delta)))


def asymmetric_map(gram: Tensor, cross: Tensor, strength: float) -> Tensor:
    """What turns a weight into the target of asymmetric calibration: W' = W M, an (in, in) matrix.

    The layer should do on its inputs X what it did on inputs R of the unslimmed model: ||W R - W' X||² is least for
    W' = W C H⁻¹ with C = R Xᵀ. M goes `strength` of the way there: M = I + strength (C - H) H⁻¹ (GPTAQ, arXiv
    2504.02692, which goes a quarter of the way, column by column).

    Args:
        gram, cross: (in, in), the means of x xᵀ and of r xᵀ.
    """
    hessian = Hessian(gram)
    moved = hessian.divide((cross - gram) / hessian.scale)
    return torch.eye(len(gram), dtype=moved.dtype, device=moved.device).add_(moved, alpha=strength)
