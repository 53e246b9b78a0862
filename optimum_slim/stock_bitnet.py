"""Ways out for models of `BitNet` and its training: Transformers' own `bitnet` format, which needs no other package.

The format keeps the packed bytes under their names, so a packed model needs another config.json only. Norms before
the last projections (SubLN), which packed layers hold themselves, are modules of their own in the architecture
`bitnet`; so a Llama with SubLN becomes a `BitNetForCausalLM`:

    LlamaForCausalLM                            BitNetForCausalLM
      self_attn.o_proj     with weight_norm       self_attn.attn_sub_norm, self_attn.o_proj
      mlp.down_proj        with weight_norm       mlp.ffn_sub_norm, mlp.down_proj
      hidden_act                                  the same; silu in place of BitNet's relu2

llama.cpp knows that architecture as well. No other architecture of Transformers has a place for such norms.
"""

import copy
import dataclasses

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitNetConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from .config import SlimConfig
from .memory import shared_copy
from .methods.bitnet import BitNet, stock_bitnet_config
from .methods.bitnet_training import BitNetTraining
from .packed import PackedLinear
from .step import LinearStep


SUB_NORMS = {"self_attn.o_proj": "self_attn.attn_sub_norm", "mlp.down_proj": "mlp.ffn_sub_norm"}


def stock_bitnet(model):
    """A model that shares the weights of `model` and is saved as a stock `bitnet` checkpoint.

    Raises:
        ValueError: the format cannot hold the model; says why.
    """
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, SlimConfig):
        raise ValueError(
            "save_format='bitnet' holds ternary weights packed by BitNet, and this model has none; run "
            "slim(model, BitNet()) on a model that was trained for them"
        )
    packing = [_as_bitnet_step(step) for step in config.steps if isinstance(step, LinearStep) and step.packed]
    stock_bitnet_config(packing)
    written = with_sub_norms(model) if has_sub_norms(model) else shared_copy(model)
    config = SlimConfig(packing, save_format="bitnet")
    written.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    written.config.quantization_config = written.hf_quantizer.quantization_config
    return written


def has_sub_norms(model: nn.Module) -> bool:
    """Whether packed layers of the model normalize their inputs."""
    return any(isinstance(layer, PackedLinear) and layer.norm_eps is not None for layer in model.modules())


def with_sub_norms(model) -> PreTrainedModel:
    """A `BitNetForCausalLM` around the weights of a Llama whose packed layers normalize their inputs.

    It is there to be written: buffers that no checkpoint holds are on the meta device.

    Raises:
        ValueError: the architecture computes something else; says what.
    """
    old = model.config
    normed = {name for name, layer in model.named_modules() if getattr(layer, "norm_eps", None) is not None}
    wanted = {
        f"model.layers.{i}.{name}": norm for i in range(old.num_hidden_layers) for name, norm in SUB_NORMS.items()
    }
    wrong = []
    if old.model_type != "llama":
        wrong.append(f"the model is a {old.model_type}, and only a Llama has the rest of the architecture")
    if getattr(old, "mlp_bias", False):
        wrong.append("its feed-forward layers have biases (mlp_bias)")
    if (getattr(old, "head_dim", None) or 0) * old.num_attention_heads not in (0, old.hidden_size):
        wrong.append("its heads together are not as wide as its hidden states")
    if odd := sorted(normed ^ wanted.keys()):
        has = "has a norm of its own" if odd[0] in normed else "has none"
        wrong.append(f"o_proj and down_proj of all layers must normalize their inputs, and no others; {odd[0]} {has}")
    if any(model.get_submodule(name).norm_eps != old.rms_norm_eps for name in normed):
        wrong.append(f"its norms do not share one eps, rms_norm_eps={old.rms_norm_eps}")
    if wrong:
        raise ValueError(
            "norms before the last projections (SubLN) can only be exported in the architecture bitnet: "
            f"{'; '.join(wrong)}. Save it in the slim format instead, which holds all of it"
        )
    fields = {field.name for field in dataclasses.fields(BitNetConfig)}
    config = BitNetConfig(**{key: value for key, value in old.to_dict().items() if key in fields and key != "dtype"})
    config.dtype = model.dtype
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            made.set_submodule(name, _without_norm(module))
            if name in wanted:
                norm = f"{name.rpartition('.')[0].rpartition('.')[0]}.{wanted[name]}"
                made.get_submodule(norm).weight = module.weight_norm
        else:
            for key, parameter in module.named_parameters(recurse=False):
                setattr(made.get_submodule(name), key, parameter)
    made.generation_config = copy.deepcopy(model.generation_config)
    for attribute in ("slim_report", "slim_base", "name_or_path"):
        if hasattr(model, attribute):
            setattr(made, attribute, getattr(model, attribute))
    made.config._name_or_path = old._name_or_path
    return made.eval()


def _without_norm(layer: PackedLinear) -> PackedLinear:
    """The layer around the same tensors, but without the norm over its inputs."""
    plain = copy.copy(layer)
    plain._parameters = dict(layer._parameters, weight_norm=None)
    plain.norm_eps = None
    return plain


def _as_bitnet_step(step: LinearStep) -> LinearStep:
    """The step `BitNet` that packs what `step` has trained, or the step itself."""
    if not isinstance(step, BitNetTraining) or step.variant != "b1.58" or step.init != "weights":
        return step
    same = ("activation_bits", "linear_class", "modules_to_not_convert")
    return BitNet(force=True, **{name: getattr(step, name) for name in same})
