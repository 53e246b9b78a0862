"""GGUF files in llama.cpp: the same logits, and how many tokens a second.

    python -m venv llama && llama/bin/pip install cyllama numpy
    python benchmarks/gguf_llama_cpp.py MODEL llama/bin/python      writes benchmarks/results/gguf_llama_cpp.md

MODEL is a folder or Hub id of a small Llama or Qwen model. llama.cpp runs in an environment of its own, in which
cyllama brings it as a wheel (llama-cpp-python comes as source only, and is built for a long time).

Rows of MODEL: the dense model as BF16, F16 and Q8_0; with layers packed by PT2LLM as Q4_1, which holds offsets; and
packed by BitNet(force=True), in the blocks that hold its widths. Ternary weights of such a small model write no sense,
but their logits can be compared as well. Rows of `wide`: a random Llama whose widths are multiples of 256.

Logits are those of all positions of a text, against the same weights as fp32 in Transformers: root mean square of the
difference over that of the logits, mean divergence of the distributions, and how often the first token agrees.
llama.cpp rounds activations to int8 wherever weights have less than 16 bits; `floor` is what that alone does, measured
here: the weights in fp32 with the inputs of their layers rounded to int8, for every 256 columns (TQ types) or 32.

Speed is decoding of one sequence, greedy, by the CPU time of one thread, which holds on a busy machine.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


TEXT = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, "
    "and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, "
    "testing whether that nation, or any nation so conceived and so dedicated, can long endure. We are met on a great "
    "battle-field of that war. We have come to dedicate a portion of that field, as a final resting place for those "
    "who here gave their lives that that nation might live."
)
RESULT = Path(__file__).resolve().parent / "results" / "gguf_llama_cpp.md"


def worker(options) -> None:
    """Runs in llama.cpp's environment: logits of the tokens and the speed of decoding after them."""
    import cyllama.llama.llama_cpp as llama

    ids = [int(token) for token in np.load(options.ids)]
    llama.disable_logging()

    class Model(llama.LlamaModel):
        n_vocab = options.vocabulary

    model = Model(path_model=str(options.file), params=llama.LlamaModelParams())
    settings = llama.LlamaContextParams()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 512, 512, 512
    settings.n_threads = settings.n_threads_batch = options.threads
    context = llama.LlamaContext(model, settings)
    batch = llama.LlamaBatch(n_tokens=512, embd=0, n_seq_max=1)
    for place, token in enumerate(ids):
        batch.add(token, place, [0], True)
    context.decode(batch)
    logits = np.stack([np.array(context.get_logits_ith(place), dtype=np.float32) for place in range(len(ids))])
    np.save(options.out, logits)
    token, rounds = int(logits[-1].argmax()), []
    for turn in range(options.rounds + 1):
        start = time.process_time()
        for step in range(options.tokens):
            batch.reset()
            batch.add(token, len(ids) + turn * options.tokens + step, [0], True)
            context.decode(batch)
        rounds.append(options.tokens / (time.process_time() - start))
    same = model.get_vocab().tokenize(TEXT, False, True) == ids if options.text else None
    print(json.dumps({"speed": max(rounds[1:]), "tokens": same}))


def in_llama_cpp(options, file: Path, ids, folder: Path, vocabulary: int, text: bool) -> tuple[np.ndarray, dict]:
    np.save(folder / "ids.npy", np.array(ids))
    words = [options.python, __file__, "--worker", str(file), str(folder / "ids.npy"), str(folder / "logits.npy")]
    words += ["--vocabulary", str(vocabulary), "--tokens", str(options.tokens), "--rounds", str(options.rounds)]
    done = subprocess.run([*words, *(["--text"] if text else [])], stdout=subprocess.PIPE, text=True, check=True)
    return np.load(folder / "logits.npy"), json.loads(done.stdout.splitlines()[-1])


def compare(found: np.ndarray, expected: np.ndarray) -> dict:
    def log_softmax(logits):
        shifted = logits - logits.max(1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))

    theirs, ours = log_softmax(found.astype(np.float64)), log_softmax(expected.astype(np.float64))
    return {
        "rms": float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean())),
        "kl": float((np.exp(ours) * (ours - theirs)).sum(1).mean()),
        "first": float((found.argmax(1) == expected.argmax(1)).mean()),
    }


def logits_of(model, ids) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def int8_inputs(model, columns: int) -> None:
    """Let all linear layers of a model round their inputs to int8, `columns` of them by their largest magnitude."""
    import torch

    def rounded(module, arguments):
        groups = arguments[0].unflatten(-1, (-1, columns))
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return ((groups / scale).round() * scale).flatten(-2)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounded)


def own_speed(model, ids, tokens: int, rounds: int) -> float:
    """Greedy decoding in Transformers by the CPU time of one thread."""
    import torch

    with torch.no_grad():
        state, speeds = model(torch.tensor([ids]), use_cache=True), []
        for _ in range(rounds + 1):
            start = time.process_time()
            for _ in range(tokens):
                token = state.logits[:, -1:].argmax(-1)
                state = model(token, past_key_values=state.past_key_values, use_cache=True)
            speeds.append(tokens / (time.process_time() - start))
    return max(speeds[1:])


def rows_of(options, name, model, tokenizer, ids, types, folder, note="") -> list[dict]:
    """Export `model` as each of `types` and compare."""
    from optimum_slim import export_gguf

    speed = own_speed(model, ids, options.tokens, options.rounds)
    rows = []
    for kind in types:
        start = time.perf_counter()
        file = export_gguf(model, folder / "model.gguf", tokenizer=tokenizer, file_type=kind, overwrite=True)
        seconds = time.perf_counter() - start
        dense = in_fp32(model, file.path)
        expected = logits_of(dense, ids)
        found, measured = in_llama_cpp(options, file.path, ids, folder, expected.shape[1], tokenizer is not None)
        int8_inputs(dense, 256 if file.main_type.startswith("TQ") else 32)
        floor = None if file.main_type in ("BF16", "F16") else compare(logits_of(dense, ids), expected)["rms"]
        types_used = ", ".join(f"{count} {used}" for used, count in sorted(file.types.items()) if used != "F32")
        row = {"model": f"{name}{note}", "types": types_used or "F32", "mb": file.bytes / 1e6, "seconds": seconds}
        rows.append(row | compare(found, expected) | measured | {"own": speed, "floor": floor})
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def in_fp32(model, file: Path):
    """The weights in the file as an fp32 model, read by Transformers, or here where that lacks the architecture."""
    import torch
    import transformers

    from optimum_slim import load_gguf

    if model.config.model_type == "bitnet":
        return load_gguf(file, activation_bits=None, dtype=torch.float32).dequantize()
    config = transformers.GgufConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=config, dtype=torch.float32
    )


def wide_model(model_class, config_class, **settings):
    import torch

    torch.manual_seed(0)
    config = config_class(
        **settings,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=6,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=8192,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    return model_class(config).to(torch.bfloat16).eval()


def table(rows: list[dict]) -> str:
    lines = [
        "| model | tensors | MB | export, s | logits off (RMS) | int8 floor | KL | same first token | same token ids "
        "| llama.cpp, tokens/s | here, tokens/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        floor = "" if row["floor"] is None else f"{row['floor']:.2e}"
        same = {None: "", True: "yes", False: "NO"}[row["tokens"]]
        lines.append(
            f"| {row['model']} | {row['types']} | {row['mb']:.1f} | {row['seconds']:.1f} | {row['rms']:.2e} "
            f"| {floor} | {row['kl']:.2e} | {row['first']:.1%} | {same} | {row['speed']:.1f} "
            f"| {row['own']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a dense model")
    parser.add_argument("python", help="interpreter of an environment with cyllama and numpy")
    parser.add_argument("--tokens", type=int, default=16, help="tokens decoded in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--pt2llm-layers", type=int, default=6, help="decoder layers that PT2LLM packs, the first ones"
    )
    options = parser.parse_args()

    import torch
    import transformers
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitNetConfig,
        BitNetForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    from optimum_slim import PT2LLM, BitNet, slim

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(TEXT)["input_ids"]
    name, rows = Path(options.model).name, []

    def load():
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows += rows_of(options, name, load(), tokenizer, ids, ("BF16", "F16", "Q8_0"), folder)
        model = load()
        slim(model, BitNet(force=True))
        rows += rows_of(options, name, model, tokenizer, ids, (None,), folder, ", BitNet(force=True)")
        model = load()
        count = min(options.pt2llm_layers, model.config.num_hidden_layers)
        rest = tuple(f"layers.{index}" for index in range(count, model.config.num_hidden_layers))
        slim(model, PT2LLM(variant="paper", modules_to_not_convert=rest), data=torch.tensor(ids)[None])
        note = f", PT2LLM of {count} layers"
        rows += rows_of(options, name, model, tokenizer, ids, ("Q4_1", "F16"), folder, note)
        model, ids = wide_model(LlamaForCausalLM, LlamaConfig), list(range(100, 164))
        rows += rows_of(options, "wide", model, None, ids, ("BF16", "Q8_0"), folder)
        slim(model, BitNet(force=True))
        rows += rows_of(options, "wide", model, None, ids, ("TQ2_0", "TQ1_0"), folder, ", BitNet(force=True)")
        model = wide_model(BitNetForCausalLM, BitNetConfig, hidden_act="silu", tie_word_embeddings=True)
        slim(model, BitNet(force=True))
        rows += rows_of(options, "wide", model, None, ids, ("TQ2_0",), folder, " with SubLN, BitNet(force=True)")
    version = subprocess.run(
        [options.python, "-c", "import importlib.metadata as m; print(m.version('cyllama'))"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.strip()
    head = (
        f"# GGUF files in llama.cpp\n\n`python benchmarks/gguf_llama_cpp.py {name} python`, {platform.machine()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, llama.cpp of cyllama {version}; "
        "one thread, speeds by CPU time (see the script for what the columns mean).\n\n"
    )
    RESULT.write_text(head + table(rows) + "\n", encoding="utf-8")
    print(table(rows))


def worker_main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", action="store_true")
    for word in ("file", "ids", "out"):
        parser.add_argument(word, type=Path)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--text", action="store_true")
    worker(parser.parse_args())


if __name__ == "__main__":
    worker_main() if "--worker" in sys.argv else main()
