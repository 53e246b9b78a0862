"""Minitron on SmolLM2-135M-Instruct: width against depth against both, distillation against its controls.

    python benchmarks/minitron_ppl.py [--parts untrained trained peer speed] [--rows NAME ...] [--steps 72]

WikiText-2 test text, tokenized once, the first 16 non-overlapping windows of 1024 tokens, bf16. Importance is
measured, and models are trained, on windows of 512 tokens of the validation text; every trained row has the same
budget, --steps of 2 windows, full weights. `share` is that of the parameters outside of embeddings and head. Every
finished row goes into results/minitron_ppl.csv at once, so that rows can be made in several runs; the page and the
picture are made from it, and the page keeps its notes.

    untrained   shapes of about 75 %, with and without what is beyond the papers, and with the merge of heads
    trained     the rows below
    peer        `optipfair` (if it is installed): as many neurons, chosen by each of its methods, without training
    speed       decode and prefill of the trained shapes in turns with the dense model, and bytes on disk

    width, width-hidden, depth, mixed   75 % by fewer neurons; also fewer channels; fewer layers; neurons and layers
    width-plain                         the first without compensation of what was cut
    width-ce                            control: pruned in width, trained by next-token loss without the teacher
    random                              control: the narrow shape with random weights, distilled
    half                                50 % in one step, the best of `Minitron(ratio=0.5)`
    half-chain                          50 % in two steps by neurons: 75 %, distilled, 50 %, distilled; two budgets
    width-corrected                     the teacher is first trained on the text itself, for half of the steps
    width-own, width-own-ce             width and width-ce trained on 64 of the model's own samples, so that the text
                                        has nothing to teach that the teacher does not know
    dense-ce                            what the text alone is worth: the dense model trained by next-token loss
"""

import argparse
import csv
import dataclasses
import platform
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_slim import Calibration, Heal, Minitron, perplexity, save, slim
from optimum_slim.evaluate import bytes_on_disk, measure_speed
from optimum_slim.importance import importance


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import smollm2  # noqa: E402


DATA = ROOT.parent / "shared" / "data" / "wikitext2"
PARTS = ("untrained", "trained", "peer", "speed")
FIELDS = ("row", "shape", "parameters", "share", "untrained", "perplexity", "tokens", "seconds", "machine")
NOTES = "## Notes"
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
SHAPES = {
    "width": {"intermediate_size": 1024},
    "width-hidden": {"hidden_size": 504, "intermediate_size": 1344},
    "depth": {"num_hidden_layers": 23},
    "mixed": {"intermediate_size": 1280, "num_hidden_layers": 26},
}
UNTRAINED = {
    **SHAPES,
    "hidden": {"hidden_size": 504},
    "heads": {"num_attention_heads": 6},
    "mixed-28": {"intermediate_size": 1152, "num_hidden_layers": 28},
    "width-heads": {"intermediate_size": 1152, "num_attention_heads": 6},
}
TRAINED = (*SHAPES, "width-plain", "width-ce", "random", "half", "half-chain", "width-corrected", "width-own")
TRAINED = (*TRAINED, "width-own-ce", "dense-ce")
PEER = {"optipfair, MAW with data": ("MAW", True), **{f"optipfair, {m}": (m, False) for m in ("MAW", "VOW", "PON")}}


class Bench:
    """The model, the texts and the result files."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.folder = options.model or smollm2.fetch()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.ids = torch.tensor(self.tokenizer(options.text.read_text(encoding="utf-8"), verbose=False).input_ids)
        dense = self.load()
        text = Calibration(source=str(options.training_text), samples=options.samples, length=512)
        self.tokens = text.tokens(dense, self.tokenizer)
        self.few = self.tokens[: options.scored]
        self.embeddings = dense.get_input_embeddings().weight.numel()
        self.whole = dense.num_parameters() - self.embeddings
        self.path, self.rows = options.out / "minitron_ppl.csv", {}
        if self.path.is_file():
            self.rows = {row["row"]: row for row in csv.DictReader(self.path.open(encoding="utf-8"))}
        if "dense" not in self.rows:
            self.add("dense", dense, untrained=self.perplexity(dense))
        self.scratch = tempfile.TemporaryDirectory()
        self.scores = Path(self.scratch.name) / "importance.safetensors"

    def load(self):
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16).eval()

    def perplexity(self, model) -> float:
        return perplexity(model, self.ids, max_windows=self.options.windows)

    def minitron(self, **fields) -> Minitron:
        """The step, by scores that are measured once."""
        if not self.scores.is_file():
            importance(self.load(), self.few).save(self.scores)
        return Minitron(scores=self.scores, **fields)

    def sizes(self, name: str) -> dict[str, int]:
        """What of the dense model's sizes the row called `name` has changed."""
        old, new = (map(int, self.rows[row]["shape"].split(" x ")) for row in ("dense", name))
        return {size: n for size, o, n in zip(SIZES, old, new, strict=True) if n != o}

    def heal(self, **fields) -> Heal:
        return Heal(
            method="full",
            steps=self.options.steps,
            batch_size=2,
            learning_rate=self.options.learning_rate,
            evaluate_every=max(self.options.steps // 4, 1),
            held_out=0.03,
            **fields,
        )

    def add(self, name: str, model, *, untrained=None, trained=None, tokens=0, seconds=0.0) -> None:
        """Write the row of `model`."""
        inside = model.num_parameters() - self.embeddings * model.config.hidden_size // 576
        figures = {"untrained": untrained, "perplexity": trained}
        row = {key: "" if value is None else f"{value:.2f}" for key, value in figures.items()}
        row |= {"row": name, "shape": " x ".join(str(getattr(model.config, size)) for size in SIZES)}
        row |= {"parameters": model.num_parameters(), "share": f"{inside / self.whole:.3f}", "tokens": tokens}
        cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
        self.rows[name] = row | {"seconds": f"{seconds:.0f}", "machine": cpu}
        self.write()
        print({key: self.rows[name][key] for key in FIELDS[:-1]}, flush=True)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, restval="")
            writer.writeheader()
            writer.writerows(self.rows.values())
        page = self.path.with_suffix(".md")
        old = page.read_text(encoding="utf-8") if page.is_file() else ""
        notes = old[old.index(NOTES) :] if NOTES in old else f"{NOTES}\n"
        lines = [
            "# Minitron on SmolLM2-135M-Instruct: perplexity on the WikiText-2 test text",
            "",
            f"The first {self.options.windows} windows of 1024 tokens, bf16; made by "
            "`python benchmarks/minitron_ppl.py`, where the rows are explained. A shape is "
            f"{' x '.join(SIZES)}; seconds are those of the training.",
            "",
            "![](minitron_ppl.png)",
            "",
            "| " + " | ".join(FIELDS[:-1]) + " |",
            "|" + " --- |" * (len(FIELDS) - 1),
        ]
        lines += ["| " + " | ".join(str(row[name]) for name in FIELDS[:-1]) + " |" for row in self.rows.values()]
        page.write_text("\n".join([*lines, "", notes]), encoding="utf-8")
        self.draw()

    def draw(self) -> None:
        """Perplexity before and after training, a bar for each trained row."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        rows = [row for row in self.rows.values() if row["perplexity"]]
        if not rows:
            return
        figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(rows) + 1.5))
        for height, row in enumerate(reversed(rows)):
            points = [float(row[key]) for key in ("untrained", "perplexity")]
            axes.plot(points, [height, height], color="0.75", zorder=1)
            for value, color in zip(points, ("0.6", "tab:blue"), strict=True):
                axes.scatter(value, height, color=color, zorder=2)
            axes.annotate(row["perplexity"], (points[1], height), (0, 6), textcoords="offset points", ha="center")
        axes.axvline(float(self.rows["dense"]["untrained"]), color="black", linestyle=":", label="dense")
        axes.set_yticks(range(len(rows)), [f"{row['row']} ({float(row['share']):.0%})" for row in reversed(rows)])
        axes.set_xscale("log")
        axes.set_xlabel("perplexity, before training (grey) and after (blue)")
        axes.legend()
        figure.tight_layout()
        figure.savefig(self.path.with_suffix(".png"), dpi=120)
        pyplot.close(figure)


def untrained(bench: Bench) -> None:
    plain = {"norm_correction": False, "compensate": False}
    for name, fields in UNTRAINED.items():
        more = {"": plain}
        if "hidden_size" in fields:
            more[", norm_correction"] = plain | {"norm_correction": True}
        if "num_attention_heads" in fields:
            more[", merge_heads"] = plain | {"merge_heads": True}
        if fields.keys() & {"intermediate_size", "num_attention_heads"}:
            more[", compensate"] = {}
        for words, settings in more.items():
            model = bench.load()
            slim(model, bench.minitron(**fields, **settings), data=bench.few)
            bench.add(f"{name}{words} (untrained)", model, untrained=bench.perplexity(model))


def trained(bench: Bench) -> None:
    for name in bench.options.rows:
        dense, model, more = bench.load(), bench.load(), {}
        heal, budget, tokens = bench.heal(), 1, bench.tokens
        if name.startswith("width-own"):
            tokens = Calibration(samples=64, length=512).tokens(dense, bench.tokenizer)
        if name in SHAPES:
            slim(model, bench.minitron(**SHAPES[name]), data=bench.few)
        elif name == "width-plain":
            slim(model, bench.minitron(**SHAPES["width"], compensate=False), data=bench.few)
        elif name.startswith("width"):
            slim(model, bench.minitron(**SHAPES["width"]), data=bench.few)
            if name.endswith("ce"):
                more = {"loss": "next_token"}
            elif name == "width-corrected":
                more = {"teacher_correction": bench.options.steps // 2}
        elif name == "random":
            slim(model, bench.minitron(**SHAPES["width"], compensate=False), data=bench.few)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16).eval()
        elif name == "half":
            report = slim(model, bench.minitron(ratio=0.5), data=bench.few)
            for row in report.steps[0].tables["shapes"]:
                print(row, flush=True)
        elif name == "half-chain":
            slim(model, bench.minitron(**SHAPES["width"]), data=bench.few)
            heal.apply(model, tokens, teacher=dense)
            slim(model, Minitron(intermediate_size=512), data=bench.few)
            budget = 2
        else:
            more = {"loss": "next_token"}
        before = bench.perplexity(model)
        report = dataclasses.replace(heal, **more).apply(model, tokens, teacher=dense)
        seen = budget * heal.steps * heal.batch_size * tokens.shape[1]
        figures = {"untrained": before, "trained": bench.perplexity(model), "seconds": budget * report.seconds}
        print(report.notes, flush=True)
        bench.add(name, model, tokens=seen, **figures)


def peer(bench: Bench) -> None:
    try:
        from optipfair import prune_model
    except ImportError as error:
        print(f"optipfair is not installed ({error}); pip install --no-deps optipfair")
        return
    for name, (method, data) in PEER.items():
        model = bench.load()
        loader = [{"input_ids": ids} for ids in bench.few.split(8)] if data else None
        share = 100 * (1 - SHAPES["width"]["intermediate_size"] / model.config.intermediate_size)
        settings = {"pruning_percentage": share, "dataloader": loader, "show_progress": False}
        model = prune_model(model, neuron_selection_method=method, **settings)
        bench.add(f"{name} (untrained)", model, untrained=bench.perplexity(model))


def speed(bench: Bench) -> None:
    models = {"dense": bench.load()}
    for name, fields in (SHAPES | {"half": bench.sizes("half")}).items():
        models[name] = bench.load()
        slim(models[name], bench.minitron(**fields, compensate=False), data=bench.few)
    found = measure_speed(list(models.values()), prompt_tokens=128, generate_tokens=64, repeats=7)
    lines = [
        "# Speed and size of SmolLM2-135M-Instruct made narrower and shallower",
        "",
        f"bf16, {torch.get_num_threads()} threads, batch 1, 128 prompt and 64 new tokens, median of 7 runs in turns; "
        "`python benchmarks/minitron_ppl.py --parts speed`. Shapes as in minitron_ppl.md.",
        "",
        "| | decode tokens/s | ratio | prefill tokens/s | ratio | bytes on disk | ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    first = None
    for (name, model), rate in zip(models.items(), found, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            size = bytes_on_disk(save(model, Path(folder) / "model"))
        first = first or (rate, size)
        lines.append(
            f"| {name} | {rate.decode:.1f} | {rate.decode / first[0].decode:.2f} | {rate.prefill:.0f} | "
            f"{rate.prefill / first[0].prefill:.2f} | {size:,} | {size / first[1]:.2f} |"
        )
    (bench.options.out / "minitron_speed.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=DATA / "wiki.test.raw")
    parser.add_argument("--training-text", type=Path, default=DATA / "wiki.valid.tokens")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rows", nargs="+", choices=TRAINED, default=TRAINED)
    parser.add_argument("--steps", type=int, default=72, help="optimizer steps of 2 x 512 tokens")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--samples", type=int, default=256, help="windows to train on")
    parser.add_argument("--scored", type=int, default=64, help="windows by which importance is measured")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--model", type=Path, help="folder of the dense model; by default it is fetched")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    bench = Bench(parser.parse_args())
    for part in bench.options.parts:
        {"untrained": untrained, "trained": trained, "peer": peer, "speed": speed}[part](bench)


if __name__ == "__main__":
    main()
