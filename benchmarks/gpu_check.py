"""Check the operators on this machine's GPU against their references, and time them against bf16 `F.linear`.

    python benchmarks/gpu_check.py [--part ternary|sparse|binary]

Prints markdown tables line by line and writes them to benchmarks/results/gpu.md (ternary), gpu_sparse.md and
gpu_binary.md. Without a GPU it says so and exits with status 1, as it does when an error is too large. Times are
medians of CUDA-graph replays (the sides in turn), so that launch overhead in Python, which a graph removes in use as
well, is left out. The weights of a shape rotate through more memory than the L2 cache holds.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gpu_binary
import gpu_sparse
import torch
import torch.nn.functional as F
from gpu_timing import ROTATED_BYTES, TOLERANCE, graph, relative_error, time_alternately

from optimum_slim._kernels import (
    pack_ternary,
    ternary_linear,
    ternary_linear_dx,
    ternary_linear_dx_reference,
    ternary_linear_reference,
)


RESULTS = Path(__file__).parent / "results"
SHAPES = {
    (4096, 4096): ("tensor", "row", "128", "100"),
    (4096, 11008): ("row", "128"),
    (130, 300): ("tensor", "row", "128", "100"),
}
TIMED_SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
TIMED_TOKENS = (1, 4, 16, 128, 512)


def make_layer(out_features: int, columns: int, kind: str):
    """(weight, scale, offset, group_size) on the GPU; `kind` is tensor, row, or a group size."""
    weight = pack_ternary(torch.randint(-1, 2, (out_features, columns), dtype=torch.int8, device="cuda"))
    if kind == "tensor":
        return weight, torch.rand(1, device="cuda") + 0.1, None, columns
    group_size = columns if kind == "row" else int(kind)
    scale = torch.rand(out_features, -(-columns // group_size), device="cuda") + 0.1
    return weight, scale, None if kind == "row" else torch.randn_like(scale) * 0.2, group_size


def errors() -> Iterator[tuple[str, bool]]:
    """Rows of the table of errors, and whether each is within its tolerance."""
    for (out_features, columns), kinds in SHAPES.items():
        for kind in kinds:
            weight, scale, offset, group_size = make_layer(out_features, columns, kind)
            for dtype, tolerance in TOLERANCE.items():
                found = {}
                for tokens in (1, 3, 17, 130):
                    x = torch.randn(tokens, columns, device="cuda", dtype=dtype)
                    dy = torch.randn(tokens, out_features, device="cuda", dtype=dtype)
                    bias = torch.randn(out_features, device="cuda", dtype=dtype)
                    for name, act_bits in (("W2A16", 0), ("W2A8", 8)):
                        arguments = (x, weight, scale, offset, bias, out_features, group_size, act_bits)
                        error = relative_error(ternary_linear(*arguments), ternary_linear_reference(*arguments))
                        found[name] = max(found.get(name, 0), error)
                    arguments = (dy, weight, scale, offset, group_size)
                    error = relative_error(ternary_linear_dx(*arguments), ternary_linear_dx_reference(*arguments))
                    found["dx"] = max(found.get("dx", 0), error)
                good = all(error <= tolerance for error in found.values())
                cells = " | ".join(f"{found[name]:.1e}" for name in ("W2A16", "W2A8", "dx"))
                name = str(dtype).removeprefix("torch.")
                verdict = "ok" if good else "FAIL"
                yield f"| {out_features} x {columns} | {kind} | {name} | {cells} | {verdict} |", good


def copies_of(layer: tuple) -> list[tuple]:
    """Copies of a layer that fill `ROTATED_BYTES`."""
    copies = max(2, ROTATED_BYTES // layer[0].numel())
    return [tuple(part.clone() if isinstance(part, torch.Tensor) else part for part in layer) for _ in range(copies)]


def times() -> Iterator[str]:
    """Rows of the table of times."""
    for out_features, columns in TIMED_SHAPES:
        weight = torch.randn(out_features, columns, device="cuda").bfloat16()
        dense = [weight.clone() for _ in range(max(2, ROTATED_BYTES // (2 * weight.numel())))]
        per_row = copies_of(make_layer(out_features, columns, "row"))
        per_group = copies_of(make_layer(out_features, columns, "128"))
        calls = len(per_row)
        for tokens in TIMED_TOKENS:
            x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)

            def ternary(layers, act_bits, x=x, out_features=out_features):
                def call(i):
                    weight, scale, offset, group_size = layers[i]
                    return ternary_linear(x, weight, scale, offset, None, out_features, group_size, act_bits)

                return call

            def linear(i, x=x, dense=dense):
                return F.linear(x, dense[i % len(dense)])

            graphs = {
                "F.linear": graph(linear, calls),
                "W2A8 row": graph(ternary(per_row, 8), calls),
                "W2A8 g128": graph(ternary(per_group, 8), calls),
                "W2A16 row": graph(ternary(per_row, 0), calls),
                "W2A16 g128": graph(ternary(per_group, 0), calls),
            }
            found = time_alternately(graphs, calls)
            base = found.pop("F.linear")
            cells = " | ".join(f"{duration:.1f} ({base / duration:.2f}x)" for duration in found.values())
            yield f"| {out_features} x {columns} | {tokens} | {base:.1f} | {cells} |"


def lines() -> Iterator[str | bool]:
    """The report line by line, then whether every error was within its tolerance."""
    yield "Largest relative RMS error against the reference, M = 1, 3, 17, 130:"
    yield ""
    yield "| out x in | scales | dtype | W2A16 | W2A8 | dx | |"
    yield "|---|---|---|---|---|---|---|"
    passed = True
    for row, good in errors():
        yield row
        passed &= good
    yield ""
    yield "Microseconds per call (and times faster than bf16 `F.linear`), bf16 activations, CUDA graphs, median of 15:"
    yield ""
    yield "| out x in | M | F.linear | W2A8 row | W2A8 g128 | W2A16 row | W2A16 g128 |"
    yield "|---|---|---|---|---|---|---|"
    yield from times()
    yield passed


PARTS = {
    "ternary": ("# Ternary operators on a GPU", lines, "gpu.md"),
    "sparse": ("# Sparse operators on a GPU", gpu_sparse.lines, "gpu_sparse.md"),
    "binary": ("# Sign and binary operators on a GPU", gpu_binary.lines, "gpu_binary.md"),
}


def run(part: str) -> bool:
    """Print and write one part; whether it passed."""
    title, produce, name = PARTS[part]
    machine = f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}."
    report = [title, "", f"{machine} Written by `python benchmarks/gpu_check.py --part {part}`.", ""]
    print(*report, sep="\n", flush=True)
    started, passed = time.monotonic(), False
    for line in produce():
        if isinstance(line, bool):
            passed = line
            continue
        report.append(line)
        print(line, flush=True)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / name).write_text("\n".join(report) + "\n")
    print(f"\n{part}: {'passed' if passed else 'FAILED'} in {time.monotonic() - started:.0f} s\n", flush=True)
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, help="only this part")
    part = parser.parse_args().part
    if not torch.cuda.is_available():
        print("gpu_check: PyTorch finds no GPU on this machine, so there is nothing to check.", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    return 0 if all(list(map(run, [part] if part else PARTS))) else 1


if __name__ == "__main__":
    sys.exit(main())
