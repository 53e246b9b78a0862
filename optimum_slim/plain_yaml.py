"""YAML in which 2:4 is text and 1e-3 is a number.

YAML 1.1, which PyYAML reads, takes `2:4` for the number 124 in base 60 and `1e-3` for text. In a recipe the first is a
sparsity pattern and the second a learning rate.
"""

import re
from typing import Any

import yaml


INTEGER, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (INTEGER, FLOAT)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


PlainLoader.add_implicit_resolver(INTEGER, re.compile(r"[-+]?(0|0x[0-9a-fA-F]+|[1-9][0-9_]*)$"), list("-+0123456789"))
PlainLoader.add_implicit_resolver(
    FLOAT,
    re.compile(r"([-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf))|\.(nan|NaN))$"),
    list("-+.0123456789"),
)


def load_yaml(text: str) -> Any:
    """What a YAML text holds, as plain data; raises `yaml.YAMLError` for what is none."""
    return yaml.load(text, Loader=PlainLoader)
