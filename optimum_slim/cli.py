"""The commands `slim run`, `slim evaluate` and `slim list`, under `optimum-cli` and under `python -m optimum_slim`.

    optimum-cli slim run HuggingFaceTB/SmolLM2-135M-Instruct slim --step pt2llm group_size=128

`optimum-cli` loads this file by path for each of its commands, so everything heavier than argparse is imported inside
the functions. What a user did wrong is printed as one line, `error: ...`, with exit status 2.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


HELP = "Slim a language model: packed ternary weights through a recipe."


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the subcommands run, evaluate and list."""
    commands = parser.add_subparsers(dest="slim_command", metavar="{run,evaluate,list}", required=True)

    run = commands.add_parser("run", help="slim a model and save the result")
    _add_model(run)
    run.add_argument("out", metavar="OUT", help="folder to create for the slimmed model")
    recipe = run.add_mutually_exclusive_group(required=True)
    recipe.add_argument("--recipe", metavar="FILE", help="YAML file with `steps` and, if need be, `calibration`")
    recipe.add_argument(
        "--step",
        action="append",
        nargs="+",
        metavar=("NAME", "k=v"),
        help="a step and its fields; may be given several times, the order is the recipe's",
    )
    run.add_argument(
        "--calibration",
        nargs="+",
        metavar="SOURCE|k=v",
        help="`model` (default: samples from the model itself), a dataset id, a file, and fields such as samples=32",
    )
    run.add_argument("--report", metavar="FILE", help="also write the report to FILE (.json, .csv or .md)")
    run.add_argument("--dry-run", action="store_true", help="print what would be done, from the config alone")
    run.add_argument("--evaluate", metavar="TEXTFILE", help="measure the model on this text before and after")
    run.add_argument("--window", type=int, default=1024, metavar="N", help="tokens per perplexity window (1024)")
    run.add_argument("--max-windows", type=int, metavar="N", help="perplexity of the first N windows only")
    run.add_argument("--overwrite", action="store_true", help="replace OUT if it exists, once the result is complete")

    evaluate = commands.add_parser("evaluate", help="measure a model, dense or slimmed")
    _add_model(evaluate)
    evaluate.add_argument("--text", metavar="TEXTFILE", help="text for the perplexity")
    evaluate.add_argument("--window", type=int, default=1024, metavar="N", help="tokens per window (1024)")
    evaluate.add_argument("--max-windows", type=int, metavar="N", help="use the first N windows only")
    evaluate.add_argument("--tasks", nargs="+", metavar="TASK", help="lm-eval tasks; needs optimum-slim[eval]")
    evaluate.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    evaluate.add_argument("--traceback", action="store_true", help="show the traceback of an error")

    listed = commands.add_parser("list", help="list the steps with their fields, defaults and papers")
    run.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    listed.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Hub id or local folder of a causal language model")
    parser.add_argument("--gguf-file", metavar="NAME", help="name of a GGUF file in MODEL to read (as dense weights)")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="dtype to load in")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with MODEL")


def execute(args: argparse.Namespace) -> int:
    """Run the chosen command; returns the exit status."""
    command = {"run": run_command, "evaluate": evaluate_command, "list": list_command}[args.slim_command]
    try:
        command(args)
    except (ValueError, TypeError, ImportError, OSError) as error:
        if args.traceback:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry of `python -m optimum_slim`."""
    parser = argparse.ArgumentParser(prog="python -m optimum_slim", description=HELP)
    add_commands(parser)
    return execute(parser.parse_args(argv))


def optimum_command():
    """The command class that `optimum-cli` registers."""
    from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

    class SlimCommand(BaseOptimumCLICommand):
        COMMAND = CommandInfo(name="slim", help=HELP)

        @staticmethod
        def parse_args(parser):
            add_commands(parser)

        def run(self):
            sys.exit(execute(self.args))

    return SlimCommand


def run_command(args: argparse.Namespace) -> None:
    """Slim MODEL and save it to OUT, or print the plan of it."""
    from optimum_slim.loading import load_tokenizer
    from optimum_slim.saving import check_target, save, write_report

    config = _config(args)
    if args.dry_run:
        return _dry_run(args, config)
    check_target(args.out, overwrite=args.overwrite)
    if args.report and Path(args.report).suffix.lower() not in (".json", ".csv", ".md"):
        raise ValueError(f"A report cannot be written to {args.report!r}: end the name in .json, .csv, .md.")
    if args.evaluate and not Path(args.evaluate).is_file():
        raise FileNotFoundError(f"--evaluate: no such text file: {args.evaluate}")
    evaluation = {"before": _evaluate_apart(args, args.model, args.gguf_file)} if args.evaluate else {}
    config.tokenizer = tokenizer = load_tokenizer(args.model, **_loaded_as(args))
    if tokenizer is None:
        print(f"{args.model} holds no tokenizer; none is used or saved", file=sys.stderr)
    model = _slimmed(args, config)
    report = model.slim_report
    out = save(model, args.out, tokenizer=tokenizer, overwrite=args.overwrite)
    if args.evaluate:
        report.evaluation = evaluation | {"after": _evaluate_apart(args, out, None)}
        write_report(model, out)
    report.show()
    if args.report:
        report.save(args.report)
    print(f"saved to {out}")


def evaluate_command(args: argparse.Namespace) -> None:
    """Measure MODEL and print the figures."""
    from optimum_slim.evaluate import evaluate
    from optimum_slim.loading import load_model, load_tokenizer
    from optimum_slim.report import Report

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


def list_command(args: argparse.Namespace) -> None:
    """Print every registered step."""
    import dataclasses

    import optimum_slim  # noqa: F401
    from optimum_slim.step import STEPS

    for name, step in sorted(STEPS.items()):
        print(f"{name}: {step.__doc__.strip().splitlines()[0]}")
        print(f"  paper: {step.paper}")
        print(f"  calibration data: {'needed' if step.needs_data else 'not needed'}")
        for field in dataclasses.fields(step):
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            print(f"  {field.name}={json.dumps(default)}")


def _config(args: argparse.Namespace):
    from optimum_slim import SlimConfig

    if args.recipe:
        overrides = {"calibration": _calibration(args.calibration)} if args.calibration else {}
        return SlimConfig.from_yaml(args.recipe, **overrides)
    steps = [{"step": name, **_fields(pairs)} for name, *pairs in args.step]
    return SlimConfig(steps, calibration=_calibration(args.calibration) if args.calibration else None)


def _calibration(items: list[str]) -> dict:
    sources = [item for item in items if "=" not in item or Path(item).is_file()]
    if len(sources) > 1:
        raise ValueError(f"--calibration takes one source, found {sources}; write its fields as name=value")
    fields = _fields([item for item in items if item not in sources])
    return ({"source": sources[0]} if sources else {}) | fields


def _fields(pairs: list[str]) -> dict:
    import yaml

    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"expected name=value, found {pair!r}")
    try:
        return {name: yaml.safe_load(value) for name, _, value in (pair.partition("=") for pair in pairs)}
    except yaml.YAMLError as error:
        raise ValueError(f"a value in {pairs} is not a YAML scalar or list: {error}") from error


def _dry_run(args: argparse.Namespace, config) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from optimum_slim.plan import plan

    model_config = _model_config(args)
    dtype = model_config.dtype or torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=dtype, trust_remote_code=args.trust_remote_code or None
        )
    model.tie_weights()
    plan(model, config).show()


def _model_config(args: argparse.Namespace):
    from transformers import AutoConfig

    extra = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code or None, **extra)
    quantization = getattr(config, "quantization_config", None) or {}
    quantization = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if quantization.get("quant_method") == "slim":
        raise ValueError(f"{args.model} is a slimmed model already; start from the dense model it was made from")
    return config


def _slimmed(args: argparse.Namespace, config):
    from transformers import AutoModelForCausalLM

    from optimum_slim import slim
    from optimum_slim.loading import load_model

    if args.gguf_file:
        model = load_model(args.model, dtype=args.dtype, **_loaded_as(args))
        slim(model, config.steps, data=config.calibration, tokenizer=config.tokenizer)
        return model
    _model_config(args)
    return AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=config, dtype=args.dtype, trust_remote_code=args.trust_remote_code or None
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
