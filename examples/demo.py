"""Slim SmolLM2-135M-Instruct to ternary weights, reload it in a fresh process, and show both models side by side.

    make demo        # or: python examples/demo.py [--recipe FILE] [--windows N]

Each model is loaded and measured in a process of its own, so that its peak memory is its own. The perplexity text is
the Python language reference that ships with every CPython (`pydoc_data.topics`): no download, the same for both.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import smollm2
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_slim import SlimConfig, evaluate, save
from optimum_slim.saving import write_report


RECIPE = Path(__file__).with_name("recipes") / "ternary.yaml"
PROMPTS = ("The capital of France is", "Once upon a time, there was a", "Water boils when")
WINDOW = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default=str(RECIPE), help="YAML recipe (examples/recipes/ternary.yaml)")
    parser.add_argument("--windows", type=int, default=8, help=f"windows of {WINDOW} tokens for the perplexity (8)")
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "RESULT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return measure(*map(Path, args.worker), args.windows)

    start = time.perf_counter()
    dense = smollm2.fetch()
    fetched = time.perf_counter()
    before = in_fresh_process(dense, args.windows)
    config = SlimConfig.from_yaml(args.recipe)
    print(f"slimming with {args.recipe}: {', '.join(step.name for step in config.steps)} ...", flush=True)
    slimming = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype="auto")
    slimmed = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(dense)
    out = save(model, smollm2.cache_folder() / "demo" / "slim", tokenizer=tokenizer, overwrite=True)
    after = in_fresh_process(out, args.windows)
    here = torch.tensor(logits(model, tokenizer))
    if not torch.equal(here, torch.tensor(after["logits"])):
        sys.exit("FAILED: the reloaded model gives other logits than the one that was saved")

    for prompt, dense_text, slim_text in zip(PROMPTS, before["texts"], after["texts"], strict=True):
        print(f"\n> {prompt}\n  dense: {dense_text!r}\n  slim:  {slim_text!r}")
    report = model.slim_report
    report.model = smollm2.REPOSITORY
    report.evaluation = {"before": before["evaluation"], "after": after["evaluation"]}
    result = after["evaluation"]
    report.note(f"weights: {smollm2.source(dense)}; logits after reloading in a fresh process: equal bit for bit")
    report.note(
        f"perplexity: {result['tokens']:,} tokens of the Python {sys.version_info.major}.{sys.version_info.minor} "
        f"reference (pydoc_data.topics), windows of {WINDOW}; speed: {result['dtype']}, "
        f"{result['threads']} threads, batch 1, {result['prompt_tokens']} prompt and {result['generate_tokens']} new "
        "tokens"
    )
    report.note(f"peak memory: {result['peak_memory_of']}, after loading")
    write_report(model, out)
    print()
    report.show()
    total = time.perf_counter() - fetched
    print(f"\nsaved to {out}")
    print(f"{total:.0f} s without the download ({fetched - start:.0f} s), {slimmed - slimming:.0f} s of them slimming")


def measure(folder: Path, result: Path, windows: int) -> None:
    """Load the model in `folder`, measure it, and write what was found to `result` as JSON."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    evaluation = evaluate(model, tokenizer, [reference_text()], window=WINDOW, max_windows=windows, path=folder)
    texts = [generate(model, tokenizer, prompt) for prompt in PROMPTS]
    found = {"evaluation": evaluation.to_dict(), "texts": texts, "logits": logits(model, tokenizer)}
    result.write_text(json.dumps(found), encoding="utf-8")


def in_fresh_process(folder: Path, windows: int) -> dict:
    print(f"measuring {folder.name} in a fresh process ...", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "result.json"
        command = [sys.executable, __file__, "--windows", str(windows), "--worker", str(folder), str(result)]
        subprocess.run(command, check=True)
        return json.loads(result.read_text(encoding="utf-8"))


def reference_text() -> str:
    """Prose about Python that lies on every machine with CPython."""
    return "\n\n".join(topics[name] for name in sorted(topics))


@torch.inference_mode()
def logits(model, tokenizer) -> list[float]:
    """The logits after the last token of the first prompt; exact as JSON, since Python prints floats in full."""
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    return model(input_ids=ids).logits[0, -1].double().tolist()


@torch.inference_mode()
def generate(model, tokenizer, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False, repetition_penalty=1.1)
    return tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
