"""Numbers and patterns as people write them in recipes and on the command line."""

import math

import pytest
import yaml

from optimum_slim import SlimConfig
from optimum_slim.plain_yaml import load_yaml


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2:4", "2:4"),
        ("12:30:59", "12:30:59"),
        ("1e-3", 0.001),
        ("2.5E+2", 250.0),
        (".5", 0.5),
        ("-7", -7),
        ("1_000", 1000),
        ("0x10", 16),
        ("0", 0),
        ("08", "08"),
        ("-.inf", -math.inf),
        ("true", True),
        ("null", None),
        ("[1, 2:4, a]", [1, "2:4", "a"]),
        ("1e", "1e"),
        ("e3", "e3"),
    ],
)
def test_scalars(text, expected):
    found = load_yaml(text)
    assert found == expected and type(found) is type(expected)


def test_a_recipe_with_a_pattern_comes_back_as_it_was(tmp_path):
    written = tmp_path / "written.yaml"
    written.write_text("steps:\n  - step: sparsegpt\n    sparsity: 2:4\n", encoding="utf-8")
    config = SlimConfig.from_yaml(written)
    assert config.steps[0].sparsity == "2:4"
    config.to_yaml(tmp_path / "saved.yaml")
    assert SlimConfig.from_yaml(tmp_path / "saved.yaml") == config
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text())["steps"][0]["sparsity"] == "2:4"
