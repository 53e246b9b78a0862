"""Every packed linear layer on the CPU against bf16 `F.linear`, in one run: ternary, signs, binary, sparse.

    python benchmarks/binary_linear.py            full run, writes benchmarks/results/binary_linear.{csv,md}
    python benchmarks/binary_linear.py --quick    shorter rounds

Activations are bf16, scales fp16 (those of the sparse layers are bf16). A layer is one of

    ternary, ternary int8       one scale, activations as they are or rounded to int8
    ternary 128, 128 int8       a scale and an offset for each 128 columns
    sign, sign int8             one bit, a scale for each input and each output
    binary                      two bits, groups of 128, one column in 22 salient as BiLLM() leaves SmolLM2-135M
    binary +o, +c, +oc          the same with offsets, with factors of columns, with both
    sparse 50%, sparse 2:4      bf16 values: half of them, two of every four columns

What a turn is, how weights rotate, and which clock and which turns count, is as in sparse_linear.py.
"""

import argparse
import csv
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sparse_linear import BURST, BUSY, format_row, machine, make_sparse, measure, rotated, size
from torch import Tensor

from optimum_slim import _kernels as kernels
from optimum_slim._kernels.sparse_cpu import sparse_path


SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096)]
TOKENS = [1, 16, 128]
GROUP = 128
SALIENT = 1 / 22
FIELDS = ["out", "in", "threads", "tokens", "layer", "bits", "dense_us", "layer_us"]
FIELDS += ["median_ratio", "min_ratio", "verdict"]


def random_bits(*shape: int) -> Tensor:
    return torch.randint(0, 256, (*shape[:-1], shape[-1] // 8), dtype=torch.uint8)


def make_ternary(outs: int, columns: int, grouped: bool) -> tuple:
    """The arguments of `ternary_linear` between x and act_bits."""
    weight = torch.randint(0, 256, (outs // 4, columns), dtype=torch.uint8) & 0xAA
    if not grouped:
        return weight, torch.rand(1).half(), None, None, outs, columns
    scale, offset = (torch.rand(outs, columns // GROUP).half() for _ in range(2))
    return weight, scale, offset, None, outs, GROUP


def make_sign(outs: int, columns: int) -> tuple:
    """The arguments of `sign_linear` between x and activation_bits."""
    return random_bits(outs, columns), torch.rand(columns).half(), torch.rand(outs).half(), None


def make_binary(outs: int, columns: int, offset: bool, factors: bool) -> tuple:
    """The arguments of `binary_linear` after x."""
    groups = columns // GROUP
    return (
        random_bits(outs, 2, columns),
        kernels.pack_signs(torch.rand(columns) < SALIENT),
        torch.rand(outs, groups, 4).half(),
        torch.rand(outs, groups, 3).half() if offset else None,
        torch.rand(2, columns).half() if factors else None,
        None,
        GROUP,
    )


def make_layers(outs: int, columns: int) -> dict[str, tuple]:
    """For each name: the operator, rotating arguments after x, and what follows them."""
    layers = {}
    for name, grouped in (("ternary", False), ("ternary 128", True)):
        copies = rotated(make_ternary(outs, columns, grouped))
        layers[name] = (kernels.ternary_linear, copies, (0,))
        layers[f"{name} int8"] = (kernels.ternary_linear, copies, (8,))
    copies = rotated(make_sign(outs, columns))
    layers["sign"] = (kernels.sign_linear, copies, (0,))
    layers["sign int8"] = (kernels.sign_linear, copies, (8,))
    for ending, offset, factors in (("", 0, 0), (" +o", 1, 0), (" +c", 0, 1), (" +oc", 1, 1)):
        layers[f"binary{ending}"] = (kernels.binary_linear, rotated(make_binary(outs, columns, offset, factors)), ())
    for name, density in (("50%", 0.5), ("2:4", None)):
        layers[f"sparse {name}"] = (kernels.sparse_linear, rotated(make_sparse(outs, columns, density, 0)), ())
    return layers


def call(x: Tensor, operator, copies: list[tuple], last: tuple):
    return lambda i: operator(x, *copies[i % len(copies)], *last)


def run_shape(outs: int, columns: int, thread_counts: list[int], seconds: float) -> list[dict]:
    layers, dense = make_layers(outs, columns), rotated((torch.randn(outs, columns).bfloat16(),))
    bits = {name: 8 * size(copies[0]) / (outs * columns) for name, (_, copies, _) in layers.items()}
    rows = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        clock = time.thread_time if threads == 1 else time.perf_counter
        for tokens in TOKENS:
            x = torch.randn(tokens, columns).bfloat16()
            candidates = {"dense": call(x, F.linear, dense, ())}
            candidates |= {name: call(x, *layer) for name, layer in layers.items()}
            times = measure(candidates, seconds, clock, BURST if tokens < 32 else 1)
            for name in layers:
                median, least = (slow / fast for slow, fast in zip(times["dense"], times[name], strict=True))
                row = (outs, columns, threads, tokens, name, round(bits[name], 2))
                row += (*(round(times[part][threads > 1] * 1e6) for part in ("dense", name)), round(median, 2))
                row += (round(least, 2), "faster" if (median if threads == 1 else least) >= 1 else "slower")
                rows.append(dict(zip(FIELDS, row, strict=True)))
                print(format_row(rows[-1]), flush=True)
    return rows


def summary(rows: list[dict]) -> str:
    """One line per layer and number of threads: the range over the shapes, for each number of tokens."""
    lines = ["| layer | bits | threads | " + " | ".join(f"M = {tokens}" for tokens in TOKENS) + " |", "|---" * 6 + "|"]
    for threads in sorted({row["threads"] for row in rows}):
        for name in dict.fromkeys(row["layer"] for row in rows):
            cells = []
            for tokens in TOKENS:
                wanted = {"layer": name, "threads": threads, "tokens": tokens}
                chosen = [row for row in rows if wanted.items() <= row.items()]
                found = [row["median_ratio" if threads == 1 else "min_ratio"] for row in chosen]
                slower = " slower" if max(found) < 1 else " partly slower" if min(found) < 1 else ""
                cells.append(f"{min(found):.2f}-{max(found):.2f}{slower}")
            lines.append(f"| {name} | {chosen[0]['bits']} | {threads} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter rounds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.manual_seed(0)
    path = kernels.backend_report()["cpu"].split(" (")[0]
    header = machine(f"kernels: {path}, sparse {sparse_path()}")
    head = format_row({field: field for field in FIELDS}) + "\n" + "|---" * len(FIELDS) + "|"
    print(header, head, sep="\n\n")
    seconds = 1.0 if args.quick else 5.0
    with torch.inference_mode():
        rows = [row for shape in SHAPES for row in run_shape(*shape, args.threads, seconds)]
    rows.sort(key=lambda row: row["threads"])
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "binary_linear.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    table = "\n".join([head, *map(format_row, rows)])
    title = "# Packed linear layers against bf16 F.linear on the CPU"
    legend = "Above 1 the packed layer is faster. `bits` is what a weight takes, scales and all."
    if os.getloadavg()[0] > os.cpu_count() + 1:
        legend += BUSY
    (args.out / "binary_linear.md").write_text(f"{title}\n\n{header}\n\n{legend}\n\n{summary(rows)}\n\n{table}\n")
    print("\n" + summary(rows))


if __name__ == "__main__":
    main()
