"""A run that is stopped anywhere goes on from there, and ends with the files of a run that was not."""

import errno
import json
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from test_stream import TERNARY, TOKENS, dense, timeless

from optimum_slim import Calibration, SparseGPT, checkpoint, slim, stream
from optimum_slim.checkpoint import Checkpoint, run_folder
from optimum_slim.journal import read_record, write_record


STEP = SparseGPT(asymmetric=0.25, allocation="owl", sparsity=0.6)
LAYERS = 3


class Stop(Exception):
    """Stands for a killed process: nothing of ours catches it."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint, and beside it the result of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("made")
    slim(dense(folder), STEP, data=TOKENS, out=folder / "whole")
    return folder


@pytest.fixture
def source(made, tmp_path):
    return Path(shutil.copytree(made / "dense", tmp_path / "dense"))


@pytest.fixture
def whole(made):
    return made / "whole"


@pytest.fixture
def packed(monkeypatch):
    """The names of the layers that were packed."""
    names, replace = [], SparseGPT.replace

    def named(self, model, name, *arguments):
        names.append(name)
        return replace(self, model, name, *arguments)

    monkeypatch.setattr(SparseGPT, "replace", named)
    return names


def go_on(source: Path, step=STEP, data=TOKENS, **more):
    return slim(source, step, data=data, out=source.parent / "out", **more)


def stop_after(monkeypatch, layers: int) -> None:
    """Let the next run stop once so many layers are finished."""
    keep, kept = Checkpoint.keep, []

    def stopping(self, *arguments):
        keep(self, *arguments)
        kept.append(arguments[0])
        if len(kept) == layers:
            raise Stop

    monkeypatch.setattr(Checkpoint, "keep", stopping)


def interrupted(source: Path, layers: int = 2) -> Path:
    """A run that stopped after so many layers; returns its folder."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, layers)
        with pytest.raises(Stop):
            go_on(source)
    return run_folder((source.parent / "out").resolve())


def assert_same_files(one: Path, other: Path) -> None:
    """Byte for byte, apart from the seconds in the report and the card."""
    assert {file.name for file in one.iterdir()} == {file.name for file in other.iterdir()}
    for file in one.iterdir():
        if file.name not in ("README.md", "slim_report.json"):
            assert file.read_bytes() == (other / file.name).read_bytes(), file.name
    assert timeless(one) == timeless(other)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_finished_layers_are_not_packed_again(source, whole, packed, layers):
    interrupted(source, layers)
    before = list(packed)
    assert {int(name.split(".")[2]) for name in before} == set(range(layers))
    packed.clear()
    go_on(source)
    assert {int(name.split(".")[2]) for name in packed} == set(range(layers, LAYERS))
    assert_same_files(whole, source.parent / "out")
    assert {path.name for path in source.parent.iterdir()} == {"dense", "out"}


STAGES = {
    "before a layer's file has its name": (checkpoint, "put_in_place"),
    "before a record is written": (checkpoint, "write_record"),
    "before the rest is written": (stream, "_write_rest"),
    "while the rest is written": (stream, "write_rest"),
    "before the result takes its place": (checkpoint, "take_place"),
    "after it took its place": (Checkpoint, "remove"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("calls", [1, 2, 4])
def test_stopped_at_every_stage(source, whole, monkeypatch, stage, calls):
    owner, name = STAGES[stage]
    original, count = getattr(owner, name), []

    def stopping(*arguments, **keywords):
        count.append(name)
        if len(count) == calls:
            raise Stop
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopping)
        try:
            go_on(source)
            assert len(count) < calls
        except Stop:
            go_on(source)
    assert_same_files(whole, source.parent / "out")
    assert not run_folder(source.parent / "out").exists()


def test_the_same_command_after_the_result_took_its_place(source, whole, packed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "remove", lambda self: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            go_on(source)
    packed.clear()
    report = go_on(source)
    assert packed == [] and len(report.steps[0].layers) == 7 * LAYERS
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        go_on(source)


DAMAGES = {
    "a flipped bit": lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("what", ["model/model-00002-of-00004.safetensors", "layer-00000.json"])
def test_a_damaged_layer_is_packed_again(source, whole, packed, what, damage):
    folder = interrupted(source)
    DAMAGES[damage](folder / what)
    packed.clear()
    go_on(source)
    assert {int(name.split(".")[2]) for name in packed} == {0, 2}
    assert_same_files(whole, source.parent / "out")


@pytest.mark.parametrize("damage", ["a flipped bit", "missing"])
@pytest.mark.parametrize("what", ["run.json", "allocation.json"])
def test_damaged_records_of_the_run_are_made_again(source, whole, what, damage):
    DAMAGES[damage](interrupted(source) / what)
    go_on(source)
    assert_same_files(whole, source.parent / "out")


def test_an_altered_record_is_damaged(tmp_path, caplog):
    write_record(tmp_path / "a.json", {"rows": [1.5, "x"]})
    assert read_record(tmp_path / "a.json") == {"rows": [1.5, "x"]}
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(text.replace("1.5", "2.5"))
    assert read_record(tmp_path / "a.json") is None
    assert "a.json is damaged" in caplog.text
    (tmp_path / "a.json").write_text("[]")
    assert read_record(tmp_path / "a.json") is None
    assert read_record(tmp_path / "b.json") is None


def other_weights(source: Path) -> dict:
    file = source / "model-00003-of-00008.safetensors"
    file = file if file.is_file() else sorted(source.glob("*.safetensors"))[2]
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    return {}


def other_config(source: Path) -> dict:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    return {}


CHANGES = {
    "recipe": (lambda source: {"step": SparseGPT(sparsity=0.5)}, "sparsegpt sparsity: 0.6 there, 0.5 here"),
    "step": (lambda source: {"step": TERNARY}, "step: sparsegpt there, pt2llm here"),
    "weights": (other_weights, "other model"),
    "config": (other_config, "other model"),
    "tokens": (lambda source: {"data": TOKENS.flip(0)}, "other calibration tokens"),
    "fewer tokens": (lambda source: {"data": TOKENS[:5]}, "calibration samples: 11 there, 5 here"),
    "own samples": (lambda source: {"data": Calibration(samples=2, length=8)}, "other calibration tokens"),
    "dtype": (lambda source: {"dtype": "float32"}, "dtype: torch.bfloat16 there, torch.float32 here"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_refused_or_starts_over(source, name):
    change, message = CHANGES[name]
    folder = interrupted(source)
    there = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    changed = change(source)
    with pytest.raises(ValueError, match=message) as error:
        go_on(source, **changed)
    assert "Run it as before to finish it, or pass restart=True (--restart)" in str(error.value)
    assert there == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    go_on(source, **changed, restart=True)
    data = changed.get("data", TOKENS)
    slim(source, changed.get("step", STEP), data=data, out=source.parent / "new", dtype=changed.get("dtype", "auto"))
    assert_same_files(source.parent / "new", source.parent / "out")


def test_other_threads_are_another_run(source):
    interrupted(source)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with pytest.raises(ValueError, match=f"threads: {threads} there, {threads + 1} here"):
            go_on(source)
    finally:
        torch.set_num_threads(threads)
    go_on(source)


def test_two_processes_do_not_work_on_one_target(source, monkeypatch):
    begin = Checkpoint.begin

    def second(self, fingerprint):
        monkeypatch.setattr(Checkpoint, "begin", begin)
        with pytest.raises(OSError, match=r"another process is working on .*\.out\.slim-run"):
            go_on(source)
        begin(self, fingerprint)

    monkeypatch.setattr(Checkpoint, "begin", second)
    go_on(source)


def test_own_samples_are_kept_in_the_run(source, monkeypatch):
    data = Calibration(samples=3, length=12)
    slim(source, TERNARY, data=data, out=source.parent / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stop):
            go_on(source, TERNARY, data)
    monkeypatch.setattr(
        "optimum_slim.calibration.cached_samples", lambda *args, **kwargs: pytest.fail("sampled again")
    )
    go_on(source, TERNARY, data)
    assert_same_files(source.parent / "whole", source.parent / "out")


def test_a_full_disk_keeps_what_is_finished(source, whole, packed, monkeypatch):
    save_file, calls = checkpoint.save_file, []

    def full(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match=r"needs [\d,]+ bytes .* the layers finished are kept in") as error:
            go_on(source)
    assert error.value.errno == errno.ENOSPC
    packed.clear()
    go_on(source)
    assert {int(name.split(".")[2]) for name in packed} == {1, 2}
    assert_same_files(whole, source.parent / "out")


def test_too_small_a_disk_is_told_before_anything_is_packed(source, packed, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(OSError, match=r"nothing was written\. Free some space"):
        go_on(source)
    assert packed == [] and [path.name for path in source.parent.iterdir()] == ["dense"]


RUN = """
    import sys, time, torch
    from optimum_slim import PT2LLM, slim
    torch.set_num_threads(1)
    tokens = torch.randint(1, 97, (11, 17), generator=torch.Generator().manual_seed(1))
    print("here we go", flush=True)
    start = time.monotonic()
    slim(sys.argv[1], PT2LLM(group_size=16), data=tokens, out=sys.argv[2])
    print(time.monotonic() - start)
"""


def started(source: Path, out: Path) -> subprocess.Popen:
    """A process that is about to slim `source`."""
    words = [sys.executable, "-c", textwrap.dedent(RUN), str(source), str(out)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here we go\n"
    return process


@pytest.mark.slow
def test_killed_at_random(tmp_path):
    source = dense(tmp_path, num_hidden_layers=8, intermediate_size=160)
    whole, out = tmp_path / "whole", tmp_path / "out"
    seconds = float(started(source, whole).communicate()[0])
    chance, kills = random.Random(0), 0
    while run_folder(out).exists() or not out.exists():
        process = started(source, out)
        if kills < 5:
            time.sleep(chance.uniform(0, seconds / 2))
            process.kill()
            kills += 1
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
    assert kills >= 2
    assert_same_files(whole, out)
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "whole", "out"}
