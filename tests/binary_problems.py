"""Weights, moments and levels for the tests of binary methods."""

import torch

from optimum_slim.levels import Levels


def problem(rows=24, columns=64, seed=0):
    """A Gaussian weight and the Gram matrix of strongly correlated inputs, a few of them much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns + 8, columns, generator=generator)
    x += torch.randn(len(x), 1 + columns // 8, generator=generator) @ torch.randn(
        1 + columns // 8, columns, generator=generator
    )
    x[:, ::11] *= 4
    return torch.randn(rows, columns, generator=generator) / 8, x.T @ x / len(x)


def random_levels(rows=6, columns=40, size=16, offset=True, scaled=True, seed=0, dtype=torch.float16) -> Levels:
    """Levels at random, with salient columns in every group."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // size)

    def numbers(*shape):
        return (torch.rand(*shape, generator=generator) + 0.25).to(dtype).float()

    minus, second = torch.rand(2, rows, columns, generator=generator) < 0.5
    salient = torch.arange(columns) % 5 == 1
    middle = (torch.randn(rows, groups, 3, generator=generator) / 8).to(dtype).float() if offset else None
    return Levels(
        minus, second, salient, numbers(rows, groups, 4), middle, numbers(2, columns) if scaled else None, size
    )


def output_error(weight, dense, gram) -> float:
    delta = (dense - weight).double()
    return float(((delta @ gram.double()) * delta).sum())
