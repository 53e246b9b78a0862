"""Adapters (LoRA, through PEFT) on slimmed models, packed ones included.

A packed layer is frozen, but the gradient passes through it to its input, so low-rank adapters train on top:

    y = packed(x) + scaling * B A x
    y = (W + scaling * M ∘ (B A)) x             sparse layers, M being the mask of kept weights

    model = AutoModelForCausalLM.from_pretrained("slim-folder")
    adapted = get_peft_model(prepare_for_training(model), LoraConfig(target_modules="all-linear"))
    ...                                                   # train with any loop or the Transformers Trainer
    adapted.save_pretrained("adapter")                    # the adapter alone, as PEFT users expect
    merged = adapted.merge_and_unload()                   # ternary layers: dense, sparse layers: sparse as before; or
    packed = merge_and_repack(adapted)                    # all packed again, with a loss: see packed.slim_report

What `merge_and_unload` gives depends on the layers. A ternary layer has no values to add to, so it becomes dense, and
with it the whole model an ordinary one. It equals the adapted one up to rounding where packed layers are weight-only;
where they quantize their inputs to int8, it differs by that rounding of the inputs, which a dense layer does not do.
A sparse layer takes the adapter into its kept values and stays sparse and packed: the same index, other values, and
the model saves and reloads as before. Where both kinds are in one model, it stays a slim one with the merged ternary
layers dense. Sparse layers of codes (`bits`) keep their grid, on which most of a small change is lost; a warning says
how much.

PEFT learns of packed layers when this module is imported, or later when PEFT is; it is never imported from here.
"""

import sys
import time
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder

from torch import nn
from transformers import PreTrainedModel

from .packed import PackedLinear, linear_weight, model_bytes
from .report import Report
from .sparse import SparseLinear
from .step import LinearStep, StepReport, layer_row, matches


def prepare_for_training(model: PreTrainedModel, activation_checkpointing: bool = True) -> PreTrainedModel:
    """Freeze `model` and let gradients reach adapters at every depth; call it before `get_peft_model`.

    The counterpart of PEFT's `prepare_model_for_kbit_training`, which does not know packed layers. No tensor is cast:
    scales, norms and embeddings keep their dtypes, and PEFT makes adapters fp32.

    Args:
        model: any slimmed or dense model without adapters.
        activation_checkpointing: recompute activations in the backward pass (non-reentrant) instead of keeping them;
            active while the model is in training mode.

    Returns:
        `model` itself.

    Raises:
        `ValueError`: the model carries an adapter already, which would be frozen too.
    """
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("the model carries an adapter already; call prepare_for_training before adding adapters")
    model.requires_grad_(False)
    model.enable_input_require_grads()
    if activation_checkpointing:
        settings = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(settings)
        else:  # Transformers below 5.23
            model.gradient_checkpointing_enable(settings)
    return model


def merge_and_repack(adapted) -> PreTrainedModel:
    """Merge the active adapters and pack each layer that carried one again, with the step that had packed it.

    Packing anew rounds the merged weights, so part of what the adapter learned is lost: `model.slim_report` states,
    for each packed layer, ||Q - W||² / ||W||² between what is stored now and the exactly merged weight W. Layers
    without an adapter keep their bytes; adapters on dense layers are merged exactly. Sparse layers keep their mask,
    and with `bits` their grid: nothing is pruned again, so they need no data.

    Args:
        adapted (`PeftModel`): LoRA over a model packed by steps that need no data, or sparse.

    Returns:
        The packed model without adapters; it saves and reloads like the one before.

    Raises:
        `ValueError`: no packed layer carries an adapter, a layer's method needs calibration data, or it refuses the
            merged weight. The adapted model is then unchanged.
    """
    from peft import PeftModel

    from .packed_lora import PackedLoraLinear

    if not isinstance(adapted, PeftModel):
        raise TypeError(
            f"merge_and_repack takes a PeftModel, as get_peft_model returns; found {type(adapted).__name__}"
        )
    start, model = time.perf_counter(), adapted.get_base_model()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLoraLinear)}
    if not layers:
        raise ValueError("no packed layer carries an adapter; for a dense model call merge_and_unload()")
    before, steps = model_bytes(model), {name: _packing_step(model, name, layer) for name, layer in layers.items()}
    packed = {name: _repack(name, layer, steps[name]) for name, layer in layers.items()}
    for name, (module, _) in packed.items():
        model.set_submodule(name, module)
    model = adapted.merge_and_unload()
    rows = {step: [row for name, (_, row) in packed.items() if steps[name] == step] for step in steps.values()}
    seconds = time.perf_counter() - start
    reports = [StepReport(step.to_dict(), seconds, rows[step]) for step in rows]
    sizes = {"before": before, "after": model_bytes(model)}
    model.slim_report = Report(model=model.name_or_path, steps=reports, sizes=sizes)
    return model


def _packing_step(model, name: str, layer: "PackedLoraLinear") -> LinearStep:  # noqa: F821
    """The recorded step that packed layer `name`: the first that does not leave it dense."""
    steps = [s for s in model.config.quantization_config.steps if isinstance(s, LinearStep) and s.packed]
    step = next(step for step in steps if not matches(name, step.modules_to_not_convert or ()))
    if step.needs_data and not isinstance(layer.base_layer, SparseLinear):
        raise ValueError(
            f"{name} was packed by {step.name}, which needs calibration data to pack it again; call "
            f"model = adapted.merge_and_unload() and then slim(model, {step.name!r}, data=...)"
        )
    return step


def _repack(name: str, layer: "PackedLoraLinear", step: LinearStep) -> tuple[PackedLinear, dict]:  # noqa: F821
    """The merged layer packed by `step`, or sparse as it was, and its row for the report; `layer` is left alone."""
    was_merged = layer.merged
    if not was_merged:
        layer.merge(safe_merge=True)
    try:
        linear = layer.base_layer
        if isinstance(linear, SparseLinear):
            exact = layer.exact_weight(layer.packed, layer.merged_adapters)
            return linear.train(layer.training), layer_row(name, linear, exact)
        packed = step.for_layer(name).empty(linear)
        packed.load_packed(step.pack(name, linear_weight(linear)))
        if linear.bias is not None:
            packed.bias = nn.Parameter(linear.bias.to(layer.packed.bias.dtype), requires_grad=False)
        return packed.train(layer.training), layer_row(name, packed, linear_weight(linear))
    finally:
        if not was_merged:
            layer.unmerge()


class _AfterPeft:
    """An entry of `sys.meta_path` that imports `packed_lora` as soon as PEFT's LoRA has been imported."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        if name != "peft.tuners.lora":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                import_module(f"{__package__}.packed_lora")

            spec.loader.exec_module = exec_module
        return spec


if "peft.tuners.lora" in sys.modules:
    import_module(f"{__package__}.packed_lora")
else:
    sys.meta_path.insert(0, _AfterPeft)
