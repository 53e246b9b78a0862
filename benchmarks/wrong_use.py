"""Wrong uses and the one error each of them gets.

    python benchmarks/wrong_use.py [--out benchmarks/results]

Runs every case on tiny models, checks the error's type and that it names what is wrong and what to do, and that no
file was left in the output folder. `tests/test_wrong_use.py` runs the same table.
"""

import argparse
import errno
import json
import shutil
import tempfile
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.utils import logging

from optimum_slim import PT2LLM, BitNet, Calibration, Depth, Heal, SlimConfig, save, slim


@dataclass(frozen=True)
class WrongUse:
    """What a user does wrong, and the error's type and a part of its text."""

    title: str
    act: Callable[[Path], object]
    error: type[Exception]
    says: str


def llama(**changes):
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**(settings | {"vocab_size": 128, "num_key_value_heads": 2} | changes))).eval()


def load(folder: Path, steps, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=SlimConfig(steps, **kwargs))


def dense(folder: Path, edit: Callable = lambda model: None) -> Path:
    model = llama()
    edit(model)
    model.save_pretrained(folder / "dense")
    return folder / "dense"


def slimmed(folder: Path) -> Path:
    load(dense(folder), BitNet(force=True)).save_pretrained(folder / "slim")
    return folder / "slim"


def reload_with_config(folder: Path, **changes):
    path = slimmed(folder) / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))
    AutoModelForCausalLM.from_pretrained(path.parent)


def reload_with_tensors(folder: Path, edit: Callable[[dict], dict]):
    file = slimmed(folder) / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})
    AutoModelForCausalLM.from_pretrained(file.parent)


def reload_truncated(folder: Path):
    load(dense(folder), BitNet(force=True)).save_pretrained(folder / "slim", max_shard_size="20KB")
    file = sorted((folder / "slim").glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])
    AutoModelForCausalLM.from_pretrained(folder / "slim")


def recipe(folder: Path, text: str):
    (folder / "recipe.yaml").write_text(text)
    SlimConfig(folder / "recipe.yaml")


def poison(value: float):
    def edit(model):
        model.model.layers[1].mlp.down_proj.weight.data[3, 5] = value

    return edit


def integer_weights(folder: Path):
    model = llama()
    codes = model.model.layers[0].mlp.up_proj.weight.data.mul(100).to(torch.int8)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(codes, requires_grad=False)
    slim(model, BitNet(force=True))


def mixtral_model():
    settings = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return MixtralForCausalLM(MixtralConfig(**settings, num_key_value_heads=2, vocab_size=64))


def mixtral(folder: Path):
    slim(mixtral_model(), BitNet(force=True))


def shared_cache(folder: Path):
    settings = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    more = {"vocab_size": 64, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    more |= {"num_kv_shared_layers": 2, "activation_sparsity_pattern": None, "num_key_value_heads": 1, "head_dim": 16}
    config = Gemma3nTextConfig(**settings, **more, layer_types=["sliding_attention", "full_attention"] * 2)
    slim(Gemma3nForCausalLM(config), Depth(layers=(1,)))


def no_decoder_layers(folder: Path):
    model = llama()
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    slim(model, PT2LLM(), data=IDS)


def full_disk_before(folder: Path):
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    with mock.patch.object(shutil, "disk_usage", return_value=usage):
        save(llama(), folder / "out")


def full_disk_during(folder: Path):
    """The disk fills after the first bytes of the weights are written."""
    model = llama()

    def write_some(target, **kwargs):
        Path(target, "model.safetensors").write_bytes(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    with mock.patch.object(model, "save_pretrained", write_some):
        save(model, folder / "out")


def not_empty(folder: Path):
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")
    try:
        save(llama(), folder / "out")
    finally:
        assert [file.name for file in (folder / "out").iterdir()] == ["notes.txt"]
        shutil.rmtree(folder / "out")


def packed_twice(folder: Path):
    model = llama()
    slim(model, BitNet(force=True))
    slim(model, BitNet(force=True))


def huge_weights(folder: Path):
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1e9)
    slim(model, PT2LLM(group_size=32), data=torch.arange(64).reshape(2, 32))


def stock_format_with_groups(folder: Path):
    model = load(dense(folder), PT2LLM(group_size=32), calibration=IDS, save_format="bitnet")
    save(model, folder / "out")


KEY = "model.layers.0.mlp.up_proj.weight"
IDS = torch.arange(64).reshape(2, 32)
WRONG_USES = [
    WrongUse("unknown step", lambda f: SlimConfig("bitnte"), ValueError, "Did you mean 'bitnet'?"),
    WrongUse("unknown field", lambda f: SlimConfig({"step": "pt2llm", "groupsize": 64}), ValueError, "'group_size'"),
    WrongUse("field of the wrong kind", lambda f: BitNet(activation_bits=4), ValueError, "must be 8 or None"),
    WrongUse("group size of zero", lambda f: PT2LLM(group_size=0), ValueError, "group_size"),
    WrongUse("no step at all", lambda f: SlimConfig([]), ValueError, "at least one step"),
    WrongUse("a step that is no step", lambda f: SlimConfig([3]), TypeError, "found int: 3"),
    WrongUse("a step's field given to SlimConfig", lambda f: SlimConfig("pt2llm", group_size=64), ValueError,
             "SlimConfig([PT2LLM(group_size=64)])"),
    WrongUse("missing recipe file", lambda f: SlimConfig(f / "none.yaml"), FileNotFoundError, "does not exist"),
    WrongUse("recipe that is not YAML", lambda f: recipe(f, "steps: ["), ValueError, "not valid YAML"),
    WrongUse("recipe without steps", lambda f: recipe(f, "step: bitnet"), ValueError, "list of steps under 'steps'"),
    WrongUse("absmean on an ordinary model", lambda f: load(dense(f), "bitnet"), ValueError, "PT2LLM"),
    WrongUse("NaN in a weight, packing while loading",
             lambda f: load(dense(f, poison(float("nan"))), BitNet(force=True)), ValueError,
             "model.layers.1.mlp.down_proj.weight holds NaN"),
    WrongUse("infinite weight, calibrated step",
             lambda f: load(dense(f, poison(float("inf"))), PT2LLM(group_size=32), calibration=IDS), ValueError,
             "model.layers.1.mlp.down_proj"),
    WrongUse("integer weights", integer_weights, TypeError, "torch.int8"),
    WrongUse("weights too large for the scale's dtype", huge_weights, ValueError, "scale_dtype"),
    WrongUse("fused experts", mixtral, ValueError, "modules_to_not_convert=('experts',)"),
    WrongUse("every layer excluded", lambda f: slim(llama(), BitNet(force=True, modules_to_not_convert=("*",))),
             ValueError, "found no linear layer to pack"),
    WrongUse("a model without decoder layers", no_decoder_layers, ValueError, "No decoder layers found"),
    WrongUse("slimmed twice", packed_twice, ValueError, "quantized already"),
    WrongUse("missing calibration file", lambda f: load(dense(f), "pt2llm", calibration=str(f / "none.txt")),
             FileNotFoundError, "none.txt"),
    WrongUse("calibration ids outside the vocabulary", lambda f: load(dense(f), "pt2llm", calibration=IDS + 100),
             ValueError, "vocabulary has ids 0 to 127"),
    WrongUse("calibration ids that are not integers", lambda f: Calibration(source=torch.zeros(2, 4)), TypeError,
             "must be integers"),
    WrongUse("calibration text without a tokenizer", lambda f: load(dense(f), "pt2llm", calibration=["some text"] * 9),
             ValueError, "needs a tokenizer"),
    WrongUse("newer format version", lambda f: reload_with_config(f, format_version=2), ValueError, "Upgrade"),
    WrongUse("step of a newer release", lambda f: reload_with_config(f, steps=["new"]), ValueError, "unknown step"),
    WrongUse("wrong shape in the checkpoint",
             lambda f: reload_with_tensors(f, lambda t: t | {KEY: t[KEY][1:].clone()}), ValueError, "(23, 64)"),
    WrongUse("wrong dtype in the checkpoint", lambda f: reload_with_tensors(f, lambda t: t | {KEY: t[KEY].float()}),
             ValueError, "F32"),
    WrongUse("scale missing from the checkpoint",
             lambda f: reload_with_tensors(f, lambda t: {k: v for k, v in t.items() if k != KEY + "_scale"}),
             ValueError, KEY + "_scale"),
    WrongUse("truncated file", reload_truncated, ValueError, "truncated or damaged"),
    WrongUse("stock bitnet with group scales", stock_format_with_groups, ValueError, "one scale per matrix"),
    WrongUse("depth without a number", lambda f: SlimConfig("depth"), ValueError, "Depth(drop=4)"),
    WrongUse("more layers dropped than there are", lambda f: load(dense(f), Depth(drop=2, metric="deepest")),
             ValueError, "at least one must stay"),
    WrongUse("a layer that does not exist", lambda f: load(dense(f), Depth(layers=(7,))), ValueError, "layers 0 to 1"),
    WrongUse("a cut that the config cannot express", shared_cache, ValueError, "num_kv_shared_layers"),
    WrongUse("a linear patch for the first layers",
             lambda f: slim(llama(), Depth(layers=(0,), linear_patch=True), IDS), ValueError,
             "layer 0 has none before it"),
    WrongUse("pruning after packing", lambda f: SlimConfig([BitNet(force=True), Depth(drop=1)]), ValueError,
             "put depth before bitnet"),
    WrongUse("healing before anything was cut", lambda f: slim(llama(), Heal(), IDS), ValueError, "first step"),
    WrongUse("healing fused experts", lambda f: slim(mixtral_model(), Heal(loss="next_token"), IDS), ValueError,
             "target_modules"),
    WrongUse("4 bits of packed layers", lambda f: SlimConfig("bitnet", then={"load_in_4bit": True}), ValueError,
             "use one of the two"),
    WrongUse("then= without bits", lambda f: slim(llama(), Depth(layers=(1,)), then={}), ValueError, "load_in_4bit"),
    WrongUse("disk too small, known before saving", full_disk_before, OSError, "1 free"),
    WrongUse("disk full while saving", full_disk_during, OSError, "nothing was written"),
    WrongUse("saving over a folder in use", not_empty, FileExistsError, "not empty"),
]  # fmt: skip


def outcome(case: WrongUse, folder: Path) -> str:
    """Run one case; returns the error's text, or raises `AssertionError` if it is not the one promised."""
    try:
        case.act(folder)
    except Exception as error:
        assert type(error) is case.error or isinstance(error, case.error), f"{case.title}: {type(error)}: {error}"
        assert case.says in str(error), f"{case.title}: {error}"
        left = [path.name for path in folder.iterdir() if path.name not in ("dense", "slim", "recipe.yaml")]
        assert not left, f"{case.title}: left {left} behind"
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{case.title}: no error")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    lines = ["# Wrong uses and their errors", "", "`python benchmarks/wrong_use.py`", ""]
    lines += ["| use | error |", "|---|---|"]
    for case in WRONG_USES:
        with tempfile.TemporaryDirectory() as folder:
            text = " ".join(outcome(case, Path(folder)).replace(folder, "DIR").replace("|", "\\|").split())
        lines.append(f"| {case.title} | {text} |")
    print("\n".join(lines))
    (arguments.out / "wrong_use.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
