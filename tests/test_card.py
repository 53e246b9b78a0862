"""The model card says what was done, by which papers, how to load the result, and leaks nothing."""

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_slim import BitNet, Report, slim
from optimum_slim.card import base_model, model_card, quant_method, recorded_steps


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.name_or_path = "owner/base-model"
    slim(model, BitNet(force=True))
    return model


def test_metadata(model):
    data = model_card(model).data
    assert data.library_name == "transformers"
    assert data.base_model == "owner/base-model"
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert data.tags == ["optimum-slim", "bitnet"]


def test_metadata_reads_back(model, tmp_path):
    card = model_card(model, repo_id="me/slim")
    card.save(tmp_path / "README.md")
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == card.data.to_dict()


def test_text(model):
    text = model_card(model, repo_id="me/slim").text
    assert text.lstrip().startswith("# slim")
    assert "import optimum_slim" in text and 'from_pretrained("me/slim")' in text
    assert BitNet.paper in text
    assert '"linear_class": "bitlinear"' in text
    assert "stops with a size mismatch" in text
    assert "| bitnet" in text  # a row of the report
    assert "Compression loses quality" in text


def test_a_report_given_by_hand_wins(model):
    report = Report(model="x", evaluation={"after": {"perplexity": 12.5, "window": 256}})
    text = model_card(model, report).text
    assert "perplexity (window 256)" in text and "12.5" in text
    assert "| bitnet" not in text


def test_a_plain_model_needs_no_import():
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    text = model_card(LlamaForCausalLM(config)).text
    assert "import optimum_slim" not in text
    assert "ordinary Transformers checkpoint" in text
    assert "No recipe is recorded" in text


def test_a_model_saved_in_the_stock_format_needs_no_import(model):
    model.config.quantization_config.save_format = "bitnet"
    assert quant_method(model) == "bitnet"
    assert "import optimum_slim" not in model_card(model).text
    assert recorded_steps(model)[0]["step"] == "bitnet"


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("owner/model", True),
        ("owner/model-1.5_b", True),
        ("/home/someone/model", False),
        ("./model", False),
        ("../up/model", False),
        ("model", False),
        ("", False),
        ("a/b/c", False),
        ("C:\\models\\x", False),
    ],
)
def test_base_model_is_a_hub_id_or_left_out(model, name, kept):
    model.name_or_path = name
    assert base_model(model) == (name if kept else None)
    assert ("base_model" in model_card(model).data.to_dict()) == kept


def test_a_local_folder_that_looks_like_a_hub_id_is_left_out(model, tmp_path, monkeypatch):
    (tmp_path / "owner" / "base-model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert base_model(model) is None
