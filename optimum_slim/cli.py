"""The words of `slim run`, `inspect`, `evaluate`, `export`, `list`, under `optimum-cli` and `python -m optimum_slim`.

    optimum-cli slim run HuggingFaceTB/SmolLM2-135M-Instruct slim --step pt2llm group_size=128

`optimum-cli` loads this file by path for each of its commands, so it imports nothing heavier than argparse; what the
commands do is in commands.py. What a user did wrong is printed as one line, `error: ...`, with exit status 2.

A run of one step that packs linear layers is streamed, one decoder layer at a time; started again after it was
interrupted, it goes on where it was.
"""

import argparse
import sys


HELP = "Slim a language model: dropped layers, healing and packed weights through a recipe."


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the subcommands run, inspect, evaluate, export and list."""
    commands = parser.add_subparsers(dest="slim_command", metavar="{run,inspect,evaluate,export,list}", required=True)

    run = commands.add_parser("run", help="slim a model and save the result")
    _add_model(run)
    run.add_argument("out", metavar="OUT", help="folder to create for the slimmed model")
    recipe = run.add_mutually_exclusive_group(required=True)
    recipe.add_argument(
        "--recipe", metavar="FILE", help="YAML file with `steps` and, if need be, `calibration` and `then`"
    )
    recipe.add_argument(
        "--step",
        action="append",
        nargs="+",
        metavar=("NAME", "k=v"),
        help="a step and its fields; may be given several times, the order is the recipe's",
    )
    _add_calibration(run)
    run.add_argument(
        "--then",
        nargs="+",
        metavar="k=v",
        help="quantize the result with bitsandbytes, by the fields of its config such as load_in_4bit=true",
    )
    run.add_argument("--report", metavar="FILE", help="also write the report to FILE (.json, .csv or .md)")
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="print layers, parameters, memory and FLOPs per token before and after, from the config alone",
    )
    run.add_argument("--evaluate", metavar="TEXTFILE", help="measure the model on this text before and after")
    _add_windows(run)
    run.add_argument("--overwrite", action="store_true", help="replace OUT if it exists, once the result is complete")
    run.add_argument(
        "--restart", action="store_true", help="forget what an unfinished run for OUT has done; else it goes on"
    )

    inspect = commands.add_parser(
        "inspect", help="draw which layers do little, and the perplexity without them; needs optimum-slim[plot]"
    )
    _add_model(inspect)
    inspect.add_argument("--out", required=True, metavar="FOLDER", help="folder to create for pictures and tables")
    _add_calibration(inspect)
    inspect.add_argument("--text", metavar="TEXTFILE", help="text for the perplexity; without it only the heat map")
    inspect.add_argument(
        "--drop", nargs="+", type=int, default=[1, 2, 3, 5, 8], metavar="N", help="layers to drop (1 2 3 5 8)"
    )
    inspect.add_argument("--metric", default="angular", help="how the dropped layers are chosen (angular)")
    inspect.add_argument(
        "--heal", nargs="*", metavar="k=v", help="also heal each cut, with these fields of the step `heal`"
    )
    inspect.add_argument(
        "--widths", action="store_true", help="also score neurons, heads and channels, for the step `minitron`"
    )
    inspect.add_argument(
        "--layer-losses",
        nargs="*",
        type=int,
        metavar="N",
        help="with --widths: also the loss without each N neighbouring layers (1)",
    )
    inspect.add_argument(
        "--shapes",
        nargs="+",
        metavar="k=v",
        help="rank the shapes near a size, by fields of the step `minitron` such as ratio=0.75 search_steps=300",
    )
    inspect.add_argument(
        "--lens", action="store_true", help="also what each layer predicts: how early the final token is there"
    )
    _add_windows(inspect)
    inspect.add_argument("--overwrite", action="store_true", help="replace FOLDER if it exists")

    evaluate = commands.add_parser("evaluate", help="measure a model, dense or slimmed")
    _add_model(evaluate)
    evaluate.add_argument("--text", metavar="TEXTFILE", help="text for the perplexity")
    _add_windows(evaluate)
    evaluate.add_argument("--tasks", nargs="+", metavar="TASK", help="lm-eval tasks; needs optimum-slim[eval]")
    evaluate.add_argument("--json", metavar="FILE", help="also write the figures to FILE")

    export = commands.add_parser("export", help="write a model, dense or slimmed, for other engines")
    _add_model(export)
    export.add_argument("out", metavar="OUT", help="folder to create for the exported model")
    export.add_argument(
        "--format", choices=["gguf", "bitnet"], default="gguf", help="GGUF file for llama.cpp, or stock bitnet (gguf)"
    )
    export.add_argument(
        "--file-type", metavar="TYPE", help="what matrices become in a GGUF file: TQ2_0, TQ1_0, F16, Q8_0, ..."
    )
    export.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it exists, once the result is complete"
    )

    listed = commands.add_parser("list", help="list the steps with their fields, defaults and papers")
    for command in (run, inspect, evaluate, export, listed):
        command.add_argument("--traceback", action="store_true", help="show the traceback of an error")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Hub id or local folder of a causal language model")
    parser.add_argument("--gguf-file", metavar="NAME", help="name of a GGUF file in MODEL to read (as dense weights)")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="dtype to load in")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with MODEL")


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        nargs="+",
        metavar="SOURCE|k=v",
        help="`model` (default: samples from the model itself), a dataset id, a file, and fields such as samples=32",
    )


def _add_windows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--window", type=int, default=1024, metavar="N", help="tokens per perplexity window (1024)")
    parser.add_argument("--max-windows", type=int, metavar="N", help="perplexity of the first N windows only")


def execute(args: argparse.Namespace) -> int:
    """Run the chosen command; returns the exit status."""
    try:
        from optimum_slim import commands

        commands.COMMANDS[args.slim_command](args)
    except (ValueError, TypeError, ArithmeticError, ImportError, OSError) as error:
        if args.traceback:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
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
