"""Perplexity of SmolLM2-135M-Instruct in one to three bits: BiLLM in its variants, ARB-RC, OneBit, PT2-LLM.

    python benchmarks/binary_ppl.py [--text FILE] [--calibration-text FILE] [--rows NAME ...] [--device cuda]

WikiText-2 test text, tokenized once, the first 16 non-overlapping windows of 1024 tokens, bf16. All linear layers of
the decoder are packed; the tied embeddings and head stay dense. Calibration: 64 windows of 512 tokens of the
validation text. Stored bits per weight are counted from the saved safetensors files: all bytes of the packed layers
(planes of bits, masks, scales, offsets) over their weights. Nominal bits are those the papers print: signs alone.
Every finished row goes into results/binary_ppl.csv at once, so that the rows can be made in several runs;
results/binary_ppl.md is made from it, ordered by bytes, and keeps its notes.

    dense                         the model as it is
    billm/paper, billm/official   BiLLM as in the paper, and as its authors' code computes it
    billm/improved                BiLLM() as it comes
    billm/improved-offset         the same with the offsets that the authors' code stores
    billm/improved-symmetric      the same without asymmetric calibration
    arbllm/paper, arbllm          ARB-RC as in the paper, and ARBLLM() as it comes
    onebit                        OneBit() without any training
    pt2llm                        ternary weights for comparison; pt2llm-float has float activations, as all others do
"""

import argparse
import csv
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_slim import ARBLLM, PT2LLM, BiLLM, Calibration, PackedLinear, perplexity, save, slim
from optimum_slim.stored import read_header


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import smollm2  # noqa: E402


DATA = ROOT.parent / "shared" / "data" / "wikitext2"
FIELDS = ("row", "perplexity", "stored_bits", "nominal_bits", "relative_error", "seconds", "calibration", "windows")
FIELDS = (*FIELDS, "dtype", "machine")
NOTES = "## Notes"


def onebit():
    from optimum_slim import OneBit

    return OneBit()


METHODS = {
    "dense": None,
    "billm/paper": lambda: BiLLM(variant="paper"),
    "billm/official": lambda: BiLLM(variant="official"),
    "billm/improved": BiLLM,
    "billm/improved-offset": lambda: BiLLM(offset=True),
    "billm/improved-symmetric": lambda: BiLLM(asymmetric=0.0),
    "arbllm/paper": lambda: ARBLLM(variant="paper"),
    "arbllm": ARBLLM,
    "onebit": onebit,
    "pt2llm": PT2LLM,
    "pt2llm-float": lambda: PT2LLM(activation_bits=None),
}


def stored_bits(model) -> float:
    """Bits per weight of the packed layers, counted from the files that `save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        out = save(model, Path(folder) / "slim")
        tensors = {name: entry for file in out.glob("*.safetensors") for name, entry in read_header(file).items()}
    stored = weights = 0
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            weights += layer.in_features * layer.out_features
            for key in layer.packed_tensors():
                begin, end = tensors[f"{name}.{key}"]["data_offsets"]
                stored += end - begin
    return 8 * stored / weights


def nominal_bits(name: str, rows: list[dict]) -> str:
    """The papers' figure: signs alone for binary methods, log2(3) for ternary codes."""
    if name.startswith("pt2llm"):
        return "1.585"
    sizes = [row["shape"][0] * row["shape"][1] for row in rows]
    bits = sum(row.get("nominal_bits", 1.0) * size for row, size in zip(rows, sizes, strict=True)) / sum(sizes)
    return f"{bits:.3f}"


def measure(name: str, options: argparse.Namespace, ids: torch.Tensor, folder: Path, tokenizer) -> dict:
    """The result row called `name`."""
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(options.device).eval()
    bits = f"{8 * dtype.itemsize}.000"
    row = {"row": name, "stored_bits": bits, "nominal_bits": bits, "calibration": "none", "seconds": "0"}
    if name != "dense":
        step, data = METHODS[name](), None
        if step.needs_data:
            shape = {"samples": options.samples, "length": options.length}
            text = Calibration(source=str(options.calibration_text), **shape)
            data = Calibration(source=text.tokens(model, tokenizer))  # sampling is not part of the time
            row["calibration"] = f"{options.calibration_text.name}, {options.samples} x {options.length}"
        start = time.perf_counter()
        layers = slim(model, [step], data=data).steps[0].layers
        row["seconds"] = f"{time.perf_counter() - start:.0f}"
        row["relative_error"] = f"{sum(layer['relative_error'] for layer in layers) / len(layers):.4f}"
        row["stored_bits"], row["nominal_bits"] = f"{stored_bits(model):.3f}", nominal_bits(name, layers)
    row["perplexity"] = f"{perplexity(model, ids, max_windows=options.windows):.2f}"
    row |= {"windows": options.windows, "dtype": options.dtype}
    cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    row["machine"] = cpu if options.device == "cpu" else torch.cuda.get_device_name()
    return row


def write(row: dict, out: Path) -> None:
    """Put the row into the CSV file, replacing the one of the same name, and make the table from it."""
    path, page = out / "binary_ppl.csv", out / "binary_ppl.md"
    kept = list(csv.DictReader(path.open(encoding="utf-8"))) if path.is_file() else []
    kept = [old for old in kept if old["row"] != row["row"]] + [row]
    kept.sort(key=lambda r: (-float(r["stored_bits"]), r["row"]))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(kept)
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    notes = old[old.index(NOTES) :] if NOTES in old else f"{NOTES}\n"
    shown = FIELDS[:-1]
    lines = [
        "# SmolLM2-135M-Instruct in one to three bits: perplexity on the WikiText-2 test text",
        "",
        "Windows of 1024 tokens; made by `python benchmarks/binary_ppl.py`, where rows and columns are explained.",
        "",
        f"| {' | '.join(name.replace('_', ' ') for name in shown)} |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | --- |",
    ]
    lines += ["| " + " | ".join(str(r.get(key) or "") for key in shown) + " |" for r in kept]
    page.write_text("\n".join([*lines, "", notes]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=DATA / "wiki.test.raw")
    parser.add_argument("--calibration-text", type=Path, default=DATA / "wiki.valid.tokens")
    parser.add_argument("--rows", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, help="start no further row after this time")
    parser.add_argument("--model", type=Path, help="folder of the dense model; by default it is fetched")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    start = time.perf_counter()
    folder = options.model or smollm2.fetch()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(options.text.read_text(encoding="utf-8"), verbose=False).input_ids)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.rows:
        if options.seconds and time.perf_counter() - start > options.seconds:
            print("out of time before", name)
            break
        row = measure(name, options, ids, folder, tokenizer)
        write(row, options.out)
        print(f"{name:24}{row['perplexity']:>12}  {row['stored_bits']} bits  {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
