"""Perplexity of SmolLM2-135M-Instruct with most weights dropped: Magnitude, Wanda and SparseGPT in its variants.

    python benchmarks/sparse_ppl.py [--text FILE] [--calibration-text FILE] [--rows NAME ...] [--device cuda]

WikiText-2 test text, tokenized once, the first 16 non-overlapping windows of 1024 tokens, bf16. All linear layers of
the decoder are pruned; the tied embeddings and head stay dense. Calibration: 64 windows of 512 tokens of the
validation text, or as many of the model's own samples where a row says so. Bits per weight are those of the packed
layers, index and scales included. Every finished row goes into results/sparse_ppl.csv at once, so that the rows can be
made in several runs; results/sparse_ppl.md is made from it and keeps its notes.

    magnitude, wanda          the baselines
    official                  SparseGPT as the authors' code computes it
    paper                     SparseGPT as in the paper
    paper-owl, paper-refit    the same with OWL's allocation, with least squares on its mask
    paper-asymmetric          the same with a quarter of the way of asymmetric calibration
    default                   SparseGPT() as it comes: all of these, and hard thresholding pursuit of the mask
"""

import argparse
import csv
import dataclasses
import platform
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_slim import Calibration, Magnitude, SparseGPT, Wanda, perplexity, slim


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import smollm2  # noqa: E402


DATA = ROOT.parent / "shared" / "data" / "wikitext2"
METHODS = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "official": lambda **fields: SparseGPT(variant="official", **fields),
    "paper": lambda **fields: SparseGPT(variant="paper", **fields),
    "paper-owl": lambda **fields: SparseGPT(variant="paper", allocation="owl", **fields),
    "paper-refit": lambda **fields: SparseGPT(variant="paper", refit=10, **fields),
    "paper-asymmetric": lambda **fields: SparseGPT(variant="paper", asymmetric=0.25, **fields),
    "default": SparseGPT,
    "default-uniform": lambda **fields: SparseGPT(allocation="uniform", **fields),
    "default-nopursuit": lambda **fields: SparseGPT(pursuit=0, **fields),
}
PATTERNS = {
    "50%": {"sparsity": 0.5},
    "2:4": {"sparsity": "2:4"},
    "70%": {"sparsity": 0.7},
    "4:8": {"sparsity": "4:8"},
    "60%": {"sparsity": 0.6},
    "50%+4bit": {"sparsity": 0.5, "bits": 4},
    "50%+4bit-g128": {"sparsity": 0.5, "bits": 4, "group_size": 128},
    "2:4+4bit": {"sparsity": "2:4", "bits": 4},
}
TABLE = ("magnitude", "wanda", "official", "paper", "paper-owl", "paper-refit", "paper-asymmetric", "default")
ROWS = [
    "dense",
    *(f"{p}/{m}" for p in ("50%", "2:4", "70%") for m in TABLE if not (p == "2:4" and m == "paper-owl")),
    *(f"{pattern}/default" for pattern in list(PATTERNS)[3:]),
    "50%/default/own",
    "2:4/default/own",
]
FIELDS = ("row", "perplexity", "bits_per_weight", "relative_error", "seconds", "calibration", "windows", "machine")
NOTES = "## Notes"


def packed_bits(model, step) -> float:
    """Stored bits per weight of the layers that `step` would pack in `model`."""
    step = step.resolve(model)
    layers = [step.for_layer(name).empty(linear) for name, linear in step.targets(model).items()]
    return sum(layer.stored_bits() for layer in layers) / sum(x.in_features * x.out_features for x in layers)


def measure(name: str, options: argparse.Namespace, ids: torch.Tensor, folder: Path, tokenizer) -> dict:
    """The result row called `name`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(options.device).eval()
    row = {"row": name, "bits_per_weight": "16.000", "calibration": "none", "seconds": "0", "relative_error": ""}
    if name != "dense":
        pattern, method, *own = name.split("/")
        source = "model" if own else str(options.calibration_text)
        calibration = Calibration(source=source, samples=options.samples, length=options.length)
        tokens = Calibration(source=calibration.tokens(model, tokenizer))  # sampling is not part of the time
        step = METHODS[method](**PATTERNS[pattern])
        row["bits_per_weight"] = f"{packed_bits(model, step):.3f}"
        start = time.perf_counter()
        report = slim(model, [dataclasses.replace(step, packed=options.packed)], data=tokens)
        row["seconds"] = f"{time.perf_counter() - start:.0f}"
        errors = [layer["relative_error"] for layer in report.steps[0].layers]
        row["relative_error"] = f"{sum(errors) / len(errors):.4f}"
        row["calibration"] = "own samples" if own else Path(source).name
    row["perplexity"] = f"{perplexity(model, ids, max_windows=options.windows):.2f}"
    row["windows"] = options.windows
    cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    row["machine"] = cpu if options.device == "cpu" else torch.cuda.get_device_name()
    return row


def write(row: dict, out: Path) -> None:
    """Put the row into the CSV file, replacing the one of the same name, and make the tables from it."""
    path, page = out / "sparse_ppl.csv", out / "sparse_ppl.md"
    kept = list(csv.DictReader(path.open(encoding="utf-8"))) if path.is_file() else []
    kept = [old for old in kept if old["row"] != row["row"]] + [row]
    kept.sort(key=lambda r: (ROWS.index(r["row"]) if r["row"] in ROWS else len(ROWS), r["row"]))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(kept)
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    notes = old[old.index(NOTES) :] if NOTES in old else f"{NOTES}\n"
    found = {r["row"]: r for r in kept}
    patterns = ("50%", "2:4", "70%")
    lines = [
        "# SmolLM2-135M-Instruct with most weights dropped: perplexity on the WikiText-2 test text",
        "",
        "Windows of 1024 tokens, bf16; made by `python benchmarks/sparse_ppl.py`, where the rows are explained.",
        "",
        f"| method | {' | '.join(patterns)} |",
        "| --- | ---: | ---: | ---: |",
    ]
    for method in TABLE:
        cells = [found.get(f"{pattern}/{method}", {}).get("perplexity", "") for pattern in patterns]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += [
        "",
        "| row | perplexity | bits per weight | relative error of outputs | seconds | calibration | machine |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    shown = ("row", "perplexity", "bits_per_weight", "relative_error", "seconds", "calibration", "machine")
    lines += ["| " + " | ".join(str(r[key]) for key in shown) + " |" for r in kept]
    page.write_text("\n".join([*lines, "", notes]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=DATA / "wiki.test.raw")
    parser.add_argument("--calibration-text", type=Path, default=DATA / "wiki.valid.tokens")
    parser.add_argument("--rows", nargs="*", default=ROWS)
    parser.add_argument("--save-ids", type=Path, help="write the tokens of calibration and test to this file")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--unpacked", dest="packed", action="store_false", help="leave zeros in ordinary layers")
    parser.add_argument("--seconds", type=float, help="start no further row after this time")
    parser.add_argument("--model", type=Path, help="folder of the dense model; by default it is fetched")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    start = time.perf_counter()
    folder = options.model or smollm2.fetch()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(options.text.read_text(encoding="utf-8"), verbose=False).input_ids)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.save_ids:
        model = AutoModelForCausalLM.from_pretrained(folder)
        text = Calibration(source=str(options.calibration_text), samples=options.samples, length=options.length)
        torch.save({"calibration": text.tokens(model, tokenizer), "test": ids}, options.save_ids)
    for name in options.rows:
        if options.seconds and time.perf_counter() - start > options.seconds:
            print("out of time before", name)
            break
        row = measure(name, options, ids, folder, tokenizer)
        write(row, options.out)
        print(f"{name:24}{row['perplexity']:>10}  {row['bits_per_weight']} bits  {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
