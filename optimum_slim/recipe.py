"""`slim()`: run a recipe on a model in memory. A recipe is a list of steps, and their order is their meaning."""

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
from .memory import shared_copy
from .packed import PackedLinear, model_bytes
from .report import Report
from .sampling import cache_dir, fingerprint
from .step import Step, StepReport, step_from_dict


def slim(model, steps, data=None, tokenizer=None, then=None) -> Report:
    """Slim `model` in place and report what was done.

    Args:
        model (`PreTrainedModel`): a dense model, on any device.
        steps: a `Step`, a step's name, the path of a YAML recipe, or a list of steps, names and dicts.
        data (`Calibration` or any source it takes, *optional*): calibration for the steps that need it; by default
            the recipe's own, else samples drawn from the model itself.
        tokenizer (*optional*): for calibration text; by default the one saved beside the model.
        then (`BitsAndBytesConfig`, *optional*): quantizes the model after the last step.

    Returns:
        `Report`: also kept as `model.slim_report`.

    Raises:
        `ValueError`, `TypeError`: a recipe, model or calibration source that cannot work, said before anything is
            changed where it can be known before.

    Example:

        report = slim(model, [PT2LLM()], data=Calibration(samples=32))
        model.save_pretrained("slim")
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"this model is quantized already ({getattr(model, 'quantization_method', 'unknown method')}); "
            "call model.dequantize() first or load it dense"
        )
    calibration = None if data is None else as_calibration(data)
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
    model.eval()
    try:
        with torch.no_grad():
            for step in steps[:1]:
                step.resolve(model)  # a recipe that cannot work is refused before data is made for it
            tokens = _tokens(model, steps, config)
            teacher = shared_copy(model) if any(step.needs_teacher for step in steps) else None
            journal = _journal(model, steps, config) if any(step.trains for step in steps) else None
            for number, step in enumerate(steps):
                folder = journal / f"{number}-{step.name}" if step.trains else None
                reports.append(step.resolve(model).apply(model, tokens[number], teacher=teacher, journal=folder))
            if journal is not None:
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
                found = asked.tokens(model, config.tokenizer)
                made.append((asked, found))
        tokens.append(found)
    return tokens


def _journal(model, steps, config: SlimConfig) -> Path:
    """The folder in which a run of this recipe on this model keeps its progress: the same run finds it again."""
    run = [fingerprint(model), [step.to_dict() for step in steps], config.calibration.to_dict()]
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
