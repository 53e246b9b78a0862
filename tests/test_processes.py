"""Two processes over gloo against one: training data-parallel and sharded, importance, recipes, saving; and a kill."""

import functools
import signal

import process_cases as cases
import pytest
import torch
from helpers import tiny_llama
from launching import run_in_two, start
from process_cases import TOKENS, TRAINED, same

from optimum_slim.batches import draw
from optimum_slim.train import next_token_loss


pytestmark = pytest.mark.slow

# Rounding in 16 bits depends on which samples are in a batch, and so does dropout on the process:
CLOSE = {"lora": 2e-3, "in_bf16": 4e-3}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the cases returned in either process."""
    folder = tmp_path_factory.mktemp("processes")
    run_in_two("process_cases.py", folder, *(name for name in cases.CASES if name != "killable"))
    both = [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
    failed = [text for found in both for text in found.values() if isinstance(text, str) and "Traceback" in text]
    assert not failed, failed[0]
    return both


@pytest.fixture(scope="module")
def one():
    """What a case returns in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield functools.cache(lambda name: cases.CASES[name]())
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["data-parallel", "sharded"])
@pytest.mark.parametrize("name", [function.__name__ for function in TRAINED])
def test_two_processes_train_the_same_model_as_one(name, kind, results, one):
    ours, others = (found[name if kind == "data-parallel" else f"{name}_sharded"] for found in results)
    theirs, close = one(name), CLOSE.get(name, 1e-5)
    assert ours["history"] == others["history"] and same(ours["values"], others["values"])
    assert list(ours["values"]) == list(theirs["values"])
    for key, value in theirs["values"].items():
        torch.testing.assert_close(ours["values"][key], value, rtol=1e-4, atol=close)
    for key in ("step", "loss", "held_out", "learning_rate"):
        ours_, theirs_ = ([row[key] for row in found["history"] if row[key] is not None] for found in (ours, theirs))
        assert ours_ == pytest.approx(theirs_, rel=max(1e-4, close))
    held_out = [row["held_out"] for row in theirs["history"]]
    assert held_out[0] is None or min(held_out) < held_out[0]


def test_layers_that_one_process_skips_whole_hold_up_no_process(results):
    for found in results:
        plain, sharded = found["skipping"], found["skipping_sharded"]
        assert same(plain["values"], results[0]["skipping"]["values"])
        for key, value in plain["values"].items():
            torch.testing.assert_close(sharded["values"][key], value, rtol=1e-4, atol=1e-5)
        held_out = [row["held_out"] for row in plain["history"]]
        assert held_out[-1] < held_out[0]


def test_parameters_gradients_and_moments_are_cut_in_halves(results):
    first, second = (found["shards"] for found in results)
    assert first["uncut"] == second["uncut"] == 0
    for key, times in (("parameters", 1), ("gradients", 1), ("moments", 2)):
        assert first[key] + second[key] == times * first["whole"]
        assert first[key] == pytest.approx(second[key], rel=0.01)


def test_a_sharded_run_that_was_stopped_goes_on_and_ends_with_the_same_bits(results):
    for found in results:
        whole, resumed, again = found["resumed"]
        assert (resumed[2], again[2]) == (6, 9)
        for run in (resumed, again):
            assert same(run[0], whole[0]) and run[1] == whole[1]


def test_nan_leaves_the_best_parameters_in_both(results, one):
    held, _ = draw(20, 0.2, 6, 4, 0)
    for found in results:
        message, weights, journal = found["not_a_number"]
        assert "the training loss is nan at step 4 of 6; lower learning_rate" in message and not journal
        model = tiny_llama()
        model.load_state_dict(weights)
        best = float(next_token_loss(model, TOKENS[held]).detach())
        assert best == pytest.approx(one("next_token")["history"][1]["held_out"], rel=1e-4)


def test_fsdp1_is_refused_with_the_setting_to_change(results):
    assert all("set fsdp_version: 2" in found["fsdp1"] for found in results)


def test_what_is_measured_in_shares_is_what_one_process_measures(results, one):
    ours, others = (found["measured"] for found in results)
    assert same(ours, others)
    for key, value in one("measured").items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_the_main_process_saves_and_the_other_waits(results):
    (first, *_, ours), (second, name, written, theirs) = (found["saved"] for found in results)
    assert first == second == name and "model.safetensors" in written
    assert ours.startswith("FileExistsError") and "failed in the main process" in theirs


def test_different_weights_and_files_are_refused(results):
    for found in results:
        weights, files = found["refused"]
        assert "hold different weights" in weights and "one of 2" in files


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_started_again_ends_with_the_same_bits(tmp_path, one):
    for kill_at, ended in (("10", -signal.SIGKILL), ("-1", 0)):  # call 10: step 5, after the second entry
        process = start("process_cases.py", tmp_path, "killable", KILL_AT=kill_at)
        assert process.wait(600) == ended, process.stderr.read()
    whole, resumed = one("killable"), torch.load(tmp_path / "0.pt")["killable"]
    assert (whole[2], resumed[2]) == (None, 4)
    assert same(resumed[0], whole[0]) and resumed[1] == whole[1]
