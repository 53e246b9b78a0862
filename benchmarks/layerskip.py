"""LayerSkip: SmolLM2-135M trained for early exits on its own samples, and self-speculative decoding timed.

    python benchmarks/layerskip.py [--parts train quality speed large] [--steps 130] [--work DIR] [--model DIR]

    train     `LayerSkip` in full weights on samples of the model itself; the trained model stays in --work
    quality   WikiText-2 test perplexity (--text; the first --windows windows of 1024 tokens, bf16) through the exits
              behind some layers, before and after
    speed     tokens per second of the trained model, greedy, bf16, batch 1, medians over prompts of runs in turns:
              plain `generate`; `assistant_early_exit` of Transformers and the `early_exit` of `economize` (if it is
              installed) at two exit layers; `SelfSpeculation` at the trained exit with the best draft length for it.
              Before that what `tune_speculation` decides for the model before and after its training
    large     mechanics: a 1.1B model of TinyLlama's shape with random weights whose layers from --exit on are nearly
              identities, so that drafts are accepted: plain, `assistant_early_exit`, `economize`, `SelfSpeculation`

Every part writes its own section of results/layerskip.md; the others stay.
"""

import argparse
import json
import math
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from optimum_slim import Calibration, LayerSkip, SelfSpeculation, lens, save, slim, tune_speculation


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import smollm2  # noqa: E402
from tinyllama import SHAPE  # noqa: E402


PARTS = ("train", "quality", "speed", "large")
TEXT = ROOT.parent / "shared" / "data" / "wikitext2" / "wiki.test.raw"
LAYERS = (4, 6, 8, 10, 12, 15, 20, 25, 30)
PROMPTS = (
    "The water cycle describes how",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n",
    "To cook rice, first",
)
NEW = 64


class Bench:
    """The options, the models and the page."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.folder = options.model or smollm2.fetch()
        self.trained = options.work / "trained"
        self.page = options.out / "layerskip.md"

    def load(self, folder: Path):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def write(self, part: str, lines: list[str]) -> None:
        """Replace the section of one part."""
        old = self.page.read_text(encoding="utf-8") if self.page.is_file() else "# LayerSkip\n"
        head, *sections = re.split(r"^(?=## )", old, flags=re.MULTILINE)
        found = {section.split("\n", 1)[0][3:]: section for section in sections}
        machine = platform.processor() or platform.machine()
        cpu = f"({machine}, {torch.get_num_threads()} threads, torch {torch.__version__})"
        found[part] = "\n".join([f"## {part}", "", *lines, "", cpu, "", ""])
        self.page.parent.mkdir(parents=True, exist_ok=True)
        text = "\n\n".join(piece.rstrip("\n") for piece in [head, *found.values()])
        self.page.write_text(f"{text}\n", encoding="utf-8")
        print("\n".join(lines), flush=True)

    def train(self) -> None:
        model, tokenizer = self.load(self.folder), AutoTokenizer.from_pretrained(self.folder)
        tokens = Calibration(samples=self.options.samples, length=512).tokens(model, tokenizer)
        step = LayerSkip(
            steps=self.options.steps,
            batch_size=2,
            exit_scales="uniform",
            e_scale=0.5,
            curriculum="none",
            exit_layers=(self.options.trained_exit,),
            exit_target="teacher",
            p_max=0.1,
            learning_rate=3e-4,
            warmup_steps=15,
            held_out=0.01,
            evaluate_every=max(1, self.options.steps // 3),
            tune=False,
        )
        report = slim(model, step, data=tokens)
        save(model, self.trained, tokenizer=tokenizer, overwrite=True)
        done = report.steps[0]
        self.write(
            "train",
            [
                f"`{json.dumps({k: v for k, v in done.step.items() if v != getattr(LayerSkip(), k, None)})}`",
                "",
                f"{len(tokens)} samples of 512 tokens of the model itself. {done.notes[0]}; {done.seconds:.0f} s.",
            ],
        )

    def quality(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        text = self.options.text.read_text(encoding="utf-8")
        ids = torch.tensor(tokenizer(text, verbose=False).input_ids)[: self.options.windows * 1024].view(-1, 1024)
        rows = {}
        for name, folder in (("before", self.folder), ("after", self.trained)):
            found = lens(self.load(folder), ids, batch_size=1)
            rows[name] = found
            print(name, found.summary(), flush=True)
        lines = [
            f"WikiText-2 test text, the first {self.options.windows} windows of 1024 tokens; perplexity by exit:",
            "",
            "| behind layer | before | after | agrees with the last layer, before | after |",
            "| ---: | ---: | ---: | ---: | ---: |",
        ]
        for layer in LAYERS:
            both = [rows[name] for name in ("before", "after")]
            cells = [f"{math.exp(found.loss[layer - 1]):.4g}" for found in both]
            cells += [f"{found.agreement[layer - 1]:.1%}" for found in both]
            lines.append(f"| {layer} | {' | '.join(cells)} |")
        lines += ["", *(f"{name}: {found.summary()}." for name, found in rows.items())]
        self.write("quality", lines)

    def speed(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        prompts = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
        lines = []
        for name, folder in (("before", self.folder), ("trained", self.trained)):
            model = self.load(folder)
            model.generation_config.eos_token_id = None
            tuning = tune_speculation(model, [ids[0] for ids in prompts], max_new_tokens=NEW)
            lines += [f"{name}: {tuning.outcome()}.", ""]
        trained = self.options.trained_exit
        best = next(row for row in tuning.candidates if row["exit_layer"] == trained)
        settings = {key: best[key] for key in ("exit_layer", "draft_tokens", "confidence")}
        lines += self.race(model, prompts, NEW, settings, [trained, trained + 4], self.options.repeats)
        self.write("speed", [f"{len(PROMPTS)} prompts, {NEW} new tokens, greedy, bf16.", "", *lines])

    def large(self) -> None:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
        torch.set_default_dtype(torch.float32)
        first = self.options.exit
        with torch.no_grad():
            for layer in model.model.layers[first:]:
                layer.self_attn.o_proj.weight.mul_(1e-3)
                layer.mlp.down_proj.weight.mul_(1e-3)
        model.generation_config.eos_token_id = None
        prompts = [torch.randint(0, SHAPE["vocab_size"], (1, 32)) for _ in range(2)]
        settings = {"exit_layer": first, "draft_tokens": self.options.draft_tokens}
        lines = [
            f"1.1B parameters, 22 layers, those from {first} on nearly identities; 2 prompts of 32 tokens, 48 new "
            "tokens, greedy, bf16.",
            "",
        ]
        self.write("large", lines + self.race(model, prompts, 48, settings, [first], self.options.repeats))

    def race(
        self, model, prompts: list[torch.Tensor], new: int, settings: dict, exits: list[int], repeats: int
    ) -> list[str]:
        """A table of all ways to decode, run in turns on every prompt."""
        speculation = SelfSpeculation(**settings)
        drafted = settings["draft_tokens"]
        ways: dict[str, Callable] = {"plain": lambda ids: _generate(model, ids, new)}
        ours = f"SelfSpeculation, {settings['exit_layer']} layers, {drafted} tokens"
        ways[ours] = lambda ids: _generate(model, ids, new, custom_generate=speculation)
        for layer in exits:
            ways[f"assistant_early_exit={layer}"] = _assisted(model, new, layer)
            ways[f"assistant_early_exit={layer}, {drafted} tokens"] = _assisted(model, new, layer, drafted)
            if (peer := _economize(model, new, layer, drafted)) is not None:
                ways[f"economize, {layer} layers, {drafted} tokens"] = peer
        for way in ways.values():
            way(prompts[0])
        seconds = {name: [] for name in ways}
        texts, accepted = {}, [0, 0]
        for _ in range(repeats):
            for number, ids in enumerate(prompts):
                for name, way in ways.items():
                    start = time.perf_counter()
                    texts[name, number] = way(ids)[0, ids.shape[1] :].tolist()
                    seconds[name].append(time.perf_counter() - start)
                    if name == ours:
                        accepted[0] += speculation.report.accepted
                        accepted[1] += speculation.report.drafted
        lines = ["| decoding | tokens/s | x plain (median) | tokens as plain |", "| --- | ---: | ---: | ---: |"]
        for name, found in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(seconds["plain"], found, strict=True))
            same = statistics.mean(
                _common(texts[name, i], texts["plain", i]) / len(texts["plain", i]) for i in range(len(prompts))
            )
            lines.append(f"| {name} | {new / statistics.median(found):.1f} | {ratio:.2f} | {same:.0%} |")
        return [*lines, "", f"{accepted[0] / max(1, accepted[1]):.1%} of our drafted tokens accepted.", ""]


def _generate(model, ids: torch.Tensor, new: int, **settings) -> torch.Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **settings)


def _assisted(model, new: int, layer: int, tokens: int | None = None) -> Callable:
    """Transformers' own self-speculation; without `tokens` with its own schedule and confidence threshold."""

    def run(ids: torch.Tensor) -> torch.Tensor:
        if tokens is None:
            return _generate(model, ids, new, assistant_early_exit=layer)
        fixed = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
        return _generate(model, ids, new, assistant_early_exit=layer, num_assistant_tokens=tokens, **fixed)

    return run


def _economize(model, new: int, layer: int, tokens: int) -> Callable | None:
    try:
        import economize
        from economize.decoding import DecodeConfig
        from economize.techniques.early_exit import EarlyExitConfig
    except ImportError:
        return None
    peer = economize.apply(model, EarlyExitConfig(exit_layer=layer, head="shared"))
    decoding = DecodeConfig(cycle_length=tokens + 1)
    return lambda ids: peer.generate(ids, max_new_tokens=new, do_sample=False, decoding=decoding)


def _common(found: list[int], expected: list[int]) -> int:
    """How many tokens are the same before the first that differs."""
    return next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct; fetched by default")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--steps", type=int, default=130)
    parser.add_argument("--trained-exit", type=int, default=8, help="layer whose exit is trained beside the last one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--exit", type=int, default=4, help="layers of the 1.1B model that do something")
    parser.add_argument("--draft-tokens", type=int, default=7, help="drafted with the 1.1B model")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "layerskip")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    logging.set_verbosity_error()
    bench = Bench(options)
    for part in options.parts:
        if part == "quality" and not options.text.is_file():
            print(f"no text at {options.text}; quality is left out (pass --text)")
            continue
        getattr(bench, part)()


if __name__ == "__main__":
    main()
