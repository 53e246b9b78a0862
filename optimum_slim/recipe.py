"""`slim()`: run a recipe on a model. A recipe is a list of steps, and their order is their meaning."""

import hashlib
import importlib.metadata
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers.quantizers.auto import AutoHfQuantizer

from .calibration import Calibration
from .config import SlimConfig, as_calibration
from .fourbit import finish
from .loading import load_tokenizer
from .packed import PackedLinear, model_bytes
from .processes import check_same, from_main, place
from .report import Report
from .sampling import cache_dir, fingerprint
from .step import Step, StepReport, step_from_dict


def slim(model, steps, data=None, tokenizer=None, then=None, *, out=None, **files) -> Report:
    """Slim `model`, in place if it is in memory, or from files to files, and report what was done.

    A model given by its folder or Hub id is streamed if the recipe is one step that packs linear layers: one decoder
    layer at a time is read, packed, written and given back, so that the memory needed is that of the embeddings and
    the head, two decoder layers, and the hidden states of the calibration tokens. A run that was killed goes on where
    it stopped when it is started again in the same way. Other recipes, and checkpoints that cannot be read layer by
    layer, load the whole model, and the report says why.

    Calibration samples drawn from the model itself need the whole model for a while; its weights stay mapped files
    then, whose pages make room when memory is short. Samples are kept, and drawn once.

    In several processes (`accelerate launch`, torchrun) each calls it with the same model in memory and ends with the
    same result: training is data-parallel or sharded as for `fit`, importance and distances are measured on a share
    of the samples in each, and all other steps do the same work everywhere.

    Args:
        model (`PreTrainedModel`, `str` or `Path`): a dense model, on any device, or the local folder or Hub id of one.
        steps: a `Step`, a step's name, the path of a YAML recipe, or a list of steps, names and dicts.
        data (`Calibration` or any source it takes, *optional*): calibration for the steps that need it; by default
            the recipe's own, else samples drawn from the model itself.
        tokenizer (*optional*): for calibration text; by default the one saved beside the model.
        then (`BitsAndBytesConfig`, *optional*): quantizes the model after the last step.
        out (`str` or `Path`): folder to create for the result, with a model given by its folder or id.
        **files: with a model given by its folder or id, `dtype` and `trust_remote_code` as for `from_pretrained`;
            `restart=True` forgets what an unfinished run has done; `overwrite=True` replaces `out`;
            `states_limit` is the number of bytes of hidden states to keep in memory (512 MiB, for asymmetric
            calibration twice that), the others go to a file.

    Returns:
        `Report`: also kept as `model.slim_report`, or in `out`.

    Raises:
        `ValueError`, `TypeError`: a recipe, model or calibration source that cannot work, said before anything is
            changed where it can be known before; an unfinished run for `out` that is another one; several processes
            with different weights, or with a model given by its folder or id.
        `FileExistsError`: `out` exists and is not empty.
        `OSError`: the disk is full (what was finished is kept), or another process is at work on `out`.

    Example:

        report = slim(model, [PT2LLM()], data=Calibration(samples=32))
        model.save_pretrained("slim")

        slim("path/of/a/large/model", [PT2LLM()], data=Calibration(samples=32), out="slim")
    """
    calibration = None if data is None else as_calibration(data)
    if isinstance(model, (str, Path)):
        if out is None:
            raise ValueError(f"slimming the files of {str(model)!r} needs the folder to write to: pass out=...")
        if (count := place()[1]) > 1:
            raise ValueError(
                f"files are slimmed by one process, and this is one of {count}; load the model in each and pass it, "
                "then save(model, ...)"
            )
        from .stream import slim_files  # it runs recipes with this module

        trust = files.get("trust_remote_code", False)
        tokenizer = tokenizer or load_tokenizer(model, trust_remote_code=trust)
        config = SlimConfig(steps, calibration=calibration, tokenizer=tokenizer, then=then)
        return slim_files(model, config, out, **files).slim_report
    if out is not None or files:
        given = sorted(files) if out is None else ["out", *sorted(files)]
        raise TypeError(f"{given} are for a model given by its folder or id; save(model, ...) writes one in memory")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"this model is quantized already ({getattr(model, 'quantization_method', 'unknown method')}); "
            "call model.dequantize() first or load it dense"
        )
    config = SlimConfig(steps, calibration=calibration, tokenizer=tokenizer, then=then)
    before = model_bytes(model)
    recorded, reports = run_steps(model, config.steps, config)
    return record(model, config.with_steps(recorded), reports, before)


def run_steps(model, steps, config: SlimConfig) -> tuple[list[Step], list[StepReport]]:
    """Apply `steps` one after another with the calibration of `config`.

    All data come from the model as it is now, before the first step: what a model writes after it was cut is nothing
    to train on. Returns the steps with every choice written out, and their reports.
    """
    training, reports = model.training, []
    check_same(model)
    model.eval()
    try:
        with torch.no_grad():
            for step in steps[:1]:
                step.resolve(model)  # a recipe that cannot work is refused before data is made for it
            tokens = _tokens(model, steps, config)
            keeps = any(step.keeps_journal for step in steps)
            journal = journal_folder(model, steps, config.calibration) if keeps else None
            folders = [journal / f"{i}-{step.name}" if step.keeps_journal else None for i, step in enumerate(steps)]
            teachers = [
                step.make_teacher(model, *given) if step.needs_teacher else None
                for step, *given in zip(steps, tokens, folders, strict=True)
            ]
            for step, ids, folder in zip(steps, tokens, folders, strict=True):
                reports.append(step.resolve(model).apply(model, ids, teacher=teachers.pop(0), journal=folder))
            if journal is not None and place()[0] == 0:
                shutil.rmtree(journal, ignore_errors=True)
    finally:
        model.train(training)
    return [step_from_dict(report.step) for report in reports], reports


def _tokens(model, steps, config: SlimConfig) -> list[Tensor | None]:
    """The tokens of each step; steps with the same calibration share them."""
    made: list[tuple[Calibration, Tensor]] = []
    tokens: list[Tensor | None] = []
    for step in steps:
        found = None
        if step.needs_data:
            asked = step.calibration(config.calibration)
            found = next((ids for calibration, ids in made if calibration == asked), None)
            if found is None:
                found = from_main(asked.tokens(model, config.tokenizer))
                made.append((asked, found))
        tokens.append(found)
    return tokens


def journal_folder(model, steps, calibration: Calibration) -> Path:
    """The folder in which a run of this recipe on this model keeps its progress: the same run finds it again."""
    run = [fingerprint(model), [step.to_dict() for step in steps], calibration.to_dict()]
    run.append(importlib.metadata.version("transformers"))
    return cache_dir() / "runs" / hashlib.sha256(json.dumps(run).encode()).hexdigest()[:40]


def record(model, config: SlimConfig, reports: list[StepReport], bytes_before: int) -> Report:
    """Write the recipe into the model's config, as a quantization only if something is packed, and make the report.

    A model that has lost layers no longer goes by the name it was loaded under: an adapter trained on it must not be
    put on the unpruned model.
    """
    name = model.name_or_path
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
        model.config.quantization_config = model.hf_quantizer.quantization_config
        model.quantization_method = config.quant_method
        model.is_quantized = True
        model.config._is_quantized = True
    else:
        model.config.slim = config.recorded()["steps"]
        if config.then is not None and getattr(model.config, "quantization_config", None) is None:
            finish(model, config.then)
    sizes = {"before": bytes_before, "after": model_bytes(model)}
    model.slim_report = Report(model=name, steps=reports, sizes=sizes)
    for remark in (note for report in reports for note in report.notes):
        model.slim_report.note(remark)
    if any(step.before_packing for step in config.steps):
        model.slim_base, model.name_or_path, model.config._name_or_path = name, "", ""
    return model.slim_report
