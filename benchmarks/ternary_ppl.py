"""Perplexity of SmolLM2-135M-Instruct in ternary: PT2-LLM beside round-to-nearest and the dense model.

    python benchmarks/ternary_ppl.py [--text FILE] [--calibration-text FILE] [--rows dense rtn-itf ...] [--windows 16]

WikiText-2 test text, tokenized once, the first 16 non-overlapping windows of 1024 tokens, fp32 unless --dtype says
otherwise. All linear layers of the decoder are ternary with groups of 128 columns; the tied embeddings and head stay
dense. Bits per weight are those of the packed layers, scales and offsets included. Every finished row goes into
results/ternary_ppl.csv at once, so that the rows can be made in several runs; results/ternary_ppl.md is made from it
and keeps its notes.

    dense         the model as it is
    rtn-absmean   round to nearest, no data: scale mean |W| of each group, no offset
    rtn-itf       round to nearest, no data: iterative ternary fitting of scale and offset of each group
    paper         PT2LLM(variant="paper") on the model's own samples
    refined       PT2LLM() on the model's own samples; also evaluated with float activations ("refined-float")
    refined-text  PT2LLM() on windows of --calibration-text
"""

import argparse
import csv
import platform
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_slim import PT2LLM, Calibration, TernaryLinear, perplexity, slim
from optimum_slim.methods.pt2llm import fit_ternary


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import smollm2  # noqa: E402


DATA = ROOT.parent / "shared" / "data" / "wikitext2"
GROUP = 128
ROWS = ("dense", "rtn-absmean", "rtn-itf", "paper", "refined", "refined-text")
FIELDS = ("row", "perplexity", "bits_per_weight", "seconds", "calibration", "windows", "dtype", "threads", "machine")
NOTES = "## Notes"


def round_absmean(weight: torch.Tensor) -> torch.Tensor:
    """Each group of columns of a row rounded to the nearest of -g, 0, g with g its mean absolute value."""
    parts = []
    for block in weight.split(GROUP, dim=1):
        scale = block.abs().mean(1, keepdim=True).clamp(min=1e-12)
        parts.append(scale.half().float() * (block / scale).round().clamp(-1, 1))
    return torch.cat(parts, dim=1)


def round_itf(weight: torch.Tensor) -> torch.Tensor:
    """Each group of columns of a row on the grid that fits its weights best, as stored in fp16."""
    parts = []
    for block in weight.split(GROUP, dim=1):
        scale, offset, codes = fit_ternary(block, torch.ones(block.shape[1]), 20)
        parts.append(scale.half().float() * codes + offset.half().float())
    return torch.cat(parts, dim=1)


@torch.no_grad()
def round_model(model: PreTrainedModel, rounding, values_per_group: int) -> float:
    """Round all decoder linears in place; returns the bits per weight they would be stored in."""
    bits = weights = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.copy_(rounding(module.weight.float()))
            rows, columns = module.weight.shape
            bits += 8 * -(-rows // 4) * columns + 16 * values_per_group * rows * -(-columns // GROUP)
            weights += rows * columns
    return bits / weights


def packed_bits(model: PreTrainedModel) -> float:
    layers = [module for module in model.modules() if isinstance(module, TernaryLinear)]
    return sum(layer.stored_bits() for layer in layers) / sum(
        layer.in_features * layer.out_features for layer in layers
    )


def measure(name: str, options: argparse.Namespace, ids: torch.Tensor, folder: Path, tokenizer) -> list[dict]:
    """The result rows of one way of making the model ternary."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).eval()
    shape = {"samples": options.samples, "length": options.length}
    calibration, source = Calibration(**shape), "none"
    bits = 8.0 * model.dtype.itemsize
    if name == "refined-text":
        calibration = Calibration(source=options.calibration_text, **shape)
    if name in ("paper", "refined", "refined-text"):
        source = f"{Path(calibration.source).name}, {options.samples} x {options.length}"
        calibration = Calibration(source=calibration.tokens(model, tokenizer))  # sampling is not part of the time
    start = time.perf_counter()
    match name:
        case "rtn-absmean":
            bits = round_model(model, round_absmean, 1)
        case "rtn-itf":
            bits = round_model(model, round_itf, 2)
        case "paper" | "refined" | "refined-text":
            slim(model, [PT2LLM(variant=name.split("-")[0])], data=calibration)
            bits = packed_bits(model)
    row = {"row": name, "bits_per_weight": f"{bits:.3f}", "seconds": f"{time.perf_counter() - start:.0f}"}
    row |= {
        "calibration": source,
        "windows": options.windows,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
    }
    row["machine"] = platform.processor() or platform.machine()
    rows = [row | {"perplexity": f"{perplexity(model, ids, max_windows=options.windows):.2f}"}]
    if name == "refined":
        for module in model.modules():
            if isinstance(module, TernaryLinear):
                module.activation_bits = None
        found = perplexity(model, ids, max_windows=options.windows)
        rows.append(row | {"row": "refined-float", "perplexity": f"{found:.2f}"})
    return rows


def write(rows: list[dict], out: Path) -> None:
    """Put the rows into the CSV file, replacing those of the same name, and make the table from it."""
    path, page = out / "ternary_ppl.csv", out / "ternary_ppl.md"
    kept = list(csv.DictReader(path.open(encoding="utf-8"))) if path.is_file() else []
    names = {row["row"] for row in rows}
    kept = [row for row in kept if row["row"] not in names] + rows
    order = [*ROWS[:5], "refined-float", "refined-text"]
    kept.sort(key=lambda row: order.index(row["row"]))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(kept)
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    notes = old[old.index(NOTES) :] if NOTES in old else f"{NOTES}\n"
    lines = [
        "# SmolLM2-135M-Instruct in ternary: perplexity on the WikiText-2 test text",
        "",
        "Windows of 1024 tokens; made by `python benchmarks/ternary_ppl.py`, where the rows are explained.",
        "",
        "| row | perplexity | bits per weight (packed layers) | seconds | calibration | windows | dtype |",
        "| --- | ---: | ---: | ---: | --- | ---: | --- |",
    ]
    shown = ("row", "perplexity", "bits_per_weight", "seconds", "calibration", "windows", "dtype")
    lines += ["| " + " | ".join(str(row[name]) for name in shown) + " |" for row in kept]
    page.write_text("\n".join([*lines, "", notes]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=DATA / "wiki.test.raw")
    parser.add_argument("--calibration-text", type=Path, default=DATA / "wiki.valid.tokens")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--model", type=Path, help="folder of the dense model; by default it is fetched")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    folder = options.model or smollm2.fetch()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(options.text.read_text(encoding="utf-8"), verbose=False).input_ids)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.rows:
        rows = measure(name, options, ids, folder, tokenizer)
        write(rows, options.out)
        for row in rows:
            print(
                f"{row['row']:14}{row['perplexity']:>12}  {row['bits_per_weight']} bits  {row['seconds']} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
