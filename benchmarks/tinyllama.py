"""A 1.1B model of TinyLlama's shape, random weights: file size, peak memory while loading, tokens per second.

    python benchmarks/tinyllama.py [--work DIR] [--tokens 16] [--repeats 5] [--out benchmarks/results]

Builds a sharded bf16 checkpoint, packs it with BitNet(force=True) tensor by tensor while loading (in a process of its
own, whose memory is sampled), saves it, and decodes greedily with the fp32, bf16 and packed models taking turns in
one process. Random weights make noise for text; bytes and speed do not depend on their values.

Targets: packed linears at most 0.16 of their bf16 bytes; peak memory of the load at most 1.15 x packed bytes +
embeddings and head + one shard; decode at least 4 x fp32 and 3.5 x bf16.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from optimum_slim import BitNet, PackedLinear, SlimConfig, slim
from optimum_slim._kernels import backend_report
from optimum_slim.speed import measure_speed
from optimum_slim.stored import stored_bits


SHAPE = {
    "num_hidden_layers": 22,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
SHARD = 500_000_000
MIB = 2**20


def build(folder: Path) -> None:
    """Save the random bf16 model in shards of at most 500 MB."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.save_pretrained(folder, max_shard_size=SHARD)


class AnonymousPeak:
    """Peak anonymous memory of this process above what it held at the start: the heap, without mapped file pages.

    Pages of a memory-mapped checkpoint can be dropped at any time and are not counted; `rss` counts them too.
    """

    def __enter__(self):
        self.process, self.stop = psutil.Process(), threading.Event()
        self.start = self.anonymous()
        self.start_rss = self.process.memory_info().rss
        self.peak, self.rss = 0, 0
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()
        return self

    def anonymous(self) -> int:
        info = self.process.memory_info()
        return info.rss - info.shared

    def sample(self):
        while not self.stop.wait(0.002):
            self.peak = max(self.peak, self.anonymous() - self.start)
            self.rss = max(self.rss, self.process.memory_info().rss - self.start_rss)

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


def pack(dense: Path, packed: Path) -> None:
    """Load with load-time packing and save; prints the peak as JSON. Runs in a process of its own."""
    # Imports and the kernel's library are not the model's memory.
    small = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 32}
    slim(LlamaForCausalLM(LlamaConfig(**(SHAPE | small))), BitNet(force=True))
    start = time.perf_counter()
    with AnonymousPeak() as peak:
        model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=SlimConfig(BitNet(force=True)))
    seconds = time.perf_counter() - start
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    packed_bytes = sum(m.stored_bits() // 8 for m in layers)
    embeddings = 2 * sum(m.weight.numel() for m in (model.model.embed_tokens, model.lm_head))
    model.save_pretrained(packed, max_shard_size=SHARD)
    print(
        json.dumps(
            {
                "peak": peak.peak,
                "peak_rss": peak.rss,
                "seconds": seconds,
                "packed": packed_bytes,
                "embeddings": embeddings,
                "linears": sum(m.in_features * m.out_features for m in layers),
            }
        )
    )


def linears_cost_nothing(model) -> None:
    """Replace every packed layer by one that returns zeros, to see what the rest of a step costs."""

    class Nothing(torch.nn.Module):
        def __init__(self, out_features):
            super().__init__()
            self.out_features = out_features

        def forward(self, x):
            return x.new_zeros(*x.shape[:-1], self.out_features)

    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            model.set_submodule(name, Nothing(module.out_features))


def speeds(dense: Path, packed: Path, tokens: int, repeats: int) -> list[tuple[str, float, float]]:
    """(label, prefill tokens/s, decode tokens/s), all models taking turns."""
    models = {
        "dense fp32": AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32),
        "dense bf16": AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16),
        "packed, fp32 activations and head": AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32),
        "packed, bf16 activations and head": AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16),
    }
    hollow = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
    linears_cost_nothing(hollow)
    models["as above, packed layers free"] = hollow
    results = measure_speed(list(models.values()), prompt_tokens=128, generate_tokens=tokens, repeats=repeats)
    return [(name, speed.prefill, speed.decode) for name, speed in zip(models, results, strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder for the checkpoints (kept); default: a temporary one")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--build-only", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pack-only", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    if arguments.build_only:
        return build(arguments.build_only)
    if arguments.pack_only:
        return pack(*arguments.pack_only)

    work = arguments.work or Path(tempfile.mkdtemp())
    dense, packed = work / "dense", work / "packed"
    if not (dense / "config.json").exists():
        subprocess.run([sys.executable, __file__, "--build-only", str(dense)], check=True)
    command = [sys.executable, __file__, "--pack-only", str(dense), str(packed)]
    load = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    shard = max(file.stat().st_size for file in dense.glob("*.safetensors"))
    share = stored_bits(packed).packed / 16
    allowed = 1.15 * load["packed"] + load["embeddings"] + shard

    rows = speeds(dense, packed, arguments.tokens, arguments.repeats)
    decode = {name: value for name, _, value in rows}
    fp32 = decode["packed, fp32 activations and head"] / decode["dense fp32"]
    bf16 = decode["packed, bf16 activations and head"] / decode["dense bf16"]
    step = 1000 / decode["packed, bf16 activations and head"]
    rest = 1000 / decode["as above, packed layers free"]

    def verdict(good):
        return "met" if good else "MISSED"

    lines = [
        "# 1.1B model of TinyLlama's shape, packed by BitNet",
        "",
        f"`python benchmarks/tinyllama.py --tokens {arguments.tokens} --repeats {arguments.repeats}`, "
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}. Kernel: {backend_report()['cpu'].split(' (')[0]}",
        "",
        "| figure | value | target | |",
        "|---|---|---|---|",
        f"| packed linears / their bf16 bytes, in the files | {share:.4f} | at most 0.16 | {verdict(share <= 0.16)} |",
        f"| peak anonymous memory of the packing load | {load['peak'] / MIB:.0f} MiB | at most {allowed / MIB:.0f} "
        f"| {verdict(load['peak'] <= allowed)} |",
        f"| the same with mapped file pages (droppable) | {load['peak_rss'] / MIB:.0f} MiB | | |",
        f"| seconds of the packing load | {load['seconds']:.1f} | | |",
        f"| decode, packed fp32 / dense fp32 | {fp32:.2f} x | at least 4 x | {verdict(fp32 >= 4)} |",
        f"| decode, packed bf16 / dense bf16 | {bf16:.2f} x | at least 3.5 x | {verdict(bf16 >= 3.5)} |",
        "",
        "| model | prefill, 128 tokens (tokens/s) | decode, batch 1 (tokens/s) |",
        "|---|---|---|",
        *[f"| {name} | {prefill:.1f} | {value:.2f} |" for name, prefill, value in rows],
        "",
        f"Of {step:.1f} ms per token (packed, bf16), {step - rest:.1f} ms are the packed layers and {rest:.1f} ms the "
        "rest: the bf16 output head, attention, norms and Python.",
        "",
    ]
    text = "\n".join(lines)
    print(text)
    (arguments.out / "tinyllama.md").write_text(text)
    if not arguments.work:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
