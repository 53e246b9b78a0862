"""Training for few bits on one ordinary machine: block by block, and with and without lambda warm-up.

    python benchmarks/train_bits.py [--part blocks lambda] [--minutes 60] [--model FOLDER] [--text FILE]

`blocks`: SmolLM2-135M-Instruct in ternary (`BitNetTraining` from `PT2LLM`) and in signs (`OneBit`), each decoder layer
trained by itself to put out what the dense one did, on 64 windows of 512 tokens of the WikiText-2 validation text.
All of it, with the untrained starts, takes about --minutes: steps are timed first, and as many are made for each layer
as fit. The curve is the perplexity of the untrained quantized model with its first k layers replaced by trained ones,
on the first 4 windows of 1024 tokens of the test text; dense, untrained and trained models are measured on 16. fp32.

`lambda`: a small Llama is trained from scratch on text that comes with Python (the language reference, byte by byte)
and then to BitNet b1.58 with the same steps, data and rates: abruptly, with each warm-up of lambda, and from random
weights. Held-out text, always measured at lambda = 1, as deployed. Means over --seeds runs.

Finished rows go into results/train_bits.csv at once; results/train_bits.md, which keeps its notes, and the pictures
train_bits.png and train_bits_lambda.png are made from it.
"""

import argparse
import csv
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from optimum_slim import PT2LLM, BitNetTraining, Calibration, OneBit, perplexity, slim
from optimum_slim.blockwise import train_blocks
from optimum_slim.latent_model import LatentModel
from optimum_slim.memory import shared_copy
from optimum_slim.train import fit, next_token_loss
from optimum_slim.walk import decoder_layers


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import smollm2  # noqa: E402


DATA = ROOT.parent / "shared" / "data" / "wikitext2"
FIELDS = ("part", "row", "point", "value", "steps", "seconds", "note", "machine")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#595959")
WARMUPS = {
    "abrupt": {"lambda_steps": 0},
    "linear": {"lambda_schedule": "linear"},
    "exponential": {"lambda_schedule": "exponential", "steepness": 4.0},
    "sigmoid": {"lambda_schedule": "sigmoid", "steepness": 15.0},
}
CURVE_WINDOWS = 4
NOTES = "## Notes"


class Results:
    """Rows of the CSV file by part, name and point on the curve."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.rows = folder / "train_bits.csv", {}
        if self.path.is_file():
            for row in csv.DictReader(self.path.open(encoding="utf-8")):
                self.rows[row["part"], row["row"], row["point"]] = row

    def forget(self, part: str, names: tuple[str, ...]) -> None:
        self.rows = {key: row for key, row in self.rows.items() if key[0] != part or key[1] not in names}

    def add(self, part: str, row: str, point, value: float, steps: int, seconds: float, note: str = "") -> None:
        machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
        cells = (part, row, str(point), f"{value:.4f}", steps, f"{seconds:.0f}", note, machine)
        self.rows[part, row, str(point)] = dict(zip(FIELDS, cells, strict=True))
        with self.path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(self.rows.values())
        print(f"{part:8}{row:12}{point!s:>10}{value:12.3f}  {steps} steps  {seconds:.0f} s  {note}", flush=True)

    def curve(self, part: str, name: str) -> list[tuple[float, float]]:
        """Points of a row whose points are numbers."""
        found = [(point, row["value"]) for (p, n, point), row in self.rows.items() if (p, n) == (part, name)]
        return sorted((float(point), float(value)) for point, value in found if point.replace(".", "").isdigit())


def ternary(model) -> tuple[Callable, Callable]:
    """`prepare` and `finish` for `train_blocks`."""
    step = BitNetTraining(init="pt2llm", block_steps=1, steps=0).resolve(model)
    held = LatentModel(model, step.targets(model), step.latent)
    return lambda block: held.hold_latent(block, step.start), held.hold_packed


def onebit(model) -> tuple[Callable, Callable]:
    step = OneBit(block_steps=1).resolve(model)
    held = LatentModel(model, step.targets(model), step.latent)
    return held.hold_latent, held.hold_packed


METHODS = {"ternary": (PT2LLM(), ternary), "onebit": (OneBit(), onebit)}


def blocks(options: argparse.Namespace, results: Results) -> None:
    begun = time.perf_counter()
    results.forget("blocks", ("dense", *options.methods))
    folder = options.model or smollm2.fetch()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(options.text.read_text(encoding="utf-8"), verbose=False).input_ids)
    load = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # noqa: E731
    source = Calibration(source=str(options.calibration_text), samples=options.samples, length=options.length)
    tokens = source.tokens(load(), tokenizer)
    measure(results, "dense", f"{options.windows} windows", load(), ids, options.windows)
    for number, name in enumerate(options.methods):
        left = options.minutes * 60 - (time.perf_counter() - begun)
        train_method(name, load, tokens, ids, options, results, left / (len(options.methods) - number))


def measure(results, name, point, model, ids, windows, steps=0, note="") -> float:
    start = time.perf_counter()
    found = perplexity(model, ids, max_windows=windows)
    results.add("blocks", name, point, found, steps, time.perf_counter() - start, note)
    return time.perf_counter() - start


def train_method(name, load, tokens, ids, options, results, seconds: float) -> None:
    """Quantize without training, then train as many steps as fit into `seconds`, both included."""
    begun = time.perf_counter()
    start, make = METHODS[name]
    untrained = load()
    report = slim(untrained, start, data=Calibration(source=tokens))
    note = f"untrained, {time.perf_counter() - begun:.0f} s to make"
    full = measure(results, name, f"{options.windows} windows, untrained", untrained, ids, options.windows, 0, note)
    once = measure(results, name, 0, untrained, ids, CURVE_WINDOWS)
    settings = options.settings[name] | {"held_out": 0.05}
    fixed, each = time_steps(make, load(), tokens, settings)
    model = load()
    layers, every = len(decoder_layers(model)[1]), options.every
    left = seconds - (time.perf_counter() - begun) - full - once * (layers // every)
    steps = options.steps or max(1, int((left / layers - fixed) / each))
    print(f"{name}: {each:.2f} s a step and {fixed:.1f} s besides in each layer: {steps} steps", flush=True)
    mixed, total, training = shared_copy(untrained), 0, 0.0
    prepare, finish = make(model)
    settings |= {"steps": steps, "evaluate_every": max(1, steps // 8), "description": name}
    for done in train_blocks(model, tokens, prepare, finish, **settings):
        decoder_layers(mixed)[1][done.index] = decoder_layers(model)[1][done.index]
        total, training = total + done.steps, training + done.seconds
        print(f"{done.name}: relative error {done.before:.4f} -> {done.after:.4f}", flush=True)
        if (done.index + 1) % every == 0:
            measure(results, name, done.index + 1, mixed, ids, CURVE_WINDOWS, total)
    bits = [row["bits_per_weight"] for row in report.steps[0].layers]
    note = f"trained in {training:.0f} s, {sum(bits) / len(bits):.3f} bits a weight, of {seconds / 60:.0f} minutes"
    measure(results, name, f"{options.windows} windows, trained", model, ids, options.windows, total, note)


def time_steps(make, model, tokens, settings) -> tuple[float, float]:
    """Seconds for a layer without its steps, and for a step."""
    times = []
    for steps in (2, 6):
        copy = shared_copy(model)
        prepare, finish = make(copy)
        options = settings | {"steps": steps, "evaluate_every": 1000}
        times.append(next(train_blocks(copy, tokens, prepare, finish, **options)).seconds)
    each = max((times[1] - times[0]) / 4, 1e-3)
    return max(times[0] - 2 * each, 0.0), each


def python_text() -> torch.Tensor:
    """The reference that comes with Python, as bytes."""
    from pydoc_data.topics import topics

    return torch.tensor(list("\n\n".join(topics[key] for key in sorted(topics)).encode()))


def small_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


def warmups(options: argparse.Namespace, results: Results) -> None:
    results.forget("lambda", ("dense", *WARMUPS, "scratch"))
    begun, text = time.perf_counter(), python_text()
    windows = text[: len(text) // 128 * 128].view(-1, 128)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    test, tokens = windows[order[:200]], windows[order[200:]]
    settings = {"learning_rate": 2e-3, "batch_size": 16, "warmup_steps": 50, "held_out": 0.02, "evaluate_every": 25}
    losses: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        dense = small_llama(seed)
        fit(dense, tokens, next_token_loss, steps=options.dense_steps, seed=seed, **settings)
        scratch = small_llama(seed + 1000)
        runs = {name: (dense, fields) for name, fields in WARMUPS.items()}
        runs["scratch"] = (scratch, WARMUPS["abrupt"])
        losses.setdefault("dense", []).append(held_out_loss(dense, test))
        for name, (model, fields) in runs.items():
            model, start = shared_copy(model), time.perf_counter()
            step = BitNetTraining(loss="next_token", steps=options.bit_steps, seed=seed, **settings, **fields)
            report = step.resolve(model).apply(model, tokens)
            losses.setdefault(name, []).append(held_out_loss(model, test))
            for row in report.tables["training"] if seed == 0 else ():
                results.add("lambda", name, row["step"], row["held_out"], row["step"], time.perf_counter() - start)
        for name, found in losses.items():
            mean = sum(found) / len(found)
            note = "nats a byte on held-out text; seeds: " + " ".join(f"{value:.4f}" for value in found)
            steps = options.dense_steps if name == "dense" else options.bit_steps
            results.add("lambda", name, "mean", mean, steps, time.perf_counter() - begun, note)


@torch.no_grad()
def held_out_loss(model, windows: torch.Tensor) -> float:
    return sum(float(next_token_loss(model, part)) * len(part) for part in windows.split(20)) / len(windows)


def draw(results: Results) -> None:
    """The pictures, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no matplotlib, no pictures")
        return
    for part, names, file in (
        ("blocks", METHODS, results.path.with_suffix(".png")),
        ("lambda", (*WARMUPS, "scratch"), results.path.with_name("train_bits_lambda.png")),
    ):
        curves = {name: points for name in names if (points := results.curve(part, name))}
        if not curves:
            continue
        figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
        axes = figure.subplots()
        for (name, points), colour in zip(curves.items(), COLOURS, strict=False):
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, color=colour, label=name)
        if part == "blocks":
            axes.set_yscale("log")
            axes.set_xlabel("decoder layers trained, of a quantized model")
            axes.set_ylabel(f"perplexity on {CURVE_WINDOWS} windows of WikiText-2 test")
            axes.set_title("SmolLM2-135M-Instruct, trained layer by layer", fontsize=11)
        else:
            axes.set_ylim(top=4)
            axes.set_xlabel("steps of BitNet training")
            axes.set_ylabel("loss on held-out text at lambda = 1, nats a byte")
            axes.set_title("A small Llama to BitNet b1.58, seed 0", fontsize=11)
        axes.grid(which="both", alpha=0.3)
        axes.legend()
        figure.savefig(file)


def write_page(results: Results) -> None:
    page = results.path.with_suffix(".md")
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    lines = ["# Training for few bits", "", "Made by `python benchmarks/train_bits.py`, where the rows are explained."]
    for part, value in (("blocks", "perplexity"), ("lambda", "held-out loss")):
        lines += [
            "",
            f"| {part} | point | {value} | steps | seconds | note |",
            "| --- | --- | ---: | ---: | ---: | --- |",
        ]
        for row in results.rows.values():
            if row["part"] == part and (part == "blocks" or row["point"] == "mean"):
                cells = ("row", "point", "value", "steps", "seconds", "note")
                lines.append("| " + " | ".join(str(row[cell]) for cell in cells) + " |")
    notes = old[old.index(NOTES) :] if NOTES in old else f"{NOTES}\n"
    page.write_text("\n".join([*lines, "", notes]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="*", choices=("blocks", "lambda"), default=("blocks", "lambda"))
    parser.add_argument("--minutes", type=float, default=60, help="for all of `blocks`")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=[*METHODS])
    parser.add_argument("--steps", type=int, help="for each decoder layer, in place of what fits the time")
    parser.add_argument("--every", type=int, default=5, help="layers between two points of the curve")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rates", type=float, nargs=2, default=(4e-3, 1e-3), help="of ternary and onebit")
    parser.add_argument("--batch-sizes", type=int, nargs=2, default=(2, 1), help="of ternary and onebit")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dense-steps", type=int, default=600)
    parser.add_argument("--bit-steps", type=int, default=400)
    parser.add_argument("--text", type=Path, default=DATA / "wiki.test.raw")
    parser.add_argument("--calibration-text", type=Path, default=DATA / "wiki.valid.tokens")
    parser.add_argument("--model", type=Path, help="folder of the dense model; by default it is fetched")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    settings = zip(options.rates, options.batch_sizes, strict=True)
    settings = ({"learning_rate": rate, "batch_size": size} for rate, size in settings)
    options.settings = dict(zip(METHODS, settings, strict=True))
    results = Results(options.out)
    for part, run in (("blocks", blocks), ("lambda", warmups)):
        if part in options.part:
            run(options, results)
            draw(results)
            write_page(results)


if __name__ == "__main__":
    main()
