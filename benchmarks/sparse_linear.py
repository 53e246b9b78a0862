"""Sparse linear layers on the CPU against bf16 `F.linear`: where they win, and where they do not.

    python benchmarks/sparse_linear.py            full run, writes benchmarks/results/sparse_linear.{csv,md}
    python benchmarks/sparse_linear.py --quick    shorter rounds

Activations are bf16. A layer is one of

    50%, 70%       that part of the weights dropped, wherever they lie: a bitmask and bf16 values, rows of any length
    2:4            two of every four columns kept: positions and bf16 values
    50%+4, 2:4+4   the same with values of 4 bits and one scale per row
    50%+8          the same with 8 bits

Candidates take turns inside each round, so that a busy moment hits all of them. Below 32 tokens a turn is 8 calls on 8
different weights, as the layers of a model follow one another, and its time is divided by 8. Weights rotate over
copies of more than 130 MB, so that decode reads memory. With one thread the clock is the CPU time of the thread, with
more it is wall-clock time. Ratios are `F.linear` time / sparse time: `median` compares the middle turns, `min` the
fastest. The verdict and the summary take the median with one thread; with more, where every turn waits for whatever
else the machine does, they take the fastest turns.
"""

import argparse
import csv
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from optimum_slim import _kernels as kernels
from optimum_slim._kernels.sparse_cpu import sparse_path


SHAPES = [(576, 576), (1536, 576), (4096, 4096), (4096, 11008), (11008, 4096)]
TOKENS = [1, 4, 16, 128]
KINDS = {"50%": (0.5, 0), "70%": (0.3, 0), "2:4": (None, 0), "50%+4": (0.5, 4), "2:4+4": (None, 4), "50%+8": (0.5, 8)}
ROTATED_BYTES = 130e6
BURST = 8
BUSY = (
    "\n\nOther programs kept the processors busy. Figures of one thread are CPU time and hold; those of several "
    "threads are wall-clock time, which then mostly measures who waited for whom: repeat them on an idle machine."
)
FIELDS = ["out", "in", "threads", "tokens", "kind", "bytes_ratio", "dense_us", "sparse_us"]
FIELDS += ["median_ratio", "min_ratio", "verdict"]


def make_sparse(outs: int, columns: int, density: float | None, bits: int) -> tuple:
    """The arguments of `sparse_linear` after x; `density` None means 2:4."""
    order = torch.rand(outs, columns)
    if density is None:
        chosen = order.view(outs, -1, 4).argsort(-1)[..., :2]
        mask = torch.zeros(outs, columns // 4, 4, dtype=torch.bool).scatter_(2, chosen, True).flatten(1)
    else:
        mask = order < density
    keep = 2 if density is None else 0
    kept = mask.sum(1)
    sizes = (kept * bits + 7) // 8 if bits else kept
    total = int(sizes.sum())
    values = torch.randint(0, 256, (total,), dtype=torch.uint8) if bits else torch.randn(total).bfloat16()
    rows = F.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)
    scale = torch.rand(outs, 1).bfloat16() if bits else None
    zero = torch.full((outs, 1), 2 ** (bits - 1), dtype=torch.uint8) if bits else None
    held = (values.view(outs, -1), None) if keep else (values, rows)
    return (kernels.pack_mask(mask, keep), *held, scale, zero, None, keep, bits, columns)


def size(layer: tuple) -> int:
    return sum(part.numel() * part.element_size() for part in layer if torch.is_tensor(part))


def rotated(layer: tuple) -> list[tuple]:
    copies = min(400, max(2, int(ROTATED_BYTES / size(layer)) + 1))
    return [tuple(part.clone() if torch.is_tensor(part) else part for part in layer) for _ in range(copies)]


def measure(candidates: dict, seconds: float, clock, repeats: int) -> dict[str, tuple[float, float]]:
    """Seconds of a call of each candidate: the median, the least."""
    times = {name: [] for name in candidates}
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or min(map(len, times.values())) < 5:
        for name, call in candidates.items():
            before = clock()
            for _ in range(repeats):
                call(calls)
                calls += 1
            times[name].append((clock() - before) / repeats)
    return {name: (statistics.median(taken), min(taken)) for name, taken in times.items()}


def call_dense(x: Tensor, layers: list[tuple]):
    return lambda i: F.linear(x, layers[i % len(layers)][0])


def call_sparse(x: Tensor, layers: list[tuple]):
    return lambda i: kernels.sparse_linear(x, *layers[i % len(layers)])


def run_shape(outs: int, columns: int, threads: int, seconds: float) -> list[dict]:
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    dense = (torch.randn(outs, columns).bfloat16(),)
    layers = {kind: make_sparse(outs, columns, *numbers) for kind, numbers in KINDS.items()}
    smaller = {kind: size(dense) / size(layer) for kind, layer in layers.items()}
    copies = {kind: rotated(layer) for kind, layer in layers.items()}
    dense_copies = rotated(dense)
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, columns).bfloat16()
        candidates = {"dense": call_dense(x, dense_copies)}
        candidates |= {kind: call_sparse(x, held) for kind, held in copies.items()}
        times = measure(candidates, seconds, clock, BURST if tokens < 32 else 1)
        for kind in KINDS:
            median, least = (slow / fast for slow, fast in zip(times["dense"], times[kind], strict=True))
            row = (outs, columns, threads, tokens, kind, round(smaller[kind], 2))
            row += (*(round(times[name][threads > 1] * 1e6) for name in ("dense", kind)), round(median, 2))
            row += (round(least, 2), "faster" if (median if threads == 1 else least) >= 1 else "slower")
            rows.append(dict(zip(FIELDS, row, strict=True)))
            print(format_row(rows[-1]), flush=True)
    return rows


def summary(rows: list[dict]) -> str:
    """One line per kind and number of threads: the range over the shapes, for each number of tokens."""
    lines = ["| kind | threads | " + " | ".join(f"M = {tokens}" for tokens in TOKENS) + " |", "|---" * 6 + "|"]
    for threads in sorted({row["threads"] for row in rows}):
        for kind in KINDS:
            cells = []
            for tokens in TOKENS:
                wanted = {"kind": kind, "threads": threads, "tokens": tokens}
                chosen = "median_ratio" if threads == 1 else "min_ratio"
                found = [row[chosen] for row in rows if wanted.items() <= row.items()]
                slower = " slower" if max(found) < 1 else " partly slower" if min(found) < 1 else ""
                cells.append(f"{min(found):.2f}-{max(found):.2f}{slower}")
            lines.append(f"| {kind} | {threads} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_row(row: dict) -> str:
    return "| " + " | ".join(map(str, row.values())) + " |"


def machine(operators: str) -> str:
    """What was measured where; `operators` names the kernels that answered."""
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return (
        f"{name}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, "
        f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}); {operators}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter rounds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.manual_seed(0)
    header = machine(f"kernel: C, {sparse_path()}")
    head = format_row({field: field for field in FIELDS}) + "\n" + "|---" * len(FIELDS) + "|"
    print(header, head, sep="\n\n")
    seconds = 0.5 if args.quick else 2.0
    with torch.inference_mode():
        rows = [row for shape in SHAPES for threads in args.threads for row in run_shape(*shape, threads, seconds)]
    rows.sort(key=lambda row: row["threads"])
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "sparse_linear.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    table = "\n".join([head, *map(format_row, rows)])
    title = "# Sparse linear layers against bf16 F.linear on the CPU"
    legend = (
        "Above 1 the sparse layer is faster. `bytes_ratio` is what the dense weight takes / what the packed one takes."
    )
    if os.getloadavg()[0] > os.cpu_count() + 1:
        legend += BUSY
    (args.out / "sparse_linear.md").write_text(f"{title}\n\n{header}\n\n{legend}\n\n{summary(rows)}\n\n{table}\n")
    print("\n" + summary(rows))


if __name__ == "__main__":
    main()
