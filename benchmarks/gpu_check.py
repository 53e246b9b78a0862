"""Check the ternary operators on this machine's GPU against the reference, and time them against bf16 `F.linear`.

    python benchmarks/gpu_check.py

Prints two markdown tables and writes them to benchmarks/results/gpu.md. Without a GPU it says so and exits with
status 1. Times are medians of CUDA-graph replays (the two sides in turn), so that launch overhead in Python, which a
graph removes in use as well, is left out. The weights of a shape rotate through more memory than the L2 cache holds.
"""

import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from optimum_slim._kernels import (
    pack_ternary,
    ternary_linear,
    ternary_linear_dx,
    ternary_linear_dx_reference,
    ternary_linear_reference,
)


RESULT = Path(__file__).parent / "results" / "gpu.md"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = ((4096, 4096), (4096, 11008), (130, 300))
TIMED_SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
TIMED_TOKENS = (1, 4, 16, 128, 512)
ROTATED_BYTES = 256 * 2**20


def make_layer(out_features: int, columns: int, kind: str):
    """(weight, scale, offset, group_size) on the GPU; `kind` is tensor, row, or a group size."""
    weight = pack_ternary(torch.randint(-1, 2, (out_features, columns), dtype=torch.int8, device="cuda"))
    if kind == "tensor":
        return weight, torch.rand(1, device="cuda") + 0.1, None, columns
    group_size = columns if kind == "row" else int(kind)
    scale = torch.rand(out_features, -(-columns // group_size), device="cuda") + 0.1
    return weight, scale, None if kind == "row" else torch.randn_like(scale) * 0.2, group_size


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()


def check() -> tuple[list[str], bool]:
    """Rows of the table of errors, and whether every one is within its tolerance."""
    rows, passed = [], True
    for out_features, columns in SHAPES:
        for kind in ("tensor", "row", "128", "100"):
            weight, scale, offset, group_size = make_layer(out_features, columns, kind)
            for dtype, tolerance in TOLERANCE.items():
                errors = {}
                for tokens in (1, 3, 17, 130):
                    x = torch.randn(tokens, columns, device="cuda", dtype=dtype)
                    dy = torch.randn(tokens, out_features, device="cuda", dtype=dtype)
                    bias = torch.randn(out_features, device="cuda", dtype=dtype)
                    for name, act_bits in (("W2A16", 0), ("W2A8", 8)):
                        arguments = (x, weight, scale, offset, bias, out_features, group_size, act_bits)
                        error = relative_error(ternary_linear(*arguments), ternary_linear_reference(*arguments))
                        errors[name] = max(errors.get(name, 0), error)
                    arguments = (dy, weight, scale, offset, group_size)
                    error = relative_error(ternary_linear_dx(*arguments), ternary_linear_dx_reference(*arguments))
                    errors["dx"] = max(errors.get("dx", 0), error)
                good = all(error <= tolerance for error in errors.values())
                passed &= good
                cells = " | ".join(f"{errors[name]:.1e}" for name in ("W2A16", "W2A8", "dx"))
                shape = f"{out_features} x {columns}"
                name = str(dtype).removeprefix("torch.")
                rows.append(f"| {shape} | {kind} | {name} | {cells} | {'ok' if good else 'FAIL'} |")
    return rows, passed


def graph(function, copies: int):
    """A CUDA graph of function(0) ... function(copies - 1), warmed up."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(copies):
            function(i)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        for i in range(copies):
            function(i)
    return captured


def time_alternately(graphs: dict, copies: int, rounds: int = 15) -> dict[str, float]:
    """Median microseconds per call, the graphs replayed in turn."""
    times = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, captured in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            captured.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1000 / copies)
    return {name: statistics.median(values) for name, values in times.items()}


def measure() -> list[str]:
    """Rows of the table of times."""
    rows = []
    for out_features, columns in TIMED_SHAPES:
        copies = max(2, ROTATED_BYTES // (out_features * columns // 4))
        dense_copies = max(2, ROTATED_BYTES // (out_features * columns * 2))
        dense = [torch.randn(out_features, columns, device="cuda").bfloat16() for _ in range(dense_copies)]
        per_row = [make_layer(out_features, columns, "row") for _ in range(copies)]
        per_group = [make_layer(out_features, columns, "128") for _ in range(copies)]
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
                "F.linear": graph(linear, copies),
                "W2A8 row": graph(ternary(per_row, 8), copies),
                "W2A8 g128": graph(ternary(per_group, 8), copies),
                "W2A16 row": graph(ternary(per_row, 0), copies),
                "W2A16 g128": graph(ternary(per_group, 0), copies),
            }
            times = time_alternately(graphs, copies)
            base = times.pop("F.linear")
            cells = " | ".join(f"{time:.1f} ({base / time:.2f}x)" for time in times.values())
            rows.append(f"| {out_features} x {columns} | {tokens} | {base:.1f} | {cells} |")
    return rows


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu_check: PyTorch finds no GPU on this machine, so there is nothing to check.", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    errors, passed = check()
    lines = [
        "# Ternary operators on a GPU",
        "",
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}. Written by `python benchmarks/gpu_check.py`.",
        "",
        "Largest relative RMS error against the reference, M = 1, 3, 17, 130:",
        "",
        "| out x in | scales | dtype | W2A16 | W2A8 | dx | |",
        "|---|---|---|---|---|---|---|",
        *errors,
        "",
        "Microseconds per call (and times faster than bf16 `F.linear`), bf16 activations, CUDA graphs, median of 15:",
        "",
        "| out x in | M | F.linear | W2A8 row | W2A8 g128 | W2A16 row | W2A16 g128 |",
        "|---|---|---|---|---|---|---|",
        *measure(),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
