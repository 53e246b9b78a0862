"""Healing: it helps, it trains only what it should, it merges exactly, and it survives a kill."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import tiny_llama, tiny_mixtral, token_ids
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from optimum_slim import BitNet, Calibration, Depth, Heal, SlimConfig, save, slim
from optimum_slim.memory import shared_copy
from optimum_slim.student import feed_forward_layers, seams


pytest.importorskip("peft")

LAYERS = 6
WIDE = {"num_hidden_layers": LAYERS, "intermediate_size": 128}  # bitsandbytes wants multiples of 64
CUT = Depth(layers=(2, 3))


def heal(**fields):
    rate = 3e-4 if fields.get("method") == "full" else 3e-3
    settings = {"steps": 12, "batch_size": 4, "rank": 4, "learning_rate": rate, "evaluate_every": 4, "held_out": 0.1}
    return Heal(**(settings | fields))


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


def texts(model):
    """What the model itself says: something to learn."""
    return model.generate(token_ids(24, 1), max_new_tokens=23, do_sample=False, pad_token_id=0)


def healed(step, model=None):
    model = model or tiny_llama(**WIDE)
    return model, slim(model, [CUT, step], data=texts(model)).steps[-1]


def curve(report):
    history = [row["held_out"] for row in report.tables["healing"]]
    return history[0], min(history)


@pytest.mark.parametrize("loss", ["distill", "next_token"])
@pytest.mark.parametrize("method", ["lora", "full", "norms"])
def test_held_out_loss_falls_and_the_result_is_an_ordinary_model(tmp_path, method, loss):
    whole = logits(tiny_llama(**WIDE))
    cut = tiny_llama(**WIDE)
    slim(cut, CUT)
    model, report = healed(heal(method=method, loss=loss))
    before, after = curve(report)
    assert after < before
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert not hasattr(model, "peft_config") and not model._hf_peft_config_loaded
    assert all(parameter.requires_grad for parameter in model.parameters()) and model.dtype == torch.float32
    if loss == "distill" and method != "norms":
        assert (logits(model) - whole).norm() < (logits(cut) - whole).norm()
    model.save_pretrained(tmp_path / "healed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "healed")), logits(model))
    assert [step["step"] for step in model.config.slim] == ["depth", "heal"]


def test_lora_changes_the_feed_forward_layers_only_and_full_changes_all():
    cut = tiny_llama(**WIDE)
    slim(cut, CUT)
    for method, expected in (("lora", {"gate_proj", "up_proj", "down_proj"}), ("norms", {"norm"}), ("full", None)):
        model, _ = healed(heal(method=method))
        pairs = zip(model.named_parameters(), cut.parameters(), strict=True)
        changed = {name for (name, new), old in pairs if not torch.equal(new, old)}
        if expected is None:
            assert len(changed) == len(list(cut.parameters()))
        else:
            assert changed and all(any(part in name for part in expected) for name in changed)


def test_the_paper_s_defaults():
    step = Heal()
    assert (step.rank, step.alpha, step.dropout, step.learning_rate, step.warmup_steps) == (64, None, 0.05, 3e-4, 100)
    assert step.target_modules == "ffn"


@pytest.mark.parametrize("method", ["lora", "full", "norms"])
def test_the_teacher_and_the_model_it_shares_tensors_with_stay_as_they_were(method):
    whole = tiny_llama(**WIDE)
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    student = shared_copy(whole)
    assert all(a is b for a, b in zip(whole.parameters(), student.parameters(), strict=True))
    CUT.apply(student)
    with torch.no_grad():
        heal(method=method).apply(student, texts(whole), teacher=whole)
    assert all(torch.equal(before[name], tensor) for name, tensor in whole.state_dict().items())
    frozen = [p for p in student.parameters() if any(p is q for q in whole.parameters())]
    assert bool(frozen) == (method != "full")


def test_16_bit_weights_are_healed_in_16_bits():
    for method in ("lora", "full"):
        model, report = healed(heal(method=method), tiny_llama(**WIDE).to(torch.bfloat16))
        assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
        assert curve(report)[1] < curve(report)[0]


def test_tied_weights_stay_tied():
    model, _ = healed(heal(method="full"), tiny_llama(**WIDE, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_seams_are_where_layers_are_missing():
    whole = tiny_llama(num_hidden_layers=8)
    for layers, expected in (((2, 3), [(1, 3)]), ((1, 4, 5), [(0, 1), (2, 5)]), ((6, 7), [(5, 7)]), ((0, 1), [])):
        student = shared_copy(whole)
        Depth(layers=layers).apply(student)
        assert seams(student, whole) == expected


def test_hidden_term():
    _, report = healed(heal(hidden_weight=0.5))
    assert curve(report)[1] < curve(report)[0]
    model = tiny_llama(**WIDE)
    with pytest.raises(ValueError, match="hidden_weight=0"):
        slim(model, [Depth(layers=(0, 1)), heal(hidden_weight=0.5)], data=token_ids(8))


def test_feed_forward_layers_of_other_architectures():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=128, n_positions=64))
    names = {name.split(".", 3)[3] for name in feed_forward_layers(gpt2)}
    assert names == {"mlp.c_fc", "mlp.c_proj"}
    assert feed_forward_layers(tiny_mixtral()) == []
    with pytest.raises(ValueError, match="fused into 3-D"):
        slim(tiny_mixtral(), heal(loss="next_token"), data=token_ids(8, vocabulary=64))


def test_conv1d_merges_the_right_way_round():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=128, n_positions=64, n_inner=48)
    model = GPT2LMHeadModel(config).eval()
    data = model.generate(token_ids(24, 1), max_new_tokens=23, do_sample=False, pad_token_id=0)
    report = slim(model, [Depth(layers=(1,)), heal()], data=data).steps[-1]
    assert curve(report)[1] < curve(report)[0]


def test_merged_equals_adapter(tmp_path):
    merged, _ = healed(heal())
    kept, _ = healed(heal(merge=False))
    assert torch.allclose(logits(merged), logits(kept), atol=1e-5)


def test_an_unmerged_adapter_saves_with_its_base_and_reloads_as_peft_users_expect(tmp_path):
    from peft import AutoPeftModelForCausalLM, PeftModel

    model, _ = healed(heal(merge=False))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora" in name for name in trained)
    out = save(model, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(out)
    assert base.config.num_hidden_layers == LAYERS - 2
    cut = tiny_llama(**WIDE)
    slim(cut, CUT)
    assert torch.equal(logits(base), logits(cut))
    assert torch.allclose(logits(PeftModel.from_pretrained(base, out / "adapter")), logits(model), atol=1e-6)
    again = AutoPeftModelForCausalLM.from_pretrained(out / "adapter")
    assert torch.allclose(logits(again), logits(model), atol=1e-6)


def test_qlora_merges_into_the_full_precision_base():
    pytest.importorskip("bitsandbytes")
    cut = tiny_llama(**WIDE)
    slim(cut, CUT)
    model, report = healed(heal(method="qlora"))
    assert curve(report)[1] < curve(report)[0]
    assert all(type(module) is torch.nn.Linear for name, module in model.named_modules() if name.endswith("_proj"))
    new, old = (m.model.layers[0] for m in (model, cut))
    assert torch.equal(new.self_attn.q_proj.weight, old.self_attn.q_proj.weight)
    difference = new.mlp.up_proj.weight - old.mlp.up_proj.weight
    assert torch.linalg.matrix_rank(difference.detach(), atol=1e-5) <= 4 and difference.abs().max() > 0


def test_prune_heal_on_4_bits_and_save_in_4_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_llama(**WIDE).save_pretrained(tmp_path / "dense")
    then = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    config = SlimConfig([CUT, heal(method="qlora")], calibration=token_ids(16, 12), then=then)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert model.is_loaded_in_4bit and model.config.quantization_config.quant_method == "bitsandbytes"
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    out = save(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.config.num_hidden_layers == LAYERS - 2 and torch.equal(logits(again), logits(model))


def test_qlora_kept_as_an_adapter_on_the_4_bit_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel

    model, report = healed(heal(method="qlora", merge=False))
    assert model.is_loaded_in_4bit and curve(report)[1] < curve(report)[0]
    out = save(model, tmp_path / "out")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out), out / "adapter")
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_early_stop_and_never_worse_than_before():
    model, report = healed(heal(learning_rate=30.0, max_grad_norm=1e9, steps=40, patience=2))
    assert report.tables["healing"][-1]["step"] < 40
    cut = tiny_llama(**WIDE)
    slim(cut, CUT)
    assert torch.equal(logits(model), logits(cut))


@pytest.mark.parametrize("merge", [True, False])
def test_a_loss_that_is_not_finite_leaves_the_model_as_it_was_pruned(merge):
    cut = tiny_llama(**WIDE)
    slim(cut, CUT)
    model = tiny_llama(**WIDE)
    data = texts(model)
    with pytest.raises(FloatingPointError, match="learning_rate"):
        slim(model, [CUT, heal(loss="next_token", learning_rate=1e38, max_grad_norm=1e38, merge=merge)], data=data)
    assert torch.equal(logits(model), logits(cut)) and not model._hf_peft_config_loaded
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_global_random_state_is_left_alone_and_the_seed_decides():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, _ = healed(heal(steps=3))
    first = logits(first)
    torch.manual_seed(1)
    model = tiny_llama(**WIDE)
    data = texts(model)
    torch.manual_seed(1)
    slim(model, [CUT, heal(steps=3)], data=data)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(logits(model), first)
    other, _ = healed(heal(steps=3, seed=1))
    assert not torch.equal(logits(other), first)


def test_its_own_number_of_samples():
    data = Calibration(source=token_ids(16, 12))
    assert heal(samples=8, length=6).calibration(data).source.shape == (8, 6)
    assert heal().calibration(data).source.shape == (16, 12)
    assert heal(samples=256).calibration(Calibration()).samples == 256
    with pytest.raises(ValueError, match="asks for 32 samples"):
        slim(tiny_llama(**WIDE), [CUT, heal(samples=32)], data=data)


KILLED = """
import os, signal, sys, torch
from helpers import tiny_llama, token_ids
from optimum_slim import Depth, Heal, slim
import optimum_slim.journal as journal

write, count = journal.Journal.write, 0
def counted(self, entry):
    global count
    write(self, entry)
    count += 1
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
journal.Journal.write = counted
model = tiny_llama(num_hidden_layers=6)
step = Heal(steps=120, batch_size=2, rank=4, learning_rate=3e-3, evaluate_every=30, held_out=0.1, dropout=0.1)
report = slim(model, [Depth(drop=2), step], data=token_ids(16, 12))
torch.save([model.state_dict(), report.notes], sys.argv[1])
"""


@pytest.mark.slow
def test_a_run_killed_while_healing_goes_on_and_ends_with_the_same_bits(tmp_path):
    def run(cache, out, kill_at):
        paths = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "OPTIMUM_SLIM_CACHE": str(tmp_path / cache),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        words = [sys.executable, "-c", KILLED, str(tmp_path / out), str(kill_at)]
        return subprocess.run(words, env=environment, capture_output=True, text=True)

    start = time.monotonic()
    assert run("one", "left_alone.pt", 0).returncode == 0
    assert run("two", "resumed.pt", 2).returncode == -signal.SIGKILL
    assert list((tmp_path / "two" / "runs").rglob("fit.pt"))
    done = run("two", "resumed.pt", 0)
    assert done.returncode == 0, done.stderr[-2000:]
    (expected, _), (found, notes) = (torch.load(tmp_path / name) for name in ("left_alone.pt", "resumed.pt"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert "resumed from step" in notes[-1]
    assert not list((tmp_path / "two" / "runs").rglob("fit.pt"))
    assert time.monotonic() - start < 300


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"method": "dora"}, "lora, qlora, full, norms"),
        ({"loss": "kd"}, "distill, next_token"),
        ({"rank": 0}, "positive integer"),
        ({"steps": 0}, "positive integer"),
        ({"dropout": 1.0}, "dropout"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"method": "full", "merge": False}, "no adapter to keep"),
        ({"loss": "next_token", "hidden_weight": 1.0}, "loss='distill'"),
        ({"quantization": {"load_in_4bit": True}}, "for method='qlora'"),
    ],
)
def test_wrong_fields(fields, says):
    with pytest.raises(ValueError, match=says):
        Heal(**fields)


@pytest.mark.parametrize(
    ("steps", "then", "says"),
    [
        ([Heal()], None, "first step"),
        ([BitNet(force=True), Heal(loss="next_token")], None, "put heal before bitnet"),
        ([CUT, Heal(merge=False), BitNet(force=True)], None, "make it the last step"),
        ([CUT, BitNet(force=True)], {"load_in_4bit": True}, "use one of the two"),
        ([CUT, Heal(merge=False)], {"load_in_4bit": True}, "unmerged adapter"),
        ([CUT], {"load_in_5bit": True}, "unknown keys"),
    ],
)
def test_orders_that_cannot_work(steps, then, says):
    with pytest.raises(ValueError, match=says):
        SlimConfig(steps, then=then)
