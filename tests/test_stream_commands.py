"""The shell streams what can be streamed, says so, and goes on after an interruption."""

import pytest
import torch
from test_checkpoint import assert_same_files
from test_stream import dense, tensors
from transformers import AutoModelForCausalLM, LlamaConfig

from optimum_slim import Calibration, SlimConfig
from optimum_slim.checkpoint import Checkpoint, run_folder
from optimum_slim.cli import main
from optimum_slim.packed import model_bytes
from optimum_slim.plan import WORK_COPIES, plan
from optimum_slim.states import STATES_LIMIT
from optimum_slim.stream import streams


STEP = ["--step", "sparsegpt", "--calibration", "model", "samples=4", "length=12"]


@pytest.fixture
def source(tmp_path):
    return dense(tmp_path)


def interrupt(monkeypatch, error) -> None:
    """Let a run stop when its second layer is finished."""
    keep = Checkpoint.keep

    def stopping(self, index, *arguments):
        keep(self, index, *arguments)
        if index == 1:
            monkeypatch.undo()
            raise error

    monkeypatch.setattr(Checkpoint, "keep", stopping)


def test_an_interrupted_run_says_how_to_go_on_and_does(source, tmp_path, monkeypatch, capsys):
    words = ["run", str(source), str(tmp_path / "slim"), *STEP]
    assert main(["run", str(source), str(tmp_path / "whole"), *STEP]) == 0
    assert "streamed: one decoder layer at a time" in capsys.readouterr().out
    interrupt(monkeypatch, KeyboardInterrupt())
    assert main(words) == 130
    error = capsys.readouterr().err
    assert "interrupted" in error and "the same command goes on from there, --restart starts over" in error
    assert str(run_folder(tmp_path / "slim")) in error
    assert main([*words[:4], "sparsegpt", "bits=4", *STEP[2:]]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "sparsegpt bits: None there, 4 here" in error
    assert main(words) == 0
    assert_same_files(tmp_path / "whole", tmp_path / "slim")


def test_an_error_says_how_to_go_on_and_restart_starts_over(source, tmp_path, monkeypatch, capsys):
    words = ["run", str(source), str(tmp_path / "slim"), *STEP]
    interrupt(monkeypatch, ValueError("something"))
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1] == "error: something" and "the same command goes on" in lines[-2]
    kept, keep = [], Checkpoint.keep

    def counted(self, index, *arguments):
        kept.append(index)
        keep(self, index, *arguments)

    monkeypatch.setattr(Checkpoint, "keep", counted)
    assert main([*words, "--restart"]) == 0
    assert kept == [0, 1, 2]


def test_a_run_killed_after_its_result_took_its_place_ends_well(source, tmp_path, monkeypatch, capsys):
    words = ["run", str(source), str(tmp_path / "slim"), *STEP]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "remove", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(words) == 130
    assert main(words) == 0
    assert not run_folder(tmp_path / "slim").exists()
    assert main(words) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_other_recipes_say_why_not(source, tmp_path, capsys):
    words = ["--step", "depth", "drop=1", "metric=deepest", "--step", "bitnet", "force=true"]
    assert main(["run", str(source), str(tmp_path / "slim"), *words]) == 0
    printed = capsys.readouterr().out
    assert "this run needed the whole model in memory: only one step that packs" in printed
    assert "streamed" not in printed.replace("can be streamed", "")


def test_streamed_or_not_the_shell_gives_the_same(source, tmp_path):
    step = {"step": "bitnet", "force": True}
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=SlimConfig([step]))
    model.save_pretrained(tmp_path / "on_load")
    assert main(["run", str(source), str(tmp_path / "slim"), "--step", "bitnet", "force=true"]) == 0
    one, other = tensors(tmp_path / "on_load"), tensors(tmp_path / "slim")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "on_load" / "config.json").read_bytes() == (tmp_path / "slim" / "config.json").read_bytes()


HIDDEN, FFN, VOCABULARY = 64, 96, 128
LINEARS = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN


def laid_out(step: dict, streamed: bool = True, samples: int = 10):
    shape = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_hidden_layers=5), dtype=torch.bfloat16)
    total = model_bytes(model)
    config = SlimConfig([step], calibration=Calibration(samples=samples, length=20))
    assert streams(config)
    return plan(model, config, streamed=streamed), total


def test_the_plan_counts_what_a_streamed_run_holds():
    skeleton, layer = 2 * (2 * HIDDEN * VOCABULARY + HIDDEN), 2 * (LINEARS + 2 * HIDDEN)
    work = WORK_COPIES * 4 * HIDDEN * FFN
    found, total = laid_out({"step": "bitnet", "force": True})
    assert skeleton + 5 * layer == total
    assert found.peak_memory == skeleton + 2 * layer + work
    found, _ = laid_out({"step": "sparsegpt", "asymmetric": 0.0})
    assert found.peak_memory == skeleton + 2 * layer + work + 200 * HIDDEN * 2 + 4 * FFN**2
    assert "hidden states of 200 calibration tokens" in found.peak_memory_of
    assert any("maps all its files" in note for note in found.notes)
    twice, _ = laid_out({"step": "sparsegpt", "asymmetric": 0.25})
    assert twice.peak_memory == found.peak_memory + 200 * HIDDEN * 2 + 4 * FFN**2
    many, _ = laid_out({"step": "sparsegpt", "asymmetric": 0.0}, samples=10**6)
    assert many.peak_memory == skeleton + 2 * layer + work + STATES_LIMIT + 4 * FFN**2


def test_the_plan_of_a_run_in_memory_is_another():
    streamed, total = laid_out({"step": "sparsegpt"})
    whole, _ = laid_out({"step": "sparsegpt"}, streamed=False)
    assert whole.peak_memory >= total and "dense weights" in whole.peak_memory_of
    assert "decoder layers are read, packed and written one at a time" in streamed.peak_memory_of


def test_dry_run_plans_a_streamed_run(source, tmp_path, capsys):
    assert main(["run", str(source), str(tmp_path / "slim"), *STEP, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "embeddings and head, two decoder layers, hidden states of 48 calibration tokens" in printed
    words = ["--step", "depth", "drop=1", "metric=deepest", "--dry-run"]
    assert main(["run", str(source), str(tmp_path / "slim"), *words]) == 0
    assert "two decoder layers" not in capsys.readouterr().out
