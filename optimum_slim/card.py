"""The model card of a slimmed model: recipe, papers, figures, how to load it, and what it cannot do.

Transformers' own `push_to_hub` writes a generic card; this one says that the checkpoint needs `import optimum_slim`,
which is the difference between a model that loads and one that stops at a size mismatch.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.constants import ENDPOINT

from . import __version__
from .report import Report
from .step import STEPS


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

PACKED_USE = """```python
import optimum_slim  # registers the packed format with Transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Install it with `pip install optimum-slim`. Without `import optimum_slim`, Transformers stops with a size mismatch: the
packed bytes lie under the names of the dense weights, so that a wrong model cannot load by accident."""

PLAIN_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

This is an ordinary Transformers checkpoint; it needs no extra package."""

GGUF_USE = """```sh
llama-cli --model {file}
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", gguf_file="{file}")
tokenizer = AutoTokenizer.from_pretrained("{name}", gguf_file="{file}")
```

llama.cpp multiplies the weights as they are stored; Transformers makes them dense. `optimum_slim.load_gguf` keeps
ternary weights (TQ1_0 and TQ2_0) packed."""

LIMITS = """Compression loses quality, and small models lose most. Read the figures above before you use the model;
where they hold no perplexity, none was measured. The limits, biases and licence of the model that this one was made
from hold here as well."""


def model_card(
    model,
    report: Report | None = None,
    *,
    repo_id: str | None = None,
    pictures: Sequence[str] = (),
    gguf_file: str | None = None,
) -> ModelCard:
    """The card of `model`.

    Args:
        model: a slimmed model.
        report: figures for the card; by default the report of the run that made the model, if there was one.
        repo_id: name to load the model by in the example; by default a placeholder folder name.
        pictures: names of image files beside the card, shown under its figures.
        gguf_file: name of the GGUF file beside the card, if that is what the model was saved as.

    Returns:
        A `ModelCard`; `card.save(path)` writes it.
    """
    report = report or getattr(model, "slim_report", None)
    steps = recorded_steps(model)
    data = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["optimum-slim", *(["gguf"] if gguf_file else []), *dict.fromkeys(step["step"] for step in steps)],
    }
    base = base_model(model)
    if base:
        data |= {"base_model": base, "base_model_relation": "quantized"}
    name = repo_id or "path/to/this/folder"
    use = GGUF_USE if gguf_file else PACKED_USE if quant_method(model) == "slim" else PLAIN_USE
    title = repo_id.rpartition("/")[2] if repo_id else f"{base.rpartition('/')[2] if base else 'Model'}, slimmed"
    made_from = f"Made from [{base}]({ENDPOINT}/{base})" if base else "Made"
    parts = [
        f"# {title}",
        f"{made_from} with optimum-slim {__version__}.",
        "## Use",
        use.format(name=name, file=gguf_file),
        "## Recipe",
        _recipe_text(steps),
    ]
    if report is not None:
        parts += ["## Figures", _without_title(report.to_markdown())]
    parts += [f"![{Path(picture).stem}]({picture})" for picture in pictures]
    parts += ["## Limits", LIMITS]
    header = ModelCardData(**data).to_yaml()
    return ModelCard(f"---\n{header}\n---\n\n" + "\n\n".join(parts) + "\n", ignore_metadata_errors=False)


def recorded_steps(model) -> list[dict]:
    """The steps a slimmed model went through, as its config records them; empty for any other model."""
    config = getattr(model.config, "quantization_config", None)
    if hasattr(config, "recorded"):
        return config.recorded()["steps"]
    return list(getattr(model.config, "slim", None) or [])


def quant_method(model) -> str | None:
    """The `quant_method` that the saved config will hold, `None` for a plain checkpoint."""
    config = getattr(model.config, "quantization_config", None)
    saved = config.to_dict() if hasattr(config, "to_dict") else config or {}
    return saved.get("quant_method")


def base_model(model) -> str | None:
    """The Hub id of the model this one was made from; `None` if it came from a local folder or from nowhere."""
    name = str(getattr(model, "slim_base", "") or getattr(model, "name_or_path", "") or "")
    if not HUB_ID.fullmatch(name) or name.startswith(".") or Path(name).exists():
        return None
    return name


def _recipe_text(steps: list[dict]) -> str:
    if not steps:
        return "No recipe is recorded in the model's config."
    papers = [f"- `{step['step']}`: {STEPS[step['step']].paper}" for step in steps if step["step"] in STEPS]
    shown = [{key: _shortened(value) for key, value in step.items()} for step in steps]
    return "\n".join(dict.fromkeys(papers)) + "\n\n```json\n" + json.dumps(shown, indent=2) + "\n```"


def _shortened(value):
    """A long list (the names of all layers left dense) as its first entries and a count."""
    if isinstance(value, list) and len(value) > 8:
        return [*value[:8], f"... {len(value) - 8} more"]
    return value


def _without_title(text: str) -> str:
    return text.partition("\n")[2].strip()
