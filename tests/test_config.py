import copy
import json

import pytest

from optimum_slim import PT2LLM, BitNet, Calibration, SlimConfig


RECIPE = """
steps:
  - step: pt2llm
    group_size: 64
calibration:
  samples: 4
  length: 32
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_every_way_to_name_a_recipe():
    expected = (BitNet(),)
    for steps in ("bitnet", BitNet(), [BitNet()], ["bitnet"], {"step": "bitnet"}, [{"step": "bitnet"}]):
        assert SlimConfig(steps).steps == expected


@pytest.mark.parametrize("load", [SlimConfig, SlimConfig.from_yaml], ids=["path", "from_yaml"])
def test_yaml_recipe(recipe, load):
    config = load(recipe)
    assert config.steps == (PT2LLM(group_size=64),)
    assert config.calibration == Calibration(samples=4, length=32)


def test_yaml_round_trip(recipe, tmp_path):
    config = SlimConfig(recipe)
    config.to_yaml(tmp_path / "again.yaml")
    assert SlimConfig(tmp_path / "again.yaml") == config


def test_json_round_trip():
    config = SlimConfig(
        [PT2LLM(group_size=64, modules_to_not_convert=("o_proj",))], calibration=Calibration(samples=8, seed=3)
    )
    record = json.loads(config.to_json_string())
    assert record["quant_method"] == "slim" and record["format_version"] == 1
    assert SlimConfig.from_dict(record) == config
    assert dict(config) == config.to_dict()


def test_calibration_is_recorded_only_where_it_was_used():
    assert "calibration" not in SlimConfig("bitnet").to_dict()
    assert "calibration" in SlimConfig("pt2llm").to_dict()


def test_copies_are_independent_and_keep_the_tokenizer_out_of_the_record():
    tokenizer = object()
    config = SlimConfig("pt2llm", tokenizer=tokenizer)
    clone = copy.deepcopy(config)
    assert clone == config and clone.tokenizer is tokenizer and "tokenizer" not in config.to_dict()
    clone.save_format = "bitnet"
    assert config.save_format == "slim"


def test_stock_bitnet_record():
    config = SlimConfig(BitNet(modules_to_not_convert=("lm_head",)), save_format="bitnet")
    assert config.to_dict() == {
        "quant_method": "bitnet",
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
    }


def test_a_local_path_is_recorded_by_its_name_only(tmp_path):
    (tmp_path / "text.txt").write_text("some text")
    config = SlimConfig("pt2llm", calibration=str(tmp_path / "text.txt"))
    assert config.to_dict()["calibration"]["source"] == "text.txt"
    config.to_yaml(tmp_path / "recipe.yaml")
    assert SlimConfig(tmp_path / "recipe.yaml").calibration.source == str(tmp_path / "text.txt")
