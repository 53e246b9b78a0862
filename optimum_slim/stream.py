"""Slimming a checkpoint that is larger than the memory, one decoder layer at a time, in a run that can be killed.

What is in memory at any moment is the skeleton (embeddings, final norm, head), the decoder layer that is being packed
and at most one more, its second moments, and the hidden states of the calibration tokens, which go to a file beyond a
limit:

    checkpoint files --read--> layer i --pack--> layer i, packed --write--> shard i --> back to the meta device
                                                       |
                        hidden states ---------------> pass through it ---------------> those of layer i + 1

Finished shards lie in a run folder beside the target (see checkpoint.py). The same command finds it and goes on: the
layers finished are loaded in their packed form, the hidden states pass through them, and packing starts where it
stopped. Packing is deterministic for a given machine and number of threads, so the weights, the config and the index
are byte for byte those of a run that was not killed; only the seconds in `slim_report.json` and in the model card
differ. Nothing but the order of work distinguishes this from slimming the model in memory and saving it: the tensors
are the same.

One step that packs linear layers can be streamed. Recipes of several steps, and checkpoints whose tensors are not
those of the model's modules (fused experts, conversions while loading, files that are not safetensors), need the whole
model; it is loaded then, and the report says why.
"""

import dataclasses
import errno
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from . import __version__
from .checkpoint import Checkpoint
from .config import SlimConfig
from .layer_packing import LayerPacking
from .memory import release_free_memory
from .packed import model_bytes
from .recipe import record
from .sampling import fingerprint
from .saving import SPARE_BYTES, check_target, disk_full, is_disk_full, save, write_rest
from .skeleton import CannotStream, load_skeleton
from .states import STATES_LIMIT
from .step import LinearStep, StepReport, step_from_dict
from .stored import read_header
from .walk import decoder_layers
from .weights import WeightFiles


logger = logging.getLogger(__name__)

ONE_FILE = 2**62


def slim_files(
    source: str | Path,
    config: SlimConfig,
    out: str | Path,
    *,
    dtype="auto",
    trust_remote_code: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    states_limit: int = STATES_LIMIT,
):
    """Slim the checkpoint `source` into the folder `out`, streamed if the recipe and the checkpoint allow it.

    Args:
        source: Hub id or local folder.
        config: the recipe, with the tokenizer to save.
        dtype: as for `from_pretrained`.
        trust_remote_code: run model code that comes with the checkpoint.
        restart: forget what an unfinished run with this target has done.
        overwrite: replace `out` if it exists, once the result is complete.
        states_limit: bytes of hidden states to keep in memory.

    Returns:
        The model, with `slim_report`; after a streamed run its decoder layers are on the meta device.

    Raises:
        ValueError: the recipe cannot work, or an unfinished run with this target is another one; lists what differs.
        FileExistsError: `out` has something in it.
        OSError: the disk is full, or another process is at work on this target.
    """
    model_config = dense_config(source, trust_remote_code=trust_remote_code)
    try:
        files = _check_streams(source, config, model_config)
        model = load_skeleton(source, files, dtype=dtype, trust_remote_code=trust_remote_code)
    except CannotStream as reason:
        return _slim_whole(source, config, out, reason, dtype, trust_remote_code, overwrite)
    logger.info("Streaming %s one decoder layer at a time.", source)
    out = Path(out).expanduser().resolve()
    run = Checkpoint(out, len(decoder_layers(model)[1]))
    if restart or run.complete() is None:
        check_target(out, overwrite=overwrite)
    before = model_bytes(model)
    step = config.steps[0].resolve(model)

    def sample() -> Tensor:
        """The model's own samples need it whole; its weights stay mapped files, whose pages make room if need be."""
        whole = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=trust_remote_code or None)
        return asked.tokens(whole, config.tokenizer)

    with run.locked(restart=restart), torch.no_grad(), _room(run, before):
        asked = step.calibration(config.calibration)
        sampled = step.needs_data and isinstance(asked.source, str) and asked.source == "model"
        tokens = asked.tokens(model, config.tokenizer) if step.needs_data and not sampled else None
        run.begin(_fingerprint(model, files, config, tokens))
        if (entry := run.complete()) is not None:
            report = StepReport(**entry)
            step_from_dict(report.step).skeleton(model)
            record(model, config.with_steps([step_from_dict(report.step)]), [report], before)
        else:
            check_target(out, overwrite=overwrite)
            if sampled and (tokens := run.tokens()) is None:
                run.keep_tokens(tokens := sample())
                release_free_memory()
            packing = LayerPacking(model, files, run, states_limit)
            packing.prepare(step, tokens)
            _check_room(run, model_bytes(packing.template))
            report = packing.pack()
            record(model, config.with_steps([step_from_dict(report.step)]), [report], before)
            _write_rest(model, run, config.tokenizer)
            run.take_place(dataclasses.asdict(report))
        run.remove()
    return model


def streams(config: SlimConfig) -> bool:
    """Whether the recipe is one that can be streamed: one step that packs linear layers untrained, and no other."""
    first = config.steps[0]
    return config.then is None and len(config.steps) == 1 and isinstance(first, LinearStep) and not first.trains


def dense_config(source: str | Path, *, trust_remote_code: bool = False, **extra) -> PreTrainedConfig:
    """The config of the checkpoint `source`; raises a `ValueError` if it is a slimmed one."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code or None, **extra)
    if _quant_method(config) == "slim":
        raise ValueError(f"{source} is a slimmed model already; start from the dense model it was made from")
    return config


def _quant_method(config: PreTrainedConfig) -> str | None:
    found = getattr(config, "quantization_config", None) or {}
    return (found if isinstance(found, dict) else found.to_dict()).get("quant_method")


def _check_streams(source: str | Path, config: SlimConfig, model_config: PreTrainedConfig) -> WeightFiles:
    """The weight files, if the recipe and the checkpoint can be streamed as far as can be told from the outside."""
    if not streams(config):
        names = [step.name for step in config.steps] + ["then"] * (config.then is not None)
        raise CannotStream(
            f"only one step that packs linear layers without training can be streamed, not {', '.join(names)}"
        )
    if importlib.util.find_spec("fcntl") is None:
        raise CannotStream("this system has no file locks of the POSIX kind")
    if method := _quant_method(model_config):
        raise CannotStream(f"it is quantized already ({method})")
    if getattr(model_config, "transformers_weights", None):
        raise CannotStream("its config names a weight file of its own")
    files = WeightFiles.find(source)
    if files is None:
        raise CannotStream(f"it holds neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
    return files


def _slim_whole(source, config, out, reason, dtype, trust_remote_code, overwrite):
    """Load the whole model, run the recipe on it and save it."""
    out = check_target(out, overwrite=overwrite)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=dtype, trust_remote_code=trust_remote_code or None
    )
    model.slim_report.note(f"this run needed the whole model in memory: {reason}")
    save(model, out, tokenizer=config.tokenizer, overwrite=overwrite)
    return model


def _fingerprint(model, files: WeightFiles, config: SlimConfig, tokens: Tensor | None) -> dict[str, Any]:
    """All that the bytes of the result depend on."""
    (step,) = config.steps
    found = {f"{step.name} {name}": value for name, value in step.to_dict().items() if name != "step"}
    if step.needs_data:
        calibration = step.calibration(config.calibration).to_dict()
        calibration.pop("source")
        found |= {f"calibration {name}": value for name, value in calibration.items()}
        found["calibration tokens"] = (
            "model" if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        )
    return {
        "step": step.name,
        **found,
        "model": _sha256(f"{fingerprint(model)} {files.digest()}".encode()),
        "dtype": str(model.dtype),
        "optimum_slim": __version__,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def _room(run: Checkpoint, needed: int) -> Iterator[None]:
    """Turn a full disk into one error that says what is needed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        kept = "nothing was written"
        if run.finished():
            kept = f"the layers finished are kept in {run.path}, and the same command goes on from there"
        raise disk_full(run.out.parent, needed + SPARE_BYTES, kept) from error


def _check_room(run: Checkpoint, needed: int) -> None:
    """Refuse to start what will not fit on the disk."""
    written = sum(file.stat().st_size for file in run.model.iterdir() if file.is_file())
    if shutil.disk_usage(run.path).free < needed - written + SPARE_BYTES:
        raise OSError(errno.ENOSPC, "No space left for the result")


def _write_rest(model, run: Checkpoint, tokenizer) -> None:
    """Write all but the decoder layers into the run's model folder, as `save` would, and the index of all files."""
    rest = run.path / "rest"
    shutil.rmtree(rest, ignore_errors=True)
    shards = {run.file(index) for index in range(run.layers)}
    for path in run.model.iterdir():
        if path.name not in shards:  # what a run that was killed here has left
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    hidden = decoder_layers(model)[1].register_state_dict_post_hook(_leave_out)
    try:
        model.save_pretrained(rest, max_shard_size=ONE_FILE)
    finally:
        hidden.remove()
    os.replace(rest / SAFE_WEIGHTS_NAME, rest / run.file(None))
    for file in rest.iterdir():
        os.replace(file, run.model / file.name)
    headers = {name: read_header(run.model / name) for name in sorted({run.file(None), *shards})}
    sizes = [end - start for header in headers.values() for start, end in (e["data_offsets"] for e in header.values())]
    index = {
        "metadata": {"total_parameters": model.num_parameters(), "total_size": sum(sizes)},
        "weight_map": {name: file for file, header in headers.items() for name in header},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (run.model / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
    write_rest(model, run.model, tokenizer)


def _leave_out(module, state_dict: dict[str, Tensor], prefix: str, metadata) -> None:
    """A hook that keeps a module's tensors out of a state dict."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        del state_dict[name]
