"""Ternary linear on the CPU against `F.linear`, and whether the targets hold.

    python benchmarks/ternary_linear.py                   full run, writes benchmarks/results/ternary_linear.{csv,md}
    python benchmarks/ternary_linear.py --quick           fewer rounds and batch sizes
    python benchmarks/ternary_linear.py --emulate avx2    an AVX2 machine, for both sides; writes ternary_linear-avx2.*

Candidates take turns inside each round, so that a busy moment hits all of them. Below 16 tokens a turn is 8 calls on
8 different weights, as the layers of a model follow one another, and its time is divided by 8. Weights rotate over
copies of more than 160 MB, so that decode reads memory. With one thread the clock is the CPU time of the thread, with
more it is wall-clock time. Ratios are `F.linear` time / ternary time; `min` compares the fastest turns, `median` the
middle ones.
"""

import argparse
import csv
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from optimum_slim import _kernels as kernels


AVX2 = {
    "OPTIMUM_SLIM_CPU": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096)]
TOKENS = [1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512]
ROTATED_BYTES = 170e6
BURST = 8
FIELDS = [
    "out",
    "in",
    "threads",
    "scales",
    "act_bits",
    "tokens",
    "dtype",
    "dense_us",
    "ternary_us",
    "min_ratio",
    "median_ratio",
    "target",
    "ok",
]


def target(tokens: int, threads: int, dtype: torch.dtype) -> float:
    """The ratio to reach: decode 10 (two threads: 15 fp32, 12 bf16), 128 tokens 2 in fp32, never slower elsewhere."""
    if tokens == 1:
        return 10.0 if threads == 1 else 15.0 if dtype == torch.float32 else 12.0
    return 2.0 if tokens == 128 and dtype == torch.float32 else 1.0


def make_ternary(outs: int, columns: int, group_size: int | None) -> list[tuple]:
    rows = -(-outs // 4)
    layers = []
    for _ in range(max(2, int(ROTATED_BYTES / (rows * columns)))):
        weight = torch.randint(0, 256, (rows, columns), dtype=torch.uint8) & 0xAA
        if group_size is None:
            layers.append((weight, torch.rand(1), None, None, outs, columns))
        else:
            shape = (outs, -(-columns // group_size))
            scale, offset = (torch.rand(shape, dtype=torch.float16) for _ in range(2))
            layers.append((weight, scale, offset, None, outs, group_size))
    return layers


def make_dense(outs: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    copies = max(2, int(ROTATED_BYTES / (outs * columns * dtype.itemsize)) + 1)
    return [torch.randn(outs, columns).to(dtype) for _ in range(copies)]


def measure(candidates: dict, seconds: float, clock, repeats: dict) -> dict[str, list[float]]:
    times = {name: [] for name in candidates}
    calls = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or min(map(len, times.values())) < 4:
        for name, call in candidates.items():
            before = clock()
            for _ in range(repeats[name]):
                call(calls)
                calls += 1
            times[name].append((clock() - before) / repeats[name])
    return times


def run_shape(outs: int, columns: int, args, threads: int) -> list[dict]:
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    dense = {dtype: make_dense(outs, columns, dtype) for dtype in (torch.float32, torch.bfloat16)}
    rows = []
    for scales, group_size in (("tensor", None), ("group128+offset", 128)):
        layers = make_ternary(outs, columns, group_size)
        for tokens in args.tokens:
            x = torch.randn(tokens, columns)
            inputs = {dtype: x.to(dtype) for dtype in dense}
            candidates = {}
            for dtype, weights in dense.items():
                candidates["dense", dtype] = lambda i, x=inputs[dtype], w=weights: F.linear(x, w[i % len(w)])
                candidates["ternary", dtype] = lambda i, x=inputs[dtype], w=layers: kernels.ternary_linear(
                    x, *w[i % len(w)], args.act_bits
                )
            repeats = dict.fromkeys(candidates, BURST if tokens < 16 else 1)
            times = measure(candidates, args.seconds, clock, repeats)
            for dtype in dense:
                slow, fast = times["dense", dtype], times["ternary", dtype]
                best = min(slow) / min(fast)
                wanted = target(tokens, threads, dtype)
                row = (outs, columns, threads, scales, args.act_bits, tokens, str(dtype).split(".")[1])
                row += (round(min(slow) * 1e6), round(min(fast) * 1e6), round(best, 2))
                row += (round(statistics.median(slow) / statistics.median(fast), 2), wanted, best >= wanted)
                rows.append(dict(zip(FIELDS, row, strict=True)))
                print(format_row(rows[-1]), flush=True)
    return rows


def call_overhead() -> str:
    """Microseconds of a whole 576x576 layer for one token, of which Python takes most."""
    layers = make_ternary(576, 576, None)[:4]
    x = torch.randn(1, 1, 576)
    torch.set_num_threads(1)
    results = []
    for name, mode in (("no_grad", torch.no_grad), ("inference_mode", torch.inference_mode)):
        with mode():
            times = measure(
                {name: lambda i: kernels.ternary_linear(x, *layers[i % 4], 8)}, 0.3, time.perf_counter, {name: 100}
            )
        results.append(f"{name} {min(times[name]) * 1e6:.1f} us")
    return ", ".join(results)


def format_row(row: dict) -> str:
    return "| " + " | ".join(str(row[field]) for field in FIELDS) + " |"


def machine(args) -> str:
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return (
        f"{name}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, "
        f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}); "
        f"kernel: {kernels.backend_report()['cpu'].split(' (')[0]}; act_bits {args.act_bits}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer batch sizes and shorter rounds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--act-bits", type=int, default=8, choices=(0, 8))
    parser.add_argument("--seconds", type=float, help="per batch size")
    parser.add_argument("--emulate", choices=["avx2"], help="restrict both sides to AVX2")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.tokens = args.tokens or ([1, 4, 16, 128] if args.quick else TOKENS)
    args.seconds = args.seconds or (1.0 if args.quick else 3.0)
    return args


def main() -> None:
    args = parse_arguments()
    if args.emulate == "avx2" and any(os.environ.get(name) != value for name, value in AVX2.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **AVX2})
    torch.manual_seed(0)
    header = machine(args)
    head = format_row({field: field for field in FIELDS}) + "\n" + "|---" * len(FIELDS) + "|"
    print(header, head, sep="\n\n")
    with torch.inference_mode():
        rows = [row for threads in args.threads for shape in SHAPES for row in run_shape(*shape, args, threads)]
    missed = [row for row in rows if not row["ok"]]
    closing = (
        f"Targets: {len(rows) - len(missed)} of {len(rows)} met. Whole 576x576 layer, one token: {call_overhead()}."
    )
    print("\n" + closing)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = "ternary_linear" if args.emulate is None else f"ternary_linear-{args.emulate}"
    with (args.out / f"{stem}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    table = "\n".join([head, *map(format_row, rows)])
    (args.out / f"{stem}.md").write_text(f"# Ternary linear against F.linear\n\n{header}\n\n{closing}\n\n{table}\n")


if __name__ == "__main__":
    main()
