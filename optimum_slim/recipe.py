"""`slim()`: run a recipe on a model in memory. A recipe is a list of steps, and their order is their meaning."""

import torch
from transformers.quantizers.auto import AutoHfQuantizer

from .config import SlimConfig, as_calibration
from .packed import PackedLinear, model_bytes
from .report import Report
from .step import Step, StepReport


def slim(model, steps, data=None, tokenizer=None) -> Report:
    """Slim `model` in place and report what was done.

    Args:
        model (`PreTrainedModel`): a dense model, on any device.
        steps: a `Step`, a step's name, the path of a YAML recipe, or a list of steps, names and dicts.
        data (`Calibration` or any source it takes, *optional*): calibration for the steps that need it; by default
            the recipe's own, else samples drawn from the model itself.
        tokenizer (*optional*): for calibration text; by default the one saved beside the model.

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
    config = SlimConfig(steps, calibration=None if data is None else as_calibration(data), tokenizer=tokenizer)
    before = model_bytes(model)
    recorded, reports = run_steps(model, config.steps, config)
    return record(model, config.with_steps(recorded), reports, before)


def run_steps(model, steps, config: SlimConfig) -> tuple[list[Step], list[StepReport]]:
    """Apply `steps` one after another with the calibration of `config`.

    Returns the steps as resolved for this model, and their reports.
    """
    training, recorded, reports = model.training, [], []
    model.eval()
    try:
        with torch.no_grad():
            tokens = None
            if any(step.needs_data for step in steps):
                steps[0].resolve(model)  # a recipe that cannot work is refused before data is made for it
                tokens = config.calibration.tokens(model, config.tokenizer)
            for step in steps:
                recorded.append(step.resolve(model))
                reports.append(recorded[-1].apply(model, tokens))
    finally:
        model.train(training)
    return recorded, reports


def record(model, config: SlimConfig, reports: list[StepReport], bytes_before: int) -> Report:
    """Write the recipe into the model's config, as a quantization only if something is packed, and make the report."""
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
        model.config.quantization_config = model.hf_quantizer.quantization_config
        model.quantization_method = config.quant_method
        model.is_quantized = True
        model.config._is_quantized = True
    else:
        if hasattr(model, "hf_quantizer"):
            model.hf_quantizer.remove_quantization_config(model)
        model.config.slim = config.recorded()["steps"]
    sizes = {"before": bytes_before, "after": model_bytes(model)}
    model.slim_report = Report(model=model.name_or_path, steps=reports, sizes=sizes)
    return model.slim_report
