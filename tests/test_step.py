from dataclasses import dataclass

import pytest
import torch
from helpers import tiny_llama, tiny_mixtral
from transformers import GPT2Config, GPT2LMHeadModel

import optimum_slim.step
from optimum_slim import BitNet, Step, StepReport, TernaryLinear, register, slim
from optimum_slim.step import get_step, matches, step_from_dict


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(optimum_slim.step, "STEPS", dict(optimum_slim.step.STEPS))


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("mlp.gate", "model.layers.0.mlp.gate", True),
        ("mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("layers.1", "model.layers.1.mlp", True),
        ("layers.1", "model.layers.11.mlp", False),
        ("*.gate_*", "model.layers.0.mlp.gate_proj", True),
        ("lm_head", "lm_head", True),
    ],
)
def test_matches_whole_name_parts_or_shell_patterns(pattern, name, expected):
    assert matches(name, [pattern]) is expected


def test_registered_step_is_found_by_name_and_round_trips(registry):
    @register("tiny", paper="none")
    @dataclass(frozen=True, kw_only=True)
    class Tiny(Step):
        size: int = 3
        names: tuple[str, ...] = ("a",)

        def apply(self, model, tokens):
            return StepReport(self.to_dict(), 0.0)

    step = Tiny(size=5, names=("b", "c"))
    assert step.to_dict() == {"step": "tiny", "size": 5, "names": ["b", "c"]}
    assert step_from_dict(step.to_dict()) == step
    assert step_from_dict("tiny") == Tiny()


def test_a_name_is_registered_once(registry):
    with pytest.raises(ValueError, match="already registered"):

        @register("bitnet", paper="none")
        class Other(Step):
            def apply(self, model, tokens):
                return None


def test_unknown_step_names_the_nearest_and_all():
    with pytest.raises(
        ValueError,
        match=r"Did you mean 'bitnet'\?.*arbllm, billm, bitnet, bitnet_training, depth, heal, layerskip, magnitude, ",
    ):
        get_step("bitnte")


def test_resolved_step_lists_every_dense_layer_and_is_stable():
    model = tiny_llama()
    step = BitNet(modules_to_not_convert=("o_proj",)).resolve(model)
    assert step.modules_to_not_convert == (
        "lm_head",
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
    )
    assert step.resolve(model) == step
    assert len(step.targets(model)) == 2 * 6


def test_tied_and_head_weights_stay_dense():
    model = tiny_llama(tie_word_embeddings=True)
    slim(model, BitNet(force=True))
    assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight


def test_nothing_to_pack_is_an_error_not_a_silent_no_op():
    with pytest.raises(ValueError, match="found no linear layer to pack"):
        slim(tiny_llama(), BitNet(force=True, modules_to_not_convert=("*",)))


def test_fused_experts_are_refused_by_name_and_left_dense_only_on_request():
    model = tiny_mixtral()
    with pytest.raises(ValueError, match=r"experts\.\w+ \(4, .*modules_to_not_convert=\('experts',\)"):
        slim(model, BitNet(force=True))
    step = BitNet(force=True, modules_to_not_convert=("experts",))
    slim(model, step)
    assert isinstance(model.model.layers[0].self_attn.q_proj, TernaryLinear)
    assert "experts" in model.config.quantization_config.steps[0].modules_to_not_convert


def test_conv1d_layers_are_packed_too():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)).eval()
    ids = torch.randint(0, 64, (1, 7))
    slim(model, BitNet(force=True, activation_bits=None))
    packed = model(ids).logits
    attention = model.transformer.h[0].attn.c_attn
    assert isinstance(attention, TernaryLinear) and (attention.out_features, attention.in_features) == (96, 32)
    model.dequantize()
    torch.testing.assert_close(model(ids).logits, packed, rtol=1e-4, atol=1e-4)


def test_report_rows_name_every_packed_layer():
    model = tiny_llama()
    report = slim(model, BitNet(force=True))
    rows = report.steps[0].layers
    assert len(rows) == 14 and rows[0]["name"] == "model.layers.0.self_attn.q_proj"
    assert all(2.0 <= row["bits_per_weight"] < 2.1 and 0.1 < row["relative_error"] < 0.4 for row in rows)
    assert report.sizes["after"] < report.sizes["before"]


def test_a_damaged_weight_is_found_before_any_layer_is_changed():
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN"):
        slim(model, BitNet(force=True))
    assert not any(isinstance(module, TernaryLinear) for module in model.modules())
