"""What the commands of the shell do; their words are in cli.py, which loads without torch."""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM

from .checkpoint import run_folder
from .config import SlimConfig, as_calibration
from .evaluate import evaluate, tokenize
from .figures import check_matplotlib
from .inspection import inspect
from .loading import load_model, load_tokenizer
from .plain_yaml import load_yaml
from .plan import plan
from .recipe import journal_folder, slim
from .report import Report, megabytes
from .saving import check_target, save, write_report
from .step import STEPS, step_from_dict
from .stream import dense_config, slim_files, streams


def run_command(args: argparse.Namespace) -> None:
    """Slim MODEL and save it to OUT, or print the plan of it."""
    config = _config(args)
    if args.dry_run:
        return _dry_run(args, config)
    if not run_folder(Path(args.out).expanduser().resolve()).is_dir():  # of a run to go on with, which checks itself
        check_target(args.out, overwrite=args.overwrite)
    if args.report and Path(args.report).suffix.lower() not in (".json", ".csv", ".md"):
        raise ValueError(f"A report cannot be written to {args.report!r}: end the name in .json, .csv, .md.")
    if args.evaluate and not Path(args.evaluate).is_file():
        raise FileNotFoundError(f"--evaluate: no such text file: {args.evaluate}")
    evaluation = {"before": _evaluate_apart(args, args.model, args.gguf_file)} if args.evaluate else {}
    config.tokenizer = tokenizer = load_tokenizer(args.model, **_loaded_as(args))
    if tokenizer is None:
        print(f"{args.model} holds no tokenizer; none is used or saved", file=sys.stderr)
    try:
        model = _slimmed(args, config)
    except BaseException:
        _say_how_to_go_on(args)
        raise
    report, out = model.slim_report, Path(args.out).expanduser().resolve()
    if args.evaluate:
        report.evaluation = evaluation | {"after": _evaluate_apart(args, out, None)}
        write_report(model, out)
    report.show()
    if args.report:
        report.save(args.report)
    if any(parameter.is_meta for parameter in model.parameters()):
        print("streamed: one decoder layer at a time was read, packed and written")
    print(f"saved to {out}")


def inspect_command(args: argparse.Namespace) -> None:
    """Draw which layers of MODEL do little, and the perplexity without them."""
    check_matplotlib()
    check_target(args.out, overwrite=args.overwrite)
    if args.text and not Path(args.text).is_file():
        raise FileNotFoundError(f"--text: no such text file: {args.text}")
    if args.heal is not None and not args.text:
        raise ValueError("--heal is shown by the perplexity, which needs a text; add --text FILE")
    heal = None if args.heal is None else step_from_dict({"step": "heal", **_fields(args.heal)})
    shapes = None if args.shapes is None else step_from_dict({"step": "minitron", **_fields(args.shapes)})
    calibration = as_calibration(_calibration(args.calibration) if args.calibration else None)
    calibration.check()
    tokenizer = load_tokenizer(args.model, **_loaded_as(args))
    model = load_model(args.model, dtype=args.dtype, **_loaded_as(args)).eval()
    tokens = calibration.tokens(model, tokenizer)
    journal = None if shapes is None else journal_folder(model, [shapes], calibration)
    source = "the model's own text" if calibration.source == "model" else Path(str(calibration.source)).name
    inspection = inspect(
        model,
        tokens,
        drops=args.drop,
        metric=args.metric,
        heal=heal,
        heal_tokens=heal.calibration(calibration).tokens(model, tokenizer) if heal else None,
        text_ids=tokenize(args.text, tokenizer) if args.text else None,
        window=args.window,
        max_windows=args.max_windows,
        widths=args.widths,
        layer_losses=(1,) if args.layer_losses == [] else args.layer_losses or (),
        shapes=shapes,
        lens=args.lens,
        journal=journal,
        tokens_from=source,
        text_from=Path(args.text).name if args.text else "",
    )
    out = inspection.save(args.out, overwrite=args.overwrite)
    if journal is not None:
        shutil.rmtree(journal, ignore_errors=True)
    print(inspection.to_markdown())
    if not args.text:
        print("only the heat map was made: the curve of perplexity against layers dropped needs --text FILE")
    print(f"saved to {out}")


def evaluate_command(args: argparse.Namespace) -> None:
    """Measure MODEL and print the figures."""
    tokenizer = load_tokenizer(args.model, **_loaded_as(args))
    model = load_model(args.model, dtype=args.dtype, **_loaded_as(args)).eval()
    path = Path(args.model) if Path(args.model).is_dir() else None
    if path and args.gguf_file:
        path = path / args.gguf_file
    result = evaluate(
        model,
        tokenizer,
        args.text,
        window=args.window,
        max_windows=args.max_windows,
        path=path,
        lm_eval_tasks=args.tasks,
    )
    if args.json:
        Path(args.json).write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    under = f"{result.dtype} on {result.device}, {result.threads} threads, batch 1"
    notes = [under, f"peak memory: {result.peak_memory_of}"]
    Report(model=args.model, evaluation={"after": result}, notes=notes).show()


def export_command(args: argparse.Namespace) -> None:
    """Write MODEL to OUT in the format of another engine."""
    check_target(args.out, overwrite=args.overwrite)
    tokenizer = load_tokenizer(args.model, **_loaded_as(args))
    if tokenizer is None:
        print(f"{args.model} holds no tokenizer; the result has none either", file=sys.stderr)
    model = load_model(args.model, dtype=args.dtype, **_loaded_as(args)).eval()
    words = {"save_format": args.format, "file_type": args.file_type, "overwrite": args.overwrite}
    out = save(model, args.out, tokenizer=tokenizer, **words)
    for file in sorted(file for file in out.iterdir() if file.suffix in (".gguf", ".safetensors")):
        print(f"saved {file} ({megabytes(file.stat().st_size)})")


def list_command(args: argparse.Namespace) -> None:
    """Print every registered step."""
    needed = {True: "needed", False: "not needed"}
    for name, step in sorted(STEPS.items()):
        print(f"{name}: {step.__doc__.strip().splitlines()[0]}")
        print(f"  paper: {step.paper}")
        print(f"  calibration data: {needed.get(step.needs_data, 'depends on the fields')}")
        for field in dataclasses.fields(step):
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            print(f"  {field.name}={json.dumps(default)}")


def _config(args: argparse.Namespace) -> SlimConfig:
    overrides = {"calibration": _calibration(args.calibration)} if args.calibration else {}
    overrides |= {"then": _fields(args.then)} if args.then else {}
    if args.recipe:
        return SlimConfig.from_yaml(args.recipe, **overrides)
    return SlimConfig([{"step": name, **_fields(pairs)} for name, *pairs in args.step], **overrides)


def _calibration(items: list[str]) -> dict:
    sources = [item for item in items if "=" not in item or Path(item).is_file()]
    if len(sources) > 1:
        raise ValueError(f"--calibration takes one source, found {sources}; write its fields as name=value")
    fields = _fields([item for item in items if item not in sources])
    return ({"source": sources[0]} if sources else {}) | fields


def _fields(pairs: list[str]) -> dict:
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"expected name=value, found {pair!r}")
    try:
        return {name: load_yaml(value) for name, _, value in (pair.partition("=") for pair in pairs)}
    except yaml.YAMLError as error:
        raise ValueError(f"a value in {pairs} is not a YAML scalar or list: {error}") from error


def _dry_run(args: argparse.Namespace, config: SlimConfig) -> None:
    extra = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    model_config = dense_config(args.model, trust_remote_code=args.trust_remote_code, **extra)
    dtype = model_config.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    notes = (
        [] if dtype else ["config.json names no dtype; dense weights are counted at 16 bits, pass --dtype if not so"]
    )
    dtype = dtype or torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=dtype, trust_remote_code=args.trust_remote_code or None
        )
    model.tie_weights()
    laid_out = plan(model, config, streamed=not args.gguf_file and streams(config))
    laid_out.notes += notes
    laid_out.show()


def _slimmed(args: argparse.Namespace, config: SlimConfig):
    """Slim and save; returns the model."""
    if not args.gguf_file:
        settings = {"trust_remote_code": args.trust_remote_code, "restart": args.restart, "overwrite": args.overwrite}
        return slim_files(args.model, config, args.out, dtype=args.dtype, **settings)
    model = load_model(args.model, dtype=args.dtype, **_loaded_as(args))
    report = slim(model, config.steps, data=config.calibration, tokenizer=config.tokenizer, then=config.then)
    report.note("this run needed the whole model in memory: a GGUF file is read at once")
    save(model, args.out, tokenizer=config.tokenizer, overwrite=args.overwrite)
    return model


def _say_how_to_go_on(args: argparse.Namespace) -> None:
    folder = run_folder(Path(args.out).expanduser().resolve())
    if folder.is_dir():
        print(
            f"What is finished is kept in {folder}: the same command goes on from there, --restart starts over.",
            file=sys.stderr,
        )


def _loaded_as(args: argparse.Namespace) -> dict:
    return {"gguf_file": args.gguf_file, "trust_remote_code": args.trust_remote_code}


def _evaluate_apart(args: argparse.Namespace, model, gguf_file: str | None) -> dict:
    """Evaluate in a process of its own, so that its peak memory holds one model only."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "evaluation.json"
        command = [sys.executable, "-m", "optimum_slim", "evaluate", str(model), "--text", args.evaluate]
        command += ["--json", str(file), "--dtype", args.dtype, "--window", str(args.window)]
        command += ["--max-windows", str(args.max_windows)] if args.max_windows else []
        command += ["--gguf-file", gguf_file] if gguf_file else []
        command += ["--trust-remote-code"] if args.trust_remote_code else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise ValueError(f"evaluating {model} failed; its messages are above")
        return json.loads(file.read_text(encoding="utf-8"))


COMMANDS = {
    "run": run_command,
    "inspect": inspect_command,
    "evaluate": evaluate_command,
    "export": export_command,
    "list": list_command,
}
