"""`SlimConfig`: a recipe in the shape that `from_pretrained(quantization_config=...)` and config.json understand."""

import inspect
from pathlib import Path
from typing import Any

import yaml
from transformers.quantizers import register_quantization_config
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

from .calibration import Calibration
from .methods.bitnet import BitNet, stock_bitnet_config
from .plain_yaml import load_yaml
from .step import LinearStep, Step, step_from_dict


FORMAT_VERSION = 1
SAVE_FORMATS = ("slim", "bitnet")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The `steps`, `calibration` and `then` of a YAML recipe file, as plain data."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"recipe file {path} does not exist; pass a YAML file with a list under 'steps'")
    try:
        data = load_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(data, dict) or not data.get("steps"):
        raise ValueError(f"recipe {path} needs a list of steps under 'steps', such as:\nsteps:\n  - step: pt2llm")
    unknown = data.keys() - {"steps", "calibration", "then"}
    if unknown:
        raise ValueError(
            f"recipe {path} has unknown keys {sorted(unknown)}; it may hold 'steps', 'calibration' and 'then'"
        )
    return data


def as_steps(steps: Any) -> tuple[Step, ...]:
    """Steps from a step, a step's name, a recipe path, a dict, or a list of these."""
    if isinstance(steps, (Step, dict)):
        steps = [steps]
    elif isinstance(steps, (str, Path)):
        is_file = Path(steps).suffix in (".yaml", ".yml")
        steps = read_recipe(steps)["steps"] if is_file else [steps]
    if not isinstance(steps, (list, tuple)) or not steps:
        raise ValueError("a recipe needs at least one step; pass for example SlimConfig('pt2llm')")
    for step in steps:
        if not isinstance(step, (Step, str, dict)):
            raise TypeError(f"a step is a Step, its name or a dict; found {type(step).__name__}: {step!r}")
    return tuple(step if isinstance(step, Step) else step_from_dict(step) for step in steps)


def as_calibration(calibration: Any) -> Calibration:
    """A `Calibration` from one, from its dict, from any source it takes, or the default one for `None`."""
    if isinstance(calibration, Calibration):
        return calibration
    if isinstance(calibration, dict):
        return Calibration.from_dict(calibration)
    return Calibration() if calibration is None else Calibration(source=calibration)


def as_then(then: Any) -> BitsAndBytesConfig | None:
    """What quantizes the model after the recipe: a `BitsAndBytesConfig`, its arguments as a dict, or nothing."""
    if then is None or isinstance(then, BitsAndBytesConfig):
        return then
    if not isinstance(then, dict):
        raise TypeError(f"then= takes a BitsAndBytesConfig or its arguments as a dict, found {type(then).__name__}")
    known = inspect.signature(BitsAndBytesConfig).parameters.keys() - {"kwargs"}
    if unknown := then.keys() - known - {"quant_method", "_load_in_4bit", "_load_in_8bit"}:
        raise ValueError(
            f"then= has unknown keys {sorted(unknown)}; BitsAndBytesConfig takes {', '.join(sorted(known))}"
        )
    config = BitsAndBytesConfig(**{key: value for key, value in then.items() if key in known})
    if config.quantization_method() is None:
        raise ValueError(f"then={then} quantizes nothing; add load_in_4bit=True or load_in_8bit=True")
    return config


def check_order(steps: tuple[Step, ...], then: BitsAndBytesConfig | None) -> None:
    """Raise a `ValueError` for an order of steps that cannot work, naming the one that does."""
    packed = sparse = None
    for number, step in enumerate(steps):
        if step.before_packing and packed is not None and not (step.trains and packed.takes_adapters):
            raise ValueError(
                f"{step.name} changes ordinary weights and layers, and {packed.name} has packed them before it; put "
                f"{step.name} before {packed.name}"
            )
        if sparse is not None and step.trains and not isinstance(step, LinearStep):
            step.check_sparse(packed=sparse.packed, bits=sparse.bits)
        if isinstance(step, LinearStep) and step.takes_adapters:
            sparse = step
        if isinstance(step, LinearStep) and step.packed and (packed is None or packed.takes_adapters):
            packed = step
        learns = isinstance(step, LinearStep) or step.learns_from_itself
        if step.needs_teacher and number == 0 and not learns:
            raise ValueError(
                f"{step.name} as the first step would teach the model what it does already; put the step that changes "
                "the model before it, or train on text with Heal(loss='next_token')"
            )
        if getattr(step, "merge", True) is False and number + 1 < len(steps):
            raise ValueError(f"{step.name} with merge=False leaves an adapter in the model; make it the last step")
    if then is not None and packed is not None:
        raise ValueError(
            f"{packed.name} packs the linear layers, so there is nothing left for then=BitsAndBytesConfig(...); use "
            "one of the two"
        )
    if then is not None and getattr(steps[-1], "merge", True) is False:
        raise ValueError(
            "then= would quantize a model with an unmerged adapter; use Heal(method='qlora', merge=False, "
            "quantization={...}), which leaves the adapter on the 4-bit base, without then="
        )


class SlimConfig(QuantizationConfigMixin):
    """What to do to a model, and with which calibration data.

    Args:
        steps: a `Step`, a step's name, the path of a YAML recipe, or a list of steps, names and dicts.
        calibration (`Calibration` or any source it takes, *optional*): for steps that need data; by default samples
            drawn from the model itself.
        save_format (`str`): `"slim"`, or `"bitnet"` to save a model packed by `BitNet` as Transformers' own `bitnet`
            checkpoint, which loads without this package.
        tokenizer (*optional*): for calibration text; by default the one saved beside the model. Not recorded.
        then (`BitsAndBytesConfig` or a dict of its arguments, *optional*): quantizes the model after the last step;
            what is saved is then an ordinary bitsandbytes checkpoint.

    Raises:
        `ValueError`: unknown step, field, save format, or a checkpoint of a newer format version.

    Example:

        SlimConfig("bitnet")
        SlimConfig([PT2LLM(group_size=64)], calibration=Calibration(samples=32))
        SlimConfig([Depth(drop=0.25), Heal(method="qlora")], then=BitsAndBytesConfig(load_in_4bit=True))
        SlimConfig("examples/recipes/ternary.yaml")
    """

    def __init__(
        self,
        steps=None,
        *,
        calibration=None,
        save_format="slim",
        tokenizer=None,
        then=None,
        format_version=FORMAT_VERSION,
        **kwargs,
    ):
        kwargs.pop("quant_method", None)
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has slim format version {format_version}; this optimum-slim reads version "
                f"{FORMAT_VERSION}. Upgrade with: pip install -U optimum-slim"
            )
        if kwargs:
            raise ValueError(
                f"SlimConfig has no argument {sorted(kwargs)}; it takes steps, calibration, save_format, "
                "tokenizer and then. A step's own fields belong into the step, as in "
                "SlimConfig([PT2LLM(group_size=64)])"
            )
        if save_format not in SAVE_FORMATS:
            raise ValueError(f"save_format must be one of {SAVE_FORMATS}, found {save_format!r}")
        if isinstance(steps, (str, Path)) and Path(steps).suffix in (".yaml", ".yml"):
            recipe = read_recipe(steps)
            calibration = recipe.get("calibration") if calibration is None else calibration
            then = recipe.get("then") if then is None else then
        self.quant_method = "slim"
        self.steps = as_steps(steps)
        self.calibration = as_calibration(calibration)
        self.save_format = save_format
        self.tokenizer = tokenizer
        self.then = as_then(then)
        self.stock = None
        check_order(self.steps, self.then)

    @classmethod
    def from_yaml(cls, path: str | Path, **kwargs) -> "SlimConfig":
        """The recipe in a YAML file; keyword arguments override what it says."""
        recipe = read_recipe(path)
        return cls(recipe["steps"], **({key: recipe.get(key) for key in ("calibration", "then")} | kwargs))

    def to_yaml(self, path: str | Path) -> None:
        """Write the recipe as a YAML file that `from_yaml` reads."""
        recipe = {"steps": self.recorded()["steps"], "calibration": self.calibration.to_dict()}
        if self.then is not None:
            recipe["then"] = self.then.to_diff_dict()
        Path(path).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")

    def with_steps(self, steps) -> "SlimConfig":
        """The same configuration with other steps."""
        config = SlimConfig(
            steps,
            calibration=self.calibration,
            save_format=self.save_format,
            tokenizer=self.tokenizer,
            then=self.then,
        )
        config.stock = self.stock
        return config

    def recorded(self) -> dict[str, Any]:
        """The recipe as JSON-safe data; calibration only where a step used it."""
        record = {
            "quant_method": self.quant_method,
            "format_version": FORMAT_VERSION,
            "steps": [step.to_dict() for step in self.steps],
        }
        if any(step.needs_data for step in self.steps):
            record["calibration"] = calibration = self.calibration.to_dict()
            source = calibration["source"]
            if isinstance(source, str) and Path(source).exists():
                calibration["source"] = Path(source).name  # a path of this machine means nothing elsewhere
        return record

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: our own record, or a stock `bitnet` one if `save_format` asks for it."""
        if self.save_format == "bitnet":
            return stock_bitnet_config(self.steps)
        return self.recorded()

    def __iter__(self):
        yield from self.to_dict().items()

    def __deepcopy__(self, memo):
        return self.with_steps(self.steps)

    def __eq__(self, other):
        return isinstance(other, SlimConfig) and self.recorded() == other.recorded()

    __hash__ = None


def from_stock_bitnet(stock: dict[str, Any], asked: SlimConfig) -> SlimConfig:
    """The `SlimConfig` that reads a checkpoint of Transformers' own `bitnet` format into packed layers.

    `asked` is what the user passed: it must be the one step `bitnet`, whose scale convention and list of dense
    modules the checkpoint then decides.
    """
    if len(asked.steps) != 1 or not isinstance(asked.steps[0], BitNet):
        raise ValueError(
            "this checkpoint holds ternary weights in Transformers' bitnet format already; "
            f"load it with SlimConfig('bitnet'), not with {[step.name for step in asked.steps]}"
        )
    config = asked.with_steps([asked.steps[0].for_stock_checkpoint(stock)])
    config.stock = stock
    return config


if "slim" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config("slim")(SlimConfig)
