"""Depth pruning and healing of SmolLM2-135M-Instruct: perplexity, speed and bytes beside the dense model.

    python benchmarks/depth_ppl.py [--text FILE] [--parts unhealed economize healed speed] [--drops 1 2 3 5 8]

WikiText-2 test text, tokenized once, the first 16 non-overlapping windows of 1024 tokens, bf16. Layers are chosen, and
the pruned model is healed, on the model's own samples (128 of 512 tokens), or on --calibration-text in rows that say
so. Every finished row goes into results/depth_ppl.csv at once, so that the rows can be made in several runs;
results/depth_ppl.md is made from it and keeps its notes.

    unhealed    n layers dropped by each metric, and by angular distance with a linear patch
    economize   the same by the peer package `economize` (ShortGPT and SLEB) on the same tokens, if it is installed
    healed      n layers dropped by angular distance, then LoRA by next-token loss and by distillation, each with the
                same steps (--steps of 2 x 512 tokens)
    speed       decode and prefill of the model with 8 layers less, in turns with the dense one, and bytes of both
"""

import argparse
import csv
import dataclasses
import math
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_slim import Calibration, Depth, Heal, perplexity, save, slim
from optimum_slim.distance import angular_distances, block_influence, distance_rows, last_token_states
from optimum_slim.evaluate import bytes_on_disk, measure_speed
from optimum_slim.methods.depth import greedy_order


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import smollm2  # noqa: E402


DATA = ROOT.parent / "shared" / "data" / "wikitext2"
PARTS = ("unhealed", "economize", "healed", "speed")
GREEDY = (8, 256)  # tokens by which perplexity is measured at each of the greedy metric's removals
PATCH_SAMPLES = 48
FIELDS = ("row", "dropped", "layers", "perplexity", "gap_closed", "seconds", "tokens", "calibration", "machine")
NOTES = "## Notes"


class Bench:
    """The model, the texts and the result files."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.folder = options.model or smollm2.fetch()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        text = options.text.read_text(encoding="utf-8")
        self.ids = torch.tensor(self.tokenizer(text, verbose=False).input_ids)
        self.own = Calibration(samples=options.samples, length=512)
        self.own = Calibration(source=self.own.tokens(self.load()))  # sampling is not part of the time
        self.path = options.out / "depth_ppl.csv"
        self.rows = {}
        if self.path.is_file():
            for row in csv.DictReader(self.path.open(encoding="utf-8")):
                self.rows[row["row"], int(row["dropped"])] = row

    def load(self):
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16).eval()

    def dense(self) -> float:
        if ("dense", 0) not in self.rows:
            self.add("dense", 0, self.load())
        return float(self.rows["dense", 0]["perplexity"])

    def add(self, name: str, dropped: int, model, seconds: float = 0.0, **more) -> None:
        """Measure the perplexity of `model` and write the row."""
        found = perplexity(model, self.ids, max_windows=self.options.windows)
        row = {"row": name, "dropped": dropped, "perplexity": f"{found:.2f}", "seconds": f"{seconds:.0f}"}
        unhealed = self.rows.get(("angular", dropped))
        if name.startswith("healed") and unhealed:
            before, dense = math.log(float(unhealed["perplexity"])), math.log(self.dense())
            row["gap_closed"] = f"{(before - math.log(found)) / (before - dense):.2f}"
        row |= {"calibration": "own samples", "machine": platform.processor() or platform.machine()} | more
        self.rows[name, dropped] = row
        self.write()
        print(
            f"{name:32} n={dropped}  perplexity {found:10.2f}  {row.get('gap_closed', '')}  {seconds:.0f} s",
            flush=True,
        )

    def write(self) -> None:
        self.rows = dict(sorted(self.rows.items(), key=lambda item: (item[0][1], item[0][0])))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, restval="")
            writer.writeheader()
            writer.writerows(self.rows.values())
        page = self.path.with_suffix(".md")
        old = page.read_text(encoding="utf-8") if page.is_file() else ""
        notes = old[old.index(NOTES) :] if NOTES in old else f"{NOTES}\n"
        lines = [
            "# SmolLM2-135M-Instruct with fewer layers: perplexity on the WikiText-2 test text",
            "",
            f"The first {self.options.windows} windows of 1024 tokens, bf16; made by "
            "`python benchmarks/depth_ppl.py`, where the rows are explained.",
            "",
            "| " + " | ".join(FIELDS[:-1]) + " |",
            "|" + " --- |" * (len(FIELDS) - 1),
        ]
        lines += [
            "| " + " | ".join(str(row.get(name, "")) for name in FIELDS[:-1]) + " |" for row in self.rows.values()
        ]
        page.write_text("\n".join([*lines, "", notes]), encoding="utf-8")


def dropped_layers(model) -> str:
    step = model.config.slim[0]
    return " ".join(map(str, step["layers"]))


def unhealed(bench: Bench) -> None:
    """The choices for every n come from one pass over the tokens, as they do inside `Depth` for one n."""
    bench.dense()
    model, few = bench.load(), bench.own.resized(*GREEDY).source
    total, start = len(model.model.layers), time.perf_counter()
    _, best = distance_rows(angular_distances(last_token_states(model, bench.own.source)).tolist())
    influence = block_influence(model, bench.own.source).argsort().tolist()
    seconds, start = time.perf_counter() - start, time.perf_counter()
    order = bench.options.order or greedy_order(model, few, max(bench.options.drops), range(total))[0]
    greedy = time.perf_counter() - start
    for n in bench.options.drops:
        block = range(best[n - 1], best[n - 1] + n)
        rows = {"angular": block, "deepest": range(total - 1 - n, total - 1), "block_influence": influence[:n]}
        for name, layers in (rows | {"perplexity": order[:n]}).items():
            cut = bench.load()
            slim(cut, Depth(layers=tuple(layers)))
            took = {"deepest": 0.0, "perplexity": greedy}.get(name, seconds / 2)
            bench.add(name, n, cut, took, layers=dropped_layers(cut))
        cut, start = bench.load(), time.perf_counter()
        slim(cut, Depth(layers=tuple(block), linear_patch=True), data=bench.own.resized(PATCH_SAMPLES))
        bench.add("angular, linear patch", n, cut, time.perf_counter() - start, layers=dropped_layers(cut))


def economize(bench: Bench) -> None:
    try:
        from economize.arch import adapter_for
        from economize.techniques.prune import depth
    except ImportError as error:
        print(f"economize is not installed ({error}); pip install economize")
        return
    for dropped in bench.options.peer_drops:
        for name, tokens in (("shortgpt", bench.own.source), ("sleb", bench.own.resized(*GREEDY).source)):
            model, start = bench.load(), time.perf_counter()
            adapter = adapter_for(model)
            batches = list(tokens.split(8))
            if name == "shortgpt":
                layers = depth.shortgpt_select(depth.block_influence(adapter, batches), dropped)
            else:
                layers = depth.sleb_select(adapter, batches, dropped, range(2, len(model.model.layers)))
            depth.remove_layers(adapter, layers)
            seconds = time.perf_counter() - start
            bench.add(f"economize, {name}", dropped, model, seconds, layers=" ".join(str(i - 1) for i in layers))


def healed(bench: Bench) -> None:
    options = bench.options
    heal = Heal(
        steps=options.steps,
        batch_size=2,
        learning_rate=options.learning_rate,
        evaluate_every=max(options.steps // 2, 1),
        held_out=0.03,
        dropout=options.dropout,
    )
    data = Calibration(source=str(options.calibration_text), samples=options.samples) if options.on_text else bench.own
    where = options.calibration_text.name if options.on_text else "own samples"
    for dropped in options.heal_drops:
        for loss in options.losses:
            model, start = bench.load(), time.perf_counter()
            layers = tuple(map(int, bench.rows["angular", dropped]["layers"].split()))
            depth = Depth(layers=layers, linear_patch=options.patch)
            step = dataclasses.replace(heal, loss=loss)
            report = slim(model, [depth, step], data=data, tokenizer=bench.tokenizer)
            seconds = time.perf_counter() - start
            name = f"healed, {loss}" + (f", {where}" if options.on_text else "")
            name += ", linear patch first" if options.patch else ""
            print(report.notes[-1])
            tokens = options.steps * heal.batch_size * 512
            bench.add(name, dropped, model, seconds, layers=dropped_layers(model), tokens=tokens, calibration=where)


def speed(bench: Bench) -> None:
    dense, cut = bench.load(), bench.load()
    slim(cut, Depth(drop=8), data=bench.own)
    before, after = measure_speed([dense, cut], prompt_tokens=128, generate_tokens=64, repeats=7)
    with tempfile.TemporaryDirectory() as folder:
        sizes = [bytes_on_disk(save(model, Path(folder) / name)) for name, model in (("a", dense), ("b", cut))]
    layers = len(dense.model.layers), len(cut.model.layers)
    lines = [
        f"# Speed and size of SmolLM2-135M-Instruct with {layers[1]} of {layers[0]} layers",
        "",
        f"bf16, {torch.get_num_threads()} threads, batch 1, 128 prompt and 64 new tokens, median of 7 runs in turns; "
        "`python benchmarks/depth_ppl.py --parts speed`.",
        "",
        "| | dense | 8 layers dropped | ratio |",
        "| --- | ---: | ---: | ---: |",
        f"| decode tokens/s | {before.decode:.1f} | {after.decode:.1f} | {after.decode / before.decode:.2f} |",
        f"| prefill tokens/s | {before.prefill:.0f} | {after.prefill:.0f} | {after.prefill / before.prefill:.2f} |",
        f"| bytes on disk | {sizes[0]:,} | {sizes[1]:,} | {sizes[1] / sizes[0]:.2f} |",
        "",
    ]
    (bench.options.out / "depth_speed.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=DATA / "wiki.test.raw")
    parser.add_argument("--calibration-text", type=Path, default=DATA / "wiki.valid.tokens")
    parser.add_argument("--on-text", action="store_true", help="heal on --calibration-text instead of own samples")
    parser.add_argument("--patch", action="store_true", help="heal behind a linear patch")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--drops", nargs="+", type=int, default=[1, 2, 3, 5, 8])
    parser.add_argument("--order", nargs="+", type=int, help="order of greedy removals found by an earlier run")
    parser.add_argument("--heal-drops", nargs="+", type=int, default=[3, 5, 8])
    parser.add_argument("--peer-drops", nargs="+", type=int, default=[3, 5])
    parser.add_argument("--losses", nargs="+", default=["next_token", "distill"])
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of 2 x 512 tokens")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--model", type=Path, help="folder of the dense model; by default it is fetched")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    bench = Bench(parser.parse_args())
    for part in bench.options.parts:
        {"unhealed": unhealed, "economize": economize, "healed": healed, "speed": speed}[part](bench)


if __name__ == "__main__":
    main()
