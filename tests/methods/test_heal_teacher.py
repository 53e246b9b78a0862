"""Healing from a teacher in another form: its likeliest tokens on disk, or a copy in 4 bits."""

import os
import signal
import subprocess
import sys
import tempfile
import weakref

import pytest
import torch
from helpers import tiny_llama, token_ids
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from optimum_slim import Depth, Heal, TernaryLinear, slim, teacher_cache
from optimum_slim.losses import Distillation
from optimum_slim.memory import shared_copy
from optimum_slim.methods import heal as heal_module
from optimum_slim.saving import stored_bytes
from optimum_slim.teacher import four_bit_copy
from optimum_slim.teacher_cache import TeacherCache
from optimum_slim.train import fit


pytest.importorskip("peft")

WIDE = {"num_hidden_layers": 6, "intermediate_size": 128, "initializer_range": 0.05}
CUT = Depth(layers=(2, 3))
TOKENS = token_ids(24, 16)


@pytest.fixture
def own_folders(tmp_path, monkeypatch):
    """All that is written lies in `tmp_path`."""
    monkeypatch.setenv("OPTIMUM_SLIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def heal(**fields):
    rate = 1e-3 if fields.get("method") == "full" else 1e-2
    settings = {"steps": 12, "batch_size": 4, "rank": 4, "learning_rate": rate, "evaluate_every": 4, "held_out": 0.1}
    return Heal(**(settings | fields))


def healed(model=None, **fields):
    model = model or tiny_llama(**WIDE)
    return model, slim(model, [CUT, heal(**fields)], data=TOKENS)


def logits(model):
    with torch.no_grad():
        return model(TOKENS[:4]).logits


def divergence(model, teacher=None):
    with torch.no_grad():
        return Distillation(teacher or tiny_llama(**WIDE))(model, TOKENS[:4]).item()


def cut():
    model = tiny_llama(**WIDE)
    slim(model, CUT)
    return model


# --- cached


@pytest.mark.parametrize("method", ["lora", "full"])
def test_healing_from_the_cache_is_healing_from_the_teacher(method, own_folders, tmp_path, monkeypatch):
    online, _ = healed(method=method)
    monkeypatch.delattr(Distillation, "__call__")
    cached, report = healed(method=method, teacher_top_k=128)
    monkeypatch.undo()
    torch.testing.assert_close(logits(cached), logits(online), atol=0.02, rtol=0)
    assert not torch.allclose(logits(cached), logits(cut()), atol=0.05)
    assert "the 128 likeliest of 128 tokens: 0.000% of its probability" in report.notes[-1]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_part_of_the_vocabulary_heals_and_the_report_says_what_is_lost():
    before = divergence(cut())
    model, report = healed(teacher_top_k=32, micro_batch_size=2, kl_weight=0.9)
    assert divergence(model) < 0.9 * before
    assert "nats of entropy are not taught; " in report.notes[-1] and report.notes[-1].endswith(" a token on disk")


def test_a_cache_of_its_own_serves_other_runs(tmp_path, monkeypatch):
    folder, asked, ask = tmp_path / "teacher", [], teacher_cache._ask
    monkeypatch.setattr(teacher_cache, "_ask", lambda *given: asked.append(1) or ask(*given))
    model, _ = healed(teacher_top_k=64, teacher_cache=folder)
    assert len(asked) == 6 and TeacherCache(folder).top_k == 64
    assert model.config.slim[-1]["teacher_cache"] is None and model.config.slim[-1]["teacher_top_k"] == 64
    other, _ = healed(teacher_top_k=64, teacher_cache=str(folder), rank=2)
    assert len(asked) == 6 and not torch.equal(logits(other), logits(model))
    again, _ = healed(teacher_top_k=64, teacher_cache=folder)
    assert torch.equal(logits(again), logits(model))
    before = tiny_llama(**WIDE)
    with pytest.raises(ValueError, match="built for something else: top_k: 64 there, 32 here"):
        healed(before, teacher_top_k=32, teacher_cache=folder)
    assert torch.equal(logits(before), logits(tiny_llama(**WIDE)))


def test_without_a_journal_the_cache_is_in_a_temporary_folder(own_folders, tmp_path, monkeypatch):
    seen = []
    build = TeacherCache.build.__func__

    def spy(cls, teacher, tokens, folder, **settings):
        seen.append(str(folder))
        return build(cls, teacher, tokens, folder, **settings)

    monkeypatch.setattr(TeacherCache, "build", classmethod(spy))
    whole = tiny_llama(**WIDE)
    student = shared_copy(whole)
    CUT.apply(student)
    heal(teacher_top_k=64).apply(student, TOKENS, teacher=whole)
    assert divergence(student, whole) < divergence(cut(), whole)
    assert len(seen) == 1 and seen[0].startswith(str(tmp_path)) and not list(tmp_path.iterdir())


def test_a_training_that_fails_leaves_no_cache(own_folders, tmp_path):
    model = tiny_llama(**WIDE)
    with pytest.raises(FloatingPointError):
        healed(model, teacher_top_k=64, learning_rate=1e38, max_grad_norm=1e38)
    assert torch.equal(logits(model), logits(cut()))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("fields", "freed"),
    [({}, False), ({"teacher_top_k": 64}, True), ({"teacher_bits": 4}, True)],
    ids=["as it is", "cached", "4 bits"],
)
def test_what_was_pruned_leaves_memory_while_the_student_trains(fields, freed, monkeypatch):
    if "teacher_bits" in fields:
        pytest.importorskip("bitsandbytes")
    model, seen = tiny_llama(**WIDE), []
    removed = weakref.ref(model.model.layers[2].mlp.up_proj.weight)
    monkeypatch.setattr(heal_module, "fit", lambda *given, **named: seen.append(removed()) or fit(*given, **named))
    healed(model, **fields)
    assert len(seen) == 1 and (seen[0] is None) == freed


# --- in 4 bits


def test_a_teacher_in_4_bits_is_small_and_close_and_the_model_stays():
    pytest.importorskip("bitsandbytes")
    model = tiny_llama(num_hidden_layers=6, hidden_size=256, intermediate_size=512).to(torch.bfloat16)
    model.lm_head.weight.requires_grad_(False)
    before, config = {name: p.clone() for name, p in model.named_parameters()}, model.config.to_dict()
    modules, flags = dict(model.named_modules()), [p.requires_grad for p in model.parameters()]
    copied = four_bit_copy(model)
    assert dict(model.named_modules()) == modules and model.config.to_dict() == config
    assert [p.requires_grad for p in model.parameters()] == flags and not hasattr(model, "is_loaded_in_4bit")
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert copied.model.embed_tokens.weight is model.model.embed_tokens.weight
    dense, small = (stored_bytes(m.model.layers) for m in (model, copied))
    assert 0.25 < small / dense < 0.29
    assert (logits(copied) - logits(model)).norm() < 0.3 * logits(model).norm()
    student = shared_copy(model)
    CUT.apply(student)
    assert divergence(copied, model) < 0.1 * divergence(student, model)
    assert four_bit_copy(copied) is copied


@pytest.mark.parametrize("fields", [{"method": "full"}, {"method": "lora"}, {"hidden_weight": 0.5}], ids=str)
def test_a_student_heals_from_a_teacher_in_4_bits(fields):
    pytest.importorskip("bitsandbytes")
    before = divergence(cut())
    model, report = healed(teacher_bits=4, **fields)
    assert divergence(model) < 0.9 * before
    assert report.notes[-1].startswith("teacher in 4 bits: 0.")
    assert all(type(module) is torch.nn.Linear for name, module in model.named_modules() if name.endswith("_proj"))
    assert getattr(model.config, "quantization_config", None) is None and model.dtype == torch.float32


def test_a_4_bit_teacher_can_be_cached():
    pytest.importorskip("bitsandbytes")
    small = four_bit_copy(tiny_llama(**WIDE))
    cached, report = healed(teacher_bits=4, teacher_top_k=128)
    assert report.notes[-1].endswith("(of a copy in 4 bits)")
    online, _ = healed(teacher_bits=4)
    torch.testing.assert_close(logits(cached), logits(online), atol=0.02, rtol=0)
    assert divergence(cached, small) < divergence(cut(), small)


def test_the_random_state_is_left_alone():
    pytest.importorskip("bitsandbytes")
    model = tiny_llama(**WIDE)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    healed(model, teacher_bits=4, steps=2)
    assert torch.equal(torch.rand(3), expected)


def test_a_teacher_loaded_in_4_bits_by_the_user(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_llama(**WIDE).save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    before = logits(teacher)
    student = cut()
    loss = Distillation(teacher)
    settings = {"steps": 8, "learning_rate": 1e-3, "batch_size": 4, "evaluate_every": 4, "journal": tmp_path / "fit"}
    report = fit(student, TOKENS, loss, **settings)
    assert report.held_out_after < 0.9 * report.held_out_before
    assert type(teacher.model.layers[0].mlp.up_proj).__name__ == "Linear4bit" and torch.equal(logits(teacher), before)
    assert all(p.grad is None for p in teacher.parameters())
    whole = shared_copy(teacher)
    student = cut()
    heal(method="full", teacher_bits=4).apply(student, TOKENS, teacher=whole)
    assert divergence(student, teacher) < divergence(cut(), teacher)


def test_what_cannot_be_in_4_bits_is_refused_before_anything_is_changed(monkeypatch):
    model = tiny_llama(**WIDE)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(ImportError, match=r'pip install "optimum-slim\[bnb\]"'):
            healed(model, teacher_bits=4)
    assert torch.equal(logits(model), logits(tiny_llama(**WIDE)))
    pytest.importorskip("bitsandbytes")
    model.set_submodule("model.layers.1.mlp.up_proj", TernaryLinear(64, 128, device="meta"))
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj is packed \(1 layers\); use teacher_bits=None"):
        four_bit_copy(model)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"teacher_bits": 8}, "teacher_bits must be 4"),
        ({"teacher_top_k": 0}, "top_k must be a positive integer"),
        ({"teacher_top_k": 64, "temperature": 0.0}, "temperature must be positive"),
        ({"teacher_top_k": 64, "divergence": "reverse"}, "use divergence='forward'"),
        ({"teacher_top_k": 64, "hidden_weight": 1.0}, "has no hidden states"),
        ({"teacher_top_k": 64, "kl_weight": 0.0}, "use loss='next_token'"),
        ({"teacher_cache": "folder"}, "add teacher_top_k=256"),
        ({"loss": "next_token", "teacher_bits": 4}, "teacher_bits is about the unpruned model"),
        ({"loss": "next_token", "teacher_top_k": 4}, "teacher_top_k is about the unpruned model"),
    ],
)
def test_wrong_fields(fields, says):
    with pytest.raises(ValueError, match=says):
        Heal(**fields)


KILLED = """
import os, signal, sys, torch
from helpers import tiny_llama, token_ids
from optimum_slim import Depth, Heal, slim
from optimum_slim import journal, teacher_cache, teacher_shards

teacher_shards.SHARD_BYTES = 10_000  # 4 samples
counts, kill = {"shard": 0, "fit": 0}, sys.argv[2:]

def counted(kind, function):
    def call(*given):
        counts[kind] += 1
        if [kind, str(counts[kind])] == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given)
    return call

teacher_cache._ask = counted("shard", teacher_cache._ask)
journal.Journal.write = counted("fit", journal.Journal.write)
model = tiny_llama(num_hidden_layers=6)
step = Heal(steps=120, batch_size=2, rank=4, learning_rate=3e-3, evaluate_every=60, held_out=0.1, teacher_top_k=50)
report = slim(model, [Depth(drop=2), step], data=token_ids(16, 12))
torch.save([model.state_dict(), report.notes, counts], sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_run_killed_while_caching_or_healing_goes_on_and_ends_with_the_same_bits(tmp_path):
    def run(cache, out, *kill_at):
        paths = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "OPTIMUM_SLIM_CACHE": str(tmp_path / cache),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        words = [sys.executable, "-c", KILLED, str(tmp_path / out), *kill_at]
        return subprocess.run(words, env=environment, capture_output=True, text=True)

    assert run("one", "left_alone.pt").returncode == 0
    assert run("two", "resumed.pt", "shard", "6").returncode == -signal.SIGKILL  # two micro-batches make a shard
    assert run("two", "resumed.pt", "fit", "2").returncode == -signal.SIGKILL
    assert len(list((tmp_path / "two" / "runs").rglob("shard-*.safetensors"))) == 4
    done = run("two", "resumed.pt")
    assert done.returncode == 0, done.stderr[-2000:]
    (expected, _, whole), (found, notes, counts) = (torch.load(tmp_path / n) for n in ("left_alone.pt", "resumed.pt"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (whole["shard"], counts["shard"]) == (8, 0) and "resumed from step" in notes[-2]
    assert not list((tmp_path / "two" / "runs").rglob("*.safetensors"))
