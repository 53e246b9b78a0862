"""Save a slimmed model as one finished folder, or push it to the Hub.

`model.save_pretrained` works too. `save` adds the tokenizer, the model card and the report, and is all or nothing:
files are written to a hidden folder beside the target, which takes the target's name when it is complete.
"""

import dataclasses
import errno
import importlib.util
import shutil
import tempfile
import uuid
from pathlib import Path

from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import nn

from .card import model_card
from .distance import distance_rows
from .figures import draw_distances, draw_shapes
from .processes import in_main
from .report import Report, as_dict, megabytes
from .stored import stored_bits


SPARE_BYTES = 32 * 2**20  # tokenizer, card, report and file headers
REPORT_FILE = "slim_report.json"


def save(
    model,
    out_dir: str | Path,
    *,
    tokenizer=None,
    report: Report | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    repo_id: str | None = None,
    save_format: str | None = None,
    file_type: str | None = None,
) -> Path:
    """Write model, generation config, tokenizer, model card and report to `out_dir`, all or nothing.

    A model with a PEFT adapter is saved as both: the base in `out_dir`, the adapter in `out_dir/adapter`. A model
    without a name (it lost layers in memory) is called after the folder, or `repo_id`, from then on. Of several
    processes the main one writes, and the others that call this wait for it.

    Args:
        model: a model of Transformers, slimmed or not.
        out_dir: folder to create; it may exist if it is empty.
        tokenizer: saved beside the model.
        report: goes into the card and `slim_report.json`; by default the report of the run that made the model.
        max_shard_size: as in `save_pretrained`.
        overwrite: replace an existing folder, once the new one is complete.
        repo_id: name by which the card's example loads the model.
        save_format: `"gguf"` writes the model and its tokenizer as one GGUF file for llama.cpp, `"bitnet"` as a
            checkpoint of Transformers' own `bitnet` format; by default the format of the model's config.
        file_type: with `"gguf"`, what matrices become, as for `export_gguf`.

    Returns:
        The absolute path of the folder.

    Raises:
        ValueError: the model cannot be written in that format; says why.
        FileExistsError: `out_dir` is a file, or a folder with something in it and `overwrite` is not set.
        OSError: the disk is full (before or while writing); says how many bytes are needed and free.
    """
    given = (model, out_dir, tokenizer, report, max_shard_size, overwrite, repo_id, save_format, file_type)
    out = Path(in_main(f"saving to {Path(out_dir).expanduser().resolve()}", lambda: str(_save(*given))))
    if save_format != "gguf":
        model.name_or_path = model.name_or_path or str(repo_id or out)
        model.config._name_or_path = model.name_or_path
    return out


def _save(model, out_dir, tokenizer, report, max_shard_size, overwrite: bool, repo_id, save_format, file_type) -> Path:
    out = check_target(out_dir, overwrite=overwrite)
    if save_format not in (None, "slim", "bitnet", "gguf"):
        raise ValueError(f"save_format must be 'slim', 'bitnet' or 'gguf', found {save_format!r}")
    if file_type is not None and save_format != "gguf":
        raise ValueError(f"file_type={file_type!r} is for save_format='gguf'")
    out.parent.mkdir(parents=True, exist_ok=True)
    needed = stored_bytes(model) + SPARE_BYTES
    if shutil.disk_usage(out.parent).free < needed:
        raise disk_full(out.parent, needed)
    partial = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir()
    try:
        name = str(repo_id or out)
        if save_format == "gguf":
            _write_gguf(model, partial, tokenizer, report, file_type, repo_id, name)
        else:
            written = _in_format(model, save_format)
            _write(written, partial, tokenizer, report, max_shard_size, repo_id, name)
        take_place(partial, out)
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        raise disk_full(out.parent, needed) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def check_target(out_dir: str | Path, *, overwrite: bool = False) -> Path:
    """The absolute path of `out_dir` if `save` may write there; raises `FileExistsError` otherwise."""
    out = Path(out_dir).expanduser().resolve()
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out_dir} is a file, not a folder; choose another name to save the model to")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{out_dir} exists and is not empty; choose another folder, or ask for it to be overwritten"
        )
    return out


def push_to_hub(
    model,
    repo_id: str,
    *,
    tokenizer=None,
    report: Report | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a model slimmed with optimum-slim",
    max_shard_size: int | str | None = None,
) -> str:
    """Upload what `save` writes to the Hub repository `repo_id`, creating it if need be.

    Unlike `model.push_to_hub`, this keeps our model card, which tells users to `import optimum_slim`.

    Returns:
        The URL of the commit, in several processes that of the main one.
    """

    def push() -> str:
        api = HfApi(token=token)
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            words = {"tokenizer": tokenizer, "report": report, "max_shard_size": max_shard_size, "repo_id": name}
            out = save(model, Path(folder) / "model", **words)
            return api.upload_folder(repo_id=name, folder_path=out, commit_message=commit_message).commit_url

    return in_main(f"pushing to {repo_id}", push)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the tensors in the model's state dict, tied ones once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.numel()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_report(model, folder: str | Path, report: Report | None = None, *, repo_id: str | None = None) -> None:
    """Write (again) the model card and `slim_report.json` of `model` into a folder that `save` made."""
    report = report or getattr(model, "slim_report", None)
    if report is not None:
        report.save(Path(folder) / REPORT_FILE)
    pictures = _draw(report, Path(folder))
    model_card(model, report, repo_id=repo_id, pictures=pictures).save(Path(folder) / "README.md")


def _draw(report: Report | None, folder: Path) -> list[str]:
    """Draw what the report has a picture for into `folder`, where matplotlib is installed; returns the file names."""
    tables = [as_dict(step).get("tables", {}) for step in report.steps] if report is not None else []
    found = {name: table[name] for table in tables for name in ("angular_distance", "shapes") if name in table}
    if not found or importlib.util.find_spec("matplotlib") is None:
        return []
    name = report.model or "model"
    if "angular_distance" in found:
        title = f"{name}: angular distance of blocks of layers"
        draw_distances(*distance_rows(found["angular_distance"]), title, folder / "angular_distance.png")
    if "shapes" in found:
        draw_shapes(found["shapes"], f"{name}: shapes of about the same size", folder / "shapes.png")
    return [f"{name}.png" for name in found]


def _write(model, folder: Path, tokenizer, report: Report | None, max_shard_size, repo_id: str | None, name) -> None:
    shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    if getattr(model, "_hf_peft_config_loaded", False):
        _save_with_adapter(model, folder, name, shards)
    else:
        model.save_pretrained(folder, **shards)
    write_rest(model, folder, tokenizer, report, repo_id=repo_id)


def _in_format(model, save_format: str | None):
    """The model, or one that shares its weights, as it is to be saved."""
    if save_format != "bitnet":
        return model
    from .stock_bitnet import stock_bitnet

    return stock_bitnet(model)


def _write_gguf(model, folder: Path, tokenizer, report: Report | None, file_type, repo_id, name: str) -> None:
    """Write the model and its tokenizer as one GGUF file, which bears the type of most matrices in its name."""
    from .gguf_export import export_gguf

    stem = Path(name).name
    written = export_gguf(model, folder / f"{stem}.gguf", tokenizer=tokenizer, file_type=file_type)
    file = written.path.rename(folder / f"{stem}-{written.main_type}.gguf")
    report = report or getattr(model, "slim_report", None)
    types = ", ".join(f"{count} tensors {kind}" for kind, count in sorted(written.types.items()))
    if report is not None:
        remark = f"{file.name}: {megabytes(written.bytes)}, {types}"
        report = dataclasses.replace(report, notes=[*report.notes, remark])
        report.save(folder / REPORT_FILE)
    pictures = _draw(report, folder)
    card = model_card(model, report, repo_id=repo_id, pictures=pictures, gguf_file=file.name)
    card.save(folder / "README.md")


def write_rest(
    model, folder: Path, tokenizer=None, report: Report | None = None, *, repo_id: str | None = None
) -> None:
    """Write what belongs beside the weights and the config in `folder`: tokenizer, report and model card."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    report = report or getattr(model, "slim_report", None)
    bits = stored_bits(folder)
    if report is not None and bits.packed is not None:
        report.note(
            f"on disk {megabytes(bits.dense_bytes)} of {megabytes(bits.dense_bytes + bits.packed_bytes)} stay dense "
            f"(embeddings, output head, norms, biases); packed layers take {bits.packed:.3f} stored bits per weight"
        )
    write_report(model, folder, report, repo_id=repo_id)
    mode = folder.stat().st_mode & 0o666  # safetensors makes its files private whatever the umask says
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _save_with_adapter(model, folder: Path, name: str, shards: dict) -> None:
    """Save the base model to `folder` and its PEFT adapter, which refers to it as `name`, to `folder/adapter`.

    `save_pretrained` alone would write the adapter and lose a base that exists in memory only.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = {key: module for key, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    model._hf_peft_config_loaded = False
    try:
        for key, layer in wrapped.items():
            model.set_submodule(key, layer.get_base_layer())
        model.save_pretrained(folder, **shards)
    finally:
        for key, layer in wrapped.items():
            model.set_submodule(key, layer)
        model._hf_peft_config_loaded = True
    for config in model.peft_config.values():
        config.base_model_name_or_path = name
    model.save_pretrained(folder / "adapter")


def take_place(partial: Path, out: Path) -> None:
    """Rename the finished folder; an existing one steps aside first and comes back if the rename fails."""
    if not out.exists():
        partial.rename(out)
        return
    aside = partial.with_suffix(".old")
    out.rename(aside)
    try:
        partial.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def is_disk_full(error: OSError | SafetensorError) -> bool:
    """Whether the disk being full is what went wrong."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


def disk_full(folder: Path, needed: int, kept: str = "nothing was written") -> OSError:
    """The error to raise when `needed` bytes do not fit on the disk of `folder`; `kept` says what is there now."""
    free = shutil.disk_usage(folder).free
    return OSError(
        errno.ENOSPC,
        f"the model needs {needed:,} bytes ({megabytes(needed)}) and the disk of {folder} has {free:,} free "
        f"({megabytes(free)}); {kept}. Free some space or choose another folder",
    )
