"""Resident memory over time while a checkpoint of 1B and of 3B parameters is slimmed from files to files.

    python benchmarks/stream_memory.py [--sizes 1B 3B] [--step pt2llm rounds=0] [--layers N] [--samples 16]
        [--length 256] [--limit-gb 6] [--folder FOLDER] [--keep]

The checkpoints have random weights in the shapes of Llama 3.2 1B and 3B (bf16, tied head, one file per decoder layer),
and a tokenizer of one word per id, so that random words are random tokens. Each is slimmed by the shell command in a
process of its own, whose VmRSS, RssAnon and RssFile are read from /proc ten times a second; VmHWM, the kernel's own
peak, misses nothing between two readings. Writes results/stream_memory.csv, .png and .md; ends with status 1 if a
peak is above the limit. `--layers` cuts the depth for a quick look.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from optimum_slim.packed import model_bytes
from optimum_slim.report import megabytes
from optimum_slim.stored import bytes_on_disk
from optimum_slim.walk import decoder_layers


ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
}
VOCABULARY = {"tiny": 4096, "1B": 128_256, "3B": 128_256}
FIELDS = ("model", "seconds", "resident", "anonymous", "file")
COLUMNS = ("model", "layers", "parameters", "dense fp32", "dense bf16", "peak resident", "anonymous", "mean")
COLUMNS += ("peak / fp32", "result", "seconds")
PERIOD = 0.1
STATUS = {"VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "file", "VmHWM": "peak"}


def make_checkpoint(folder: Path, size: str, layers: int | None) -> dict[str, int]:
    """Write the random checkpoint, layer by layer; returns its parameters and bytes."""
    shape = SHAPES[size] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(**shape, num_key_value_heads=4, vocab_size=VOCABULARY[size], tie_word_embeddings=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    config.save_pretrained(folder)
    prefix, stack = decoder_layers(model)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        layer = int(name.split(".")[2]) + 2 if name.startswith(f"{prefix}.") else 1
        file = f"model-{layer:05d}-of-{len(stack) + 1:05d}.safetensors"
        shards.setdefault(file, {})[name] = parameter.shape
    generator = torch.Generator().manual_seed(0)
    for file, shapes in shards.items():
        tensors = {}
        for name, shape in shapes.items():
            weight = torch.empty(shape, dtype=torch.bfloat16)
            tensors[name] = weight.fill_(1) if "norm" in name else weight.normal_(std=0.02, generator=generator)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, shapes in shards.items() for name in shapes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"layers": len(stack), "parameters": parameters, "bytes": model_bytes(model)}


def make_text(folder: Path, vocabulary: int, tokens: int) -> Path:
    """Give the checkpoint a tokenizer of one word per id, and write random words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    drawn = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
    text = folder.parent / f"{folder.name}.txt"
    text.write_text(" ".join(f"w{index}" for index in drawn.tolist()))
    return text


def watch(command: list[str]) -> tuple[list[dict[str, float]], int]:
    """Run a command and read its memory until it ends; returns the readings and the kernel's peak in bytes.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    start, readings, peak = time.monotonic(), [], 0
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"})
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        found = {
            STATUS[key]: int(value.split()[0]) * 1024
            for key, _, value in (x.partition(":") for x in lines)
            if key in STATUS
        }
        if found:
            peak = max(peak, found.pop("peak"))
            readings.append({"seconds": time.monotonic() - start} | found)
        time.sleep(PERIOD)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return readings, peak


def measure(options: argparse.Namespace, folder: Path, size: str) -> tuple[dict, list[dict]]:
    """Make, slim and measure one size; returns its row and its curve."""
    dense, out = folder / size, folder / f"{size}-slim"
    dense.mkdir(exist_ok=True)
    made = make_checkpoint(dense, size, options.layers)
    text = make_text(dense, VOCABULARY[size], 2 * options.samples * options.length)
    calibration = [str(text), f"samples={options.samples}", f"length={options.length}"]
    command = [sys.executable, "-m", "optimum_slim", "run", str(dense), str(out), "--overwrite"]
    readings, peak = watch([*command, "--step", *options.step, "--calibration", *calibration])
    report = json.loads((out / "slim_report.json").read_text())
    assert not any("whole model" in note for note in report["notes"]), report["notes"]
    row = made | {
        "model": size,
        "peak": peak,
        "anonymous": max(reading["anonymous"] for reading in readings),
        "mean": sum(reading["resident"] for reading in readings) / len(readings),
        "seconds": readings[-1]["seconds"],
        "result": bytes_on_disk(out),
    }
    if not options.keep:
        shutil.rmtree(dense)
        shutil.rmtree(out)
    return row, [{"model": size} | reading for reading in readings]


def draw(path: Path, curves: list[dict], rows: list[dict], limit: float) -> None:
    """The curves of resident memory, with the size of the dense model in fp32 beside each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(rows), figsize=(5.5 * len(rows), 3.6), squeeze=False, sharey=True)
    for axis, row in zip(axes[0], rows, strict=True):
        curve = [reading for reading in curves if reading["model"] == row["model"]]
        seconds = [reading["seconds"] for reading in curve]
        for field, style in {"resident": "-", "anonymous": "--", "file": ":"}.items():
            axis.plot(seconds, [reading[field] / 1e9 for reading in curve], style, label=field, linewidth=1)
        axis.axhline(2 * row["bytes"] / 1e9, color="gray", linewidth=1)
        axis.annotate("dense, fp32", (0, 2 * row["bytes"] / 1e9), va="bottom", color="gray")
        axis.axhline(limit, color="firebrick", linewidth=1)
        axis.annotate("limit", (seconds[-1], limit), va="bottom", ha="right", color="firebrick")
        axis.set(title=f"{row['model']}: {row['parameters'] / 1e9:.2f}B parameters", xlabel="seconds", ylim=(0, None))
    axes[0][0].set_ylabel("GB")
    axes[0][0].legend(loc="center left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write_table(path: Path, rows: list[dict], options: argparse.Namespace) -> None:
    """The results as Markdown."""
    lines = [
        "# Memory of a streamed run",
        "",
        f"`optimum-cli slim run` with `--step {' '.join(options.step)}`, {options.samples} samples of "
        f"{options.length} random tokens, random weights in the shapes of Llama 3.2, "
        f"{torch.get_num_threads()} threads, {machine()}. Peak is the kernel's VmHWM, which counts mapped files and "
        "the libraries; anonymous is what no "
        "file stands behind.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"| --- |{' --: |' * (len(COLUMNS) - 1)}",
    ]
    for row in rows:
        sizes = [2 * row["bytes"], row["bytes"], row["peak"], row["anonymous"], row["mean"]]
        cells = [row["model"], row["layers"], f"{row['parameters']:,}", *map(megabytes, sizes)]
        cells += [f"{row['peak'] / (2 * row['bytes']):.2f}", megabytes(row["result"]), f"{row['seconds']:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "![resident memory over time](stream_memory.png)", ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def machine() -> str:
    """Processor, memory and versions."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return f"{cpu}, {os.cpu_count()} CPUs, Python {platform.python_version()}, torch {torch.__version__}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=[*SHAPES], default=["1B", "3B"])
    parser.add_argument("--step", nargs="+", default=["pt2llm", "rounds=0"], metavar=("NAME", "k=v"))
    parser.add_argument("--layers", type=int, help="decoder layers, for a quick look")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--limit-gb", type=float, default=6.0, help="the most that may be resident")
    parser.add_argument("--folder", type=Path, help="where checkpoints go (a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        if options.folder and options.keep:
            folder = options.folder
        measured = [measure(options, folder, size) for size in options.sizes]
    rows, curves = [row for row, _ in measured], [reading for _, curve in measured for reading in curve]
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "stream_memory.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        last = -1.0
        for reading in curves:  # one line a second
            if reading["seconds"] - last >= 1 or reading["seconds"] < last:
                last = reading["seconds"]
                writer.writerow(reading | {"seconds": f"{last:.1f}"})
    draw(options.out / "stream_memory.png", curves, rows, options.limit_gb)
    write_table(options.out / "stream_memory.md", rows, options)
    print((options.out / "stream_memory.md").read_text())
    above = [row["model"] for row in rows if row["peak"] > options.limit_gb * 1e9]
    if above:
        print(f"more than {options.limit_gb} GB resident: {', '.join(above)}", file=sys.stderr)
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
