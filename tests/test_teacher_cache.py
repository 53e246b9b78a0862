"""A teacher's likeliest tokens on disk: what is kept, what the loss makes of it, and what a killed build leaves."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_llama, token_ids
from safetensors.torch import load_file
from test_losses import Widest

from optimum_slim import losses, teacher_cache, teacher_shards
from optimum_slim.cached_distillation import CachedDistillation
from optimum_slim.losses import Distillation
from optimum_slim.teacher_cache import TeacherCache
from optimum_slim.teacher_shards import Layout
from optimum_slim.train import fit


TOKENS = token_ids(10, 9)


def teacher(seed=0, **changes):
    return tiny_llama(seed, initializer_range=0.3, **changes)


def build(folder, model=None, tokens=TOKENS, **settings):
    return TeacherCache.build(model or teacher(), tokens, folder, **{"top_k": 16, "batch_size": 3} | settings)


def log_probs(model, tokens, temperature=1.0):
    with torch.no_grad():
        return (model(tokens).logits[:, :-1] / temperature).log_softmax(-1)


def asked(at=None):
    """A teacher with a log of the batches it was asked about, and stopped at one of the calls."""
    model = teacher()
    model.batches = []

    def ask(module, args, options):
        model.batches.append(tuple(options["input_ids"].shape))
        if len(model.batches) == at:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(ask, with_kwargs=True)
    return model


# --- what is kept


def test_the_cache_holds_the_likeliest_tokens_and_the_mass_of_the_others(tmp_path):
    model = teacher()
    cache = build(tmp_path, model, temperature=2.0)
    expected = log_probs(model, TOKENS, 2.0)
    ids, found = cache.read(TOKENS)
    top, wanted = expected.topk(16)
    assert ids.dtype == torch.uint16 and torch.equal(ids.long(), wanted)
    assert found.dtype == torch.float16 and found.shape == (10, 8, 17)
    rest = expected.scatter(-1, wanted, -torch.inf).logsumexp(-1, keepdim=True)
    torch.testing.assert_close(found.float(), torch.cat([top, rest], -1), rtol=2**-11, atol=2e-7)
    assert (cache.top_k, cache.vocabulary, cache.samples, cache.length, cache.temperature) == (16, 128, 10, 9, 2.0)


def test_figures_say_what_is_left_out(tmp_path):
    model = teacher()
    cache = build(tmp_path, model)
    p = log_probs(model, TOKENS).exp().double()
    top = p.topk(16).values
    both = torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)
    entropy, known = (torch.special.entr(x).sum(-1).mean().item() for x in (p, both))
    wanted = {"outside": both[..., -1].mean().item(), "hidden": entropy - known, "entropy": entropy}
    assert cache.figures == pytest.approx(wanted, rel=1e-4) and 0.01 < cache.figures["outside"] < 0.9
    assert f"{cache.figures['outside']:.3%} of its probability" in cache.note()
    whole = build(tmp_path / "whole", model, top_k=128)
    assert (whole.figures["outside"], whole.figures["hidden"]) == (0, 0)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(40_000, torch.uint16), (70_000, torch.int32)], ids=str)
def test_ids_of_large_vocabularies(tmp_path, vocabulary, dtype):
    model = teacher(vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    tokens = token_ids(2, 6, vocabulary)
    ids, _ = build(tmp_path, model, tokens).read(tokens)
    expected = log_probs(model, tokens).topk(16).indices
    assert ids.dtype == dtype and torch.equal(ids.long(), expected) and expected.max() >= 2**15
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size - 2 * 5 * (16 * dtype.itemsize + 17 * 2) < 1000


def test_samples_are_found_in_any_order_and_batch_and_others_are_refused(tmp_path):
    cache = build(tmp_path)
    every = cache.read(TOKENS)
    order = [7, 0, 7, 3]
    assert all(torch.equal(some, all_[order]) for some, all_ in zip(cache.read(TOKENS[order]), every, strict=True))
    for wrong in (TOKENS + 1, TOKENS[:, :-1], TOKENS[:, 1:]):
        with pytest.raises(ValueError, match=r"built for 10 samples of 9 tokens, and sample 0 .* is not one of them"):
            cache.read(wrong)


def test_the_teacher_is_left_as_it_was(tmp_path):
    model = teacher(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    build(tmp_path, model)
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(TeacherCache(tmp_path).read(TOKENS)[0], build(tmp_path / "again", model.eval()).read(TOKENS)[0])


# --- shards


def shards(monkeypatch, samples):
    """Let a shard hold this many of `TOKENS`."""
    monkeypatch.setattr(teacher_shards, "SHARD_BYTES", samples * Layout(10, 9, 128, 16).bytes(1) + 5)


def test_shards_are_bounded_plain_safetensors(tmp_path, monkeypatch):
    one = build(tmp_path / "one").read(TOKENS)
    shards(monkeypatch, 4)
    cache = build(tmp_path / "three")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(cache.read(TOKENS), one, strict=True))
    files = sorted((tmp_path / "three").glob("shard-*"))
    assert [len(load_file(file)["digests"]) for file in files] == [4, 4, 2]
    assert torch.equal(torch.cat([load_file(file)["log_probs"] for file in files]), one[1])
    assert sorted(path.name for path in (tmp_path / "three").iterdir()) == [
        "cache.json",
        *(f"shard-0000{i}.safetensors" for i in range(3)),
    ]
    assert cache.bytes == sum(file.stat().st_size for file in files)


def test_a_stopped_build_goes_on_where_it_was(tmp_path, monkeypatch):
    shards(monkeypatch, 4)
    expected = build(tmp_path / "expected")
    stopped = asked(at=4)  # the vocabulary, the first shard (3 + 1 samples), in the middle of the second
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "stopped", stopped)
    with pytest.raises(ValueError, match="no finished teacher cache"):
        TeacherCache(tmp_path / "stopped")
    again = asked()
    cache = build(tmp_path / "stopped", again)
    assert again.batches == [(1, 2), (3, 9), (1, 9), (2, 9)]
    assert cache.digest == expected.digest and cache.figures == expected.figures
    for file in (tmp_path / "expected").iterdir():
        assert file.read_bytes() == (tmp_path / "stopped" / file.name).read_bytes()
    finished = asked()
    build(tmp_path / "stopped", finished)
    assert finished.batches == [(1, 2)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"top_k": 8}, "top_k: 16 there, 8 here"),
        ({"temperature": 2.0}, r"temperature: 1\.0 there, 2\.0 here"),
        ({"tokens": TOKENS.flip(0)}, "other tokens"),
        ({"model": teacher(1)}, "other teacher"),
    ],
    ids=["top_k", "temperature", "tokens", "teacher"],
)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "stopped"])
def test_another_cache_is_refused_by_what_differs(tmp_path, changes, says, finished):
    if finished:
        build(tmp_path)
    else:
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, asked(at=3))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"built for something else: .*{says}"):
        build(tmp_path, **changes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", ["truncated", "missing", "foreign"])
def test_a_damaged_shard_is_made_again(tmp_path, monkeypatch, damage, caplog):
    shards(monkeypatch, 4)
    expected = build(tmp_path / "cache").read(TOKENS)
    file = tmp_path / "cache" / "shard-00001.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "missing":
        file.unlink()
    else:
        build(tmp_path / "other", teacher(1))
        shutil.copy(tmp_path / "other" / file.name, file)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is missing or damaged"):
        TeacherCache(tmp_path / "cache")
    again = asked()
    with caplog.at_level(logging.WARNING, "optimum_slim.teacher_cache"):
        found = build(tmp_path / "cache", again).read(TOKENS)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert again.batches == [(1, 2), (3, 9), (1, 9)]
    assert ("is damaged or left over" in caplog.text) == (damage != "missing")


def test_without_its_record_a_cache_is_not_taken_for_another(tmp_path):
    build(tmp_path, teacher(1))
    (tmp_path / "cache.json").unlink()
    expected = build(tmp_path / "expected").read(TOKENS)
    assert all(torch.equal(a, b) for a, b in zip(build(tmp_path).read(TOKENS), expected, strict=True))
    text = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps(text | {"sha256": "0" * 64}))
    with pytest.raises(ValueError, match="no finished teacher cache"):
        TeacherCache(tmp_path)


def test_a_full_disk_is_noticed_before_the_teacher_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    again = asked()
    with pytest.raises(OSError, match=r"needs 5,\d+ bytes .* has 100 free; use a smaller top_k \(now 16\)"):
        build(tmp_path, again)
    assert again.batches == [(1, 2)] and not list(tmp_path.glob("shard*"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"top_k": 0}, "top_k must be a positive integer"),
        ({"top_k": 129}, "top_k=129 is more than the 128 tokens"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"tokens": TOKENS[0]}, "expected tokens as an int64 matrix"),
    ],
    ids=["none", "many", "temperature", "batch", "tokens"],
)
def test_settings_that_cannot_work_are_refused(tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        build(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_a_damaged_teacher_teaches_nothing(tmp_path):
    model = teacher()
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite"):
        build(tmp_path, model)
    assert not list(tmp_path.glob("shard*"))


SCRIPT = """
import os, sys
from test_teacher_cache import TOKENS, asked, build, teacher_shards

teacher_shards.SHARD_BYTES = 1500  # two samples
model, rank = asked(), os.environ["RANK"]
cache = build(sys.argv[1] if rank == "0" else "elsewhere", model)
print(len(model.batches), cache.read(TOKENS)[0].shape[0])
"""


@pytest.mark.slow
def test_two_processes_share_the_work_in_the_folder_of_the_first(tmp_path):
    """With the variables that `accelerate launch` and torchrun set; on a CPU only torchrun starts several."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    tests = Path(__file__).parent
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    common |= {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "cache")],
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    found = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], found
    assert [out.split() for out, _ in found] == [["4", "10"], ["3", "10"]]  # the vocabulary, and 3 or 2 of 5 shards
    assert not (tmp_path / "elsewhere").exists()
    one = build(tmp_path / "one").read(TOKENS)
    assert all(torch.equal(a, b) for a, b in zip(TeacherCache(tmp_path / "cache").read(TOKENS), one, strict=True))


# --- the loss


@pytest.mark.parametrize(("temperature", "kl_weight"), [(1.0, 1.0), (2.0, 0.6)], ids=["plain", "mixture"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_the_whole_vocabulary_it_is_distillation(tmp_path, monkeypatch, temperature, kl_weight, dtype):
    monkeypatch.setattr(losses, "ROWS", 3)  # 8 predictions a sample: two full chunks and one of two rows
    model, ids = teacher(), TOKENS[[4, 1]]
    cache = build(tmp_path, model, top_k=128, temperature=temperature)
    student = teacher(5).to(dtype)
    gradients = []
    for loss in (CachedDistillation(cache, kl_weight), Distillation(model, temperature, kl_weight)):
        value = loss(student, ids)
        value.backward()
        gradients.append((value.detach(), student.lm_head.weight.grad.float()))
        student.zero_grad()
    (ours, slope), (theirs, expected) = gradients
    assert ours.dtype == torch.float32 and ours.shape == ()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
    assert (slope - expected).norm() < (1e-3 if dtype == torch.float32 else 1e-2) * expected.norm()


def test_with_fewer_tokens_it_is_a_little_less(tmp_path):
    model, student = teacher(), teacher(5)
    whole = Distillation(model)(student, TOKENS)
    values = [CachedDistillation(build(tmp_path / str(k), model, top_k=k))(student, TOKENS) for k in (4, 32, 100)]
    assert values[0] < values[1] < values[2] < whole * 1.001
    assert values[2] > 0.9 * whole


def test_few_rows_at_a_time_are_fp32_in_loss_and_build(tmp_path, monkeypatch):
    model, tokens = tiny_llama(max_position_embeddings=512).to(torch.bfloat16), token_ids(4, 300)
    with Widest(128) as seen:
        cache = build(tmp_path, model, tokens, batch_size=2)
    assert seen.rows == losses.ROWS
    student = tiny_llama(1, max_position_embeddings=512).to(torch.bfloat16)
    with Widest(128) as seen:
        CachedDistillation(cache, 0.5)(student, tokens[:2])
    assert seen.rows == losses.ROWS


def test_losses_that_cannot_work_are_refused(tmp_path):
    cache = build(tmp_path)
    for kl_weight in (0.0, 1.5):
        with pytest.raises(ValueError, match="kl_weight must be above 0 and at most 1"):
            CachedDistillation(cache, kl_weight)
    with pytest.raises(ValueError, match="vocabulary of 128, the student one of 200"):
        CachedDistillation(cache)(tiny_llama(vocab_size=200), TOKENS)


# --- in fit

SETTINGS = {"steps": 6, "learning_rate": 1e-2, "batch_size": 4, "held_out": 0.2, "evaluate_every": 2}


def test_training_from_the_cache_is_training_from_the_teacher(tmp_path):
    model = teacher()
    ours, theirs = teacher(5), teacher(5)
    cached = CachedDistillation(build(tmp_path, model, top_k=128))
    first = fit(ours, TOKENS, cached, micro_batch_size=2, **SETTINGS)
    second = fit(theirs, TOKENS, Distillation(model), micro_batch_size=2, **SETTINGS)
    assert first.held_out_after < 0.9 * first.held_out_before
    assert first.held_out_after == pytest.approx(second.held_out_after, rel=1e-2)


def test_few_tokens_teach_as_well(tmp_path):
    model, student = teacher(), teacher(5)
    with torch.no_grad():
        before = Distillation(model)(student, TOKENS)
    fit(student, TOKENS, CachedDistillation(build(tmp_path, model, top_k=16)), **SETTINGS)
    with torch.no_grad():
        assert Distillation(model)(student, TOKENS) < 0.9 * before


def test_the_journal_notices_another_cache(tmp_path):
    first, second = (build(tmp_path / str(seed), teacher(seed)) for seed in (0, 1))
    third = build(tmp_path / "8", top_k=8)
    journal = tmp_path / "journal"
    fit(teacher(5), TOKENS, CachedDistillation(first), journal=journal, **SETTINGS)
    reopened = CachedDistillation(TeacherCache(tmp_path / "0"))
    assert fit(teacher(5), TOKENS, reopened, journal=journal, **SETTINGS).resumed_from == 6
    for cache, says in (
        (second, "run: other teacher cache"),
        (third, "top_k=16.* there, .*top_k=8.*; other teacher c"),
    ):
        with pytest.raises(ValueError, match=says):
            fit(teacher(5), TOKENS, CachedDistillation(cache), journal=journal, **SETTINGS)


def test_tokens_that_are_not_in_the_cache_are_refused_before_training(tmp_path):
    student = teacher(5)
    before = {name: p.clone() for name, p in student.named_parameters()}
    tokens = torch.cat([TOKENS, TOKENS[:1] + 1])
    with pytest.raises(ValueError, match=r"sample 10 of \(11, 9\) is not one of them"):
        fit(student, tokens, CachedDistillation(build(tmp_path)), **SETTINGS)
    assert all(torch.equal(before[name], p) for name, p in student.named_parameters())
