"""Seconds to prune one layer: ours against a plain float32 loop of the same algorithm, in turns.

    python benchmarks/prune_time.py [--rounds 3] [--shapes 4096x4096 11008x4096]

The plain loop is SparseGPT as its authors wrote it (`variant="official"`): blocks of 128 columns, each column's update
written to the whole rest of the block, H inverted by way of its Cholesky factor. Ours halves the columns recursively,
so that most updates are large matrix products, inverts nothing, factorizes once for all layers with one input, and
finds thresholds without sorting. "Next" is the second layer with the same input (key after query, up after gate).
Writes results/prune_time.md.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch

from optimum_slim.hessian import Hessian
from optimum_slim.methods.sparsegpt import eliminate, official
from optimum_slim.sparsity import Pattern


RESULT = Path(__file__).parent / "results" / "prune_time.md"


def timed(function) -> tuple[float, object]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def measure(out_features: int, columns: int, sparsity, rounds: int) -> str:
    """The table's row for one shape (out x in) and pattern."""
    torch.manual_seed(0)
    weight = torch.randn(out_features, columns)
    inputs = torch.randn(2 * columns, columns // 8) @ torch.randn(columns // 8, columns) + torch.randn(
        2 * columns, columns
    )
    gram, pattern = inputs.T @ inputs / len(inputs), Pattern.parse(sparsity)
    del inputs
    plain, first, further = [], [], []
    for _ in range(rounds):
        seconds, (pruned, _) = timed(lambda: official(weight, gram, pattern))
        plain.append(seconds)
        factoring, hessian = timed(lambda: Hessian(gram))
        seconds, (ours, *_) = timed(lambda hessian=hessian: eliminate(weight, hessian, pattern))
        first.append(factoring + seconds)
        further.append(seconds)
    loss = hessian.error(weight - ours) / hessian.error(weight - pruned)
    base, once, again = (statistics.median(times) for times in (plain, first, further))
    return (
        f"| {out_features} x {columns} | {sparsity} | {base:.1f} | {once:.1f} ({base / once:.2f}x) | "
        f"{again:.1f} ({base / again:.2f}x) | {loss:.4f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096"])
    options = parser.parse_args()
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    lines = [
        "# Seconds to prune one layer",
        "",
        f"{machine}, fp32, medians of {options.rounds} in turns; made by `python benchmarks/prune_time.py`.",
        "",
        "| out x in | pattern | plain loop | ours, factorization included | ours, next layer | error, ours / plain |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    print("\n".join(lines))
    for shape in options.shapes:
        for sparsity in (0.5, "2:4"):
            lines.append(measure(*map(int, shape.split("x")), sparsity, options.rounds))
            print(lines[-1], flush=True)
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
