"""save and push_to_hub: complete or not there at all."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hub_stand_in import serve
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_slim import BitNet, saving, slim
from optimum_slim.saving import push_to_hub, save, stored_bytes


def tiny_model(**changes):
    torch.manual_seed(0)
    fields = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**fields, num_attention_heads=2, num_key_value_heads=2, **changes)).eval()


@pytest.fixture
def model():
    model = tiny_model()
    slim(model, BitNet(force=True))
    return model


class FakeTokenizer:
    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")


def test_the_folder_holds_everything_and_loads_bit_for_bit(model, tmp_path):
    out = save(model, tmp_path / "new" / "slim", tokenizer=FakeTokenizer())
    assert {file.name for file in out.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "slim_report.json",
        "tokenizer.json",
    }
    assert [file.name for file in out.parent.iterdir()] == ["slim"]
    assert "import optimum_slim" in (out / "README.md").read_text()
    assert json.loads((out / "slim_report.json").read_text())["steps"][0]["step"]["step"] == "bitnet"
    again = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(10)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_no_local_path_is_written(model, tmp_path):
    source = tmp_path / "private" / "source"
    tiny_model().save_pretrained(source)
    loaded = AutoModelForCausalLM.from_pretrained(source)
    slim(loaded, BitNet(force=True))
    out = save(loaded, tmp_path / "slim")
    for file in out.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_files_follow_the_umask(model, tmp_path):
    before = os.umask(0o022)
    try:
        out = save(model, tmp_path / "slim")
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in out.iterdir()} == {"0o644"}
    assert oct(out.stat().st_mode & 0o777) == "0o755"


def test_shards(model, tmp_path):
    out = save(model, tmp_path / "slim", max_shard_size=6_000)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out).lm_head.weight, model.lm_head.weight)


def test_an_existing_folder_is_refused_or_replaced(model, tmp_path):
    out = tmp_path / "slim"
    out.mkdir()
    save(model, out)  # an empty folder is as good as none
    (out / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        save(model, out)
    assert (out / "mine.txt").read_text() == "keep"
    save(model, out, overwrite=True)
    assert not (out / "mine.txt").exists() and (out / "config.json").is_file()
    assert [file.name for file in tmp_path.iterdir()] == ["slim"]


def test_a_file_is_not_a_folder(model, tmp_path):
    (tmp_path / "slim").write_text("")
    with pytest.raises(FileExistsError, match="is a file, not a folder"):
        save(model, tmp_path / "slim", overwrite=True)


FAILURES = {
    "disk full": (OSError(errno.ENOSPC, "No space left on device"), OSError),
    "disk full in safetensors": (SafetensorError("I/O error: No space left on device (os error 28)"), OSError),
    "interrupted": (KeyboardInterrupt(), KeyboardInterrupt),
    "no permission": (PermissionError(errno.EACCES, "Permission denied"), PermissionError),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_while_writing_leaves_nothing_and_touches_nothing(model, tmp_path, monkeypatch, name):
    error, expected = FAILURES[name]
    out = tmp_path / "slim"
    out.mkdir()
    (out / "old.txt").write_text("old")

    def fail(self, folder, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
    with pytest.raises(expected) as raised:
        save(model, out, overwrite=True)
    assert [file.name for file in tmp_path.rglob("*")] == ["slim", "old.txt"]
    if "disk full" in name:
        assert raised.value.errno == errno.ENOSPC
        assert f"{stored_bytes(model) + saving.SPARE_BYTES:,} bytes" in str(raised.value)


def test_a_failed_rename_brings_the_old_folder_back(model, tmp_path, monkeypatch):
    out = save(model, tmp_path / "slim")
    (out / "old.txt").write_text("old")
    rename = Path.rename

    def fail_once(self, target):
        if self.name.endswith(".partial"):
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(PermissionError):
        save(model, out, overwrite=True)
    assert (out / "old.txt").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["slim"]


def test_a_full_disk_is_seen_before_writing(model, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10_000, 9_000, 1_000)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", lambda *args, **kwargs: pytest.fail("it wrote"))
    with pytest.raises(OSError, match=r"needs [\d,]+ bytes .* has 1,000 free .*nothing was written"):
        save(model, tmp_path / "slim")
    assert list(tmp_path.iterdir()) == []


def test_stored_bytes_counts_ties_once():
    tied = tiny_model(tie_word_embeddings=True)
    assert stored_bytes(tied) == 4 * sum(parameter.numel() for parameter in tied.parameters())


PUSH = """
    import json, sys
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from optimum_slim import BitNet, push_to_hub, slim

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)
    model = LlamaForCausalLM(config).eval()
    slim(model, BitNet(force=True))
    print(push_to_hub(model, "someone/slim-tiny", private=True, commit_message="first"))
    push_to_hub(model, "someone/slim-tiny")
    again = AutoModelForCausalLM.from_pretrained("someone/slim-tiny")
    ids = torch.arange(10)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
"""


def test_push_to_hub_uploads_the_folder_with_our_card(tmp_path):
    with serve() as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_fake",
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PUSH)], env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{hub.url}/someone/slim-tiny/commit/" in done.stdout
    assert hub.created == {"someone/slim-tiny": True}
    assert hub.messages[0] == "first"
    files = hub.files["someone/slim-tiny"]
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "slim_report.json"} <= set(
        files
    )
    card = files["README.md"].decode()
    assert "import optimum_slim" in card and 'from_pretrained("someone/slim-tiny")' in card
    assert json.loads(files["config.json"])["quantization_config"]["quant_method"] == "slim"
    (tmp_path / "model.safetensors").write_bytes(files["model.safetensors"])
    weight = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype == torch.uint8 and weight.shape == (10, 32)


def test_push_to_hub_is_public():
    import optimum_slim

    assert optimum_slim.push_to_hub is push_to_hub
