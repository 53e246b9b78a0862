"""The shell: what it prints, what it writes, what it refuses, and what it does not import."""

import csv
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import optimum_slim
from optimum_slim import shape_search
from optimum_slim.cli import main
from optimum_slim.importance import Importance


PACKAGE = Path(optimum_slim.__file__).parent
REGISTER = PACKAGE / "_optimum_register" / "register_slim.py"
STEP = ["--step", "bitnet", "force=true"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    folder = tmp_path_factory.mktemp("models") / "dense"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def with_words(source, tmp_path_factory):
    """The tiny model with a tokenizer of three words, and a text in them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("with_words")
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder / "dense")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="[UNK]").save_pretrained(folder / "dense")
    (folder / "text.txt").write_text("a b b a " * 50)
    return folder / "dense", folder / "text.txt"


def test_run_writes_a_model_that_loads(source, tmp_path, capsys):
    out = tmp_path / "slim"
    assert (
        main(["run", str(source), str(out), *STEP, "activation_bits=null", "--report", str(tmp_path / "r.csv")]) == 0
    )
    printed = capsys.readouterr()
    assert "| bitnet" in printed.out and f"saved to {out}" in printed.out
    assert "holds no tokenizer" in printed.err
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 1 + 14
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.model.layers[0].mlp.up_proj.activation_bits is None
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8


def test_run_from_a_recipe_file(source, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"steps": [{"step": "bitnet", "force": True}]}))
    assert main(["run", str(source), str(tmp_path / "slim"), "--recipe", str(recipe), "--dtype", "bfloat16"]) == 0
    saved = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert saved["dtype"] == "bfloat16"
    assert saved["quantization_config"]["steps"][0]["step"] == "bitnet"


def test_calibration_words(source, tmp_path):
    out = tmp_path / "slim"
    words = ["--step", "pt2llm", "group_size=32", "--calibration", "model", "samples=2", "length=16"]
    assert main(["run", str(source), str(out), *words]) == 0
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    assert quantization["calibration"]["samples"] == 2
    assert quantization["steps"][0]["group_size"] == 32


def test_dry_run_foretells_the_size_and_writes_nothing(source, tmp_path, capsys, monkeypatch):
    out = tmp_path / "slim"
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("it read weights"))
    assert main(["run", str(source), str(out), *STEP, "modules_to_not_convert=[down_proj]", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    assert "bitnet, 2." in printed and "output head" in printed and "embedding" in printed
    assert "asked for by modules_to_not_convert" in printed

    from optimum_slim import SlimConfig
    from optimum_slim.packed import model_bytes
    from optimum_slim.plan import plan

    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(source), dtype=torch.float32)
    foretold = plan(meta, SlimConfig([{"step": "bitnet", "force": True}]))
    main(["run", str(source), str(out), *STEP])
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert foretold.bytes_after == model_bytes(loaded)
    assert {name for _, name, _, _ in foretold.touched} == {
        name for name, module in loaded.named_modules() if isinstance(module, optimum_slim.PackedLinear)
    }


def test_dry_run_counts_calibration_in(source, capsys):
    assert main(["run", str(source), "unused", "--step", "pt2llm", "--dry-run"]) == 0
    assert "hidden states of 32,768 calibration tokens" in capsys.readouterr().out


WRONG = {
    "unknown step": (["--step", "bitnett"], "unknown step 'bitnett'. Did you mean 'bitnet'?"),
    "unknown field": (["--step", "bitnet", "forse=1"], "has no field 'forse'. Did you mean 'force'?"),
    "no value": (["--step", "bitnet", "force"], "expected name=value, found 'force'"),
    "no recipe": (["--recipe", "no.yaml"], "no.yaml does not exist"),
    "not ternary": (["--step", "bitnet"], "force"),
    "two sources": ([*STEP, "--calibration", "a", "b"], "--calibration takes one source"),
    "report suffix": ([*STEP, "--report", "r.txt"], "end the name in .json, .csv, .md"),
    "text file": ([*STEP, "--evaluate", "no.txt"], "no such text file: no.txt"),
    "then": (["--step", "depth", "drop=1", "--then", "load_in_4bits=true"], "load_in_4bits"),
    "then without value": (["--step", "depth", "drop=1", "--then", "nf4"], "expected name=value, found 'nf4'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_one_line_and_writes_nothing(source, tmp_path, capsys, name):
    words, message = WRONG[name]
    assert main(["run", str(source), str(tmp_path / "slim"), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert list(tmp_path.iterdir()) == []


def test_missing_model_and_occupied_target(source, tmp_path, capsys):
    (tmp_path / "slim").mkdir()
    (tmp_path / "slim" / "mine.txt").write_text("keep")
    assert main(["run", str(source), str(tmp_path / "slim"), *STEP]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["run", str(source), str(tmp_path / "slim"), *STEP, "--overwrite"]) == 0
    assert not (tmp_path / "slim" / "mine.txt").exists()
    capsys.readouterr()
    assert main(["run", str(tmp_path / "slim"), str(tmp_path / "again"), *STEP]) == 2
    assert "is a slimmed model already" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "nowhere"), str(tmp_path / "again"), *STEP]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_traceback_on_request(source, tmp_path):
    with pytest.raises(ValueError, match="unknown step"):
        main(["run", str(source), str(tmp_path / "slim"), "--step", "nope", "--traceback"])


def test_list_names_steps_fields_and_papers(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert "bitnet: " in printed and "pt2llm: " in printed
    assert 'linear_class="bitlinear"' in printed and "group_size=128" in printed
    assert "2402.17764" in printed
    needs = {part.split(":")[0]: part.split("calibration data: ")[1].split("\n")[0] for part in steps_in(printed)}
    assert needs == {
        "arbllm": "needed",
        "billm": "needed",
        "bitnet": "not needed",
        "bitnet_training": "needed",
        "depth": "depends on the fields",
        "heal": "needed",
        "layerskip": "needed",
        "magnitude": "depends on the fields",
        "minitron": "depends on the fields",
        "onebit": "depends on the fields",
        "pt2llm": "needed",
        "sparsegpt": "needed",
        "tq": "not needed",
        "wanda": "needed",
    }


def steps_in(printed: str) -> list[str]:
    """The parts of the list, one for each step: lines that are indented belong to the one before."""
    parts = []
    for line in printed.splitlines():
        if line.startswith(" "):
            parts[-1] += f"\n{line}"
        else:
            parts.append(line)
    return parts


def test_evaluate_prints_and_writes_figures(source, tmp_path, capsys):
    assert main(["evaluate", str(source), "--json", str(tmp_path / "e.json")]) == 0
    assert "decode tokens/s" in capsys.readouterr().out
    assert json.loads((tmp_path / "e.json").read_text())["stored_bits_per_weight"] == 32


@pytest.mark.slow
def test_run_evaluate_measures_before_and_after_in_processes_of_their_own(with_words, tmp_path, capsys):
    folder, text = with_words
    out = tmp_path / "slim"
    assert main(["run", str(folder), str(out), *STEP, "--evaluate", str(text), "--window", "64"]) == 0
    report = json.loads((out / "slim_report.json").read_text())
    before, after = report["evaluation"]["before"], report["evaluation"]["after"]
    assert before["window"] == after["window"] == 64
    assert after["bytes_on_disk"] < before["bytes_on_disk"]
    assert before["perplexity"] != after["perplexity"]
    assert "perplexity (window 64)" in (out / "README.md").read_text()
    assert "perplexity (window 64)" in capsys.readouterr().out


CALIBRATION = ["--calibration", "model", "samples=4", "length=16"]


def test_inspect_draws_and_saves(with_words, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (model, text), out = with_words, tmp_path / "pictures"
    words = ["--text", str(text), "--window", "64", "--max-windows", "2", "--drop", "1", "--metric", "deepest"]
    assert main(["inspect", str(model), "--out", str(out), *CALIBRATION, *words]) == 0
    printed = capsys.readouterr().out
    assert f"saved to {out}" in printed and "| 1 | 0 |" in printed
    assert {file.name for file in out.iterdir()} == {
        "angular_distance.png",
        "perplexity.png",
        "inspection.json",
        "inspection.md",
    }
    data = json.loads((out / "inspection.json").read_text())
    assert data["model"] == "dense" and data["metric"] == "deepest"
    assert data["tokens"] == "4 samples of 16 tokens of the model's own text"
    assert data["text"] == "2 windows of 64 tokens of text.txt"
    (row,) = data["curve"]
    assert (row["dropped"], row["layers"], row["perplexity_healed"]) == (1, [0], None)
    assert main(["inspect", str(model), "--out", str(out), *CALIBRATION]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["inspect", str(model), "--out", str(out), *CALIBRATION, "--overwrite", "--widths", "--lens"]) == 0
    assert (out / "importance.safetensors").is_file() and (out / "importance.png").is_file()
    printed = capsys.readouterr().out
    assert "only the heat map was made" in printed and (out / "lens.png").is_file()
    assert "the final token is first predicted by layer" in printed and "| layers | agreement |" in printed
    rows = list(csv.DictReader((out / "lens.csv").open()))
    assert [row["layer"] for row in rows] == ["1", "2"] and rows[1]["settled"] == "1.0"
    assert not (out / "perplexity.png").exists()


def test_inspect_ranks_shapes_and_goes_on_after_a_kill(with_words, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("OPTIMUM_SLIM_CACHE", str(tmp_path / "cache"))
    model, out = with_words[0], tmp_path / "pictures"
    words = ["inspect", str(model), "--out", str(out), *CALIBRATION, "--shapes", "ratio=0.75", "--widths"]
    words.append("--layer-losses")
    original, measured = shape_search.perplexity, []

    def measure(*arguments):
        measured.append(1)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(shape_search, "perplexity", measure)
    assert main(words) == 130 and not out.exists()
    assert main(words) == 0
    data = json.loads((out / "inspection.json").read_text())
    assert len(measured) == len(data["shapes"]) + 1 and not list((tmp_path / "cache" / "runs").iterdir())
    assert (out / "shapes.png").is_file() and "--step minitron hidden_size=" in capsys.readouterr().out
    losses = Importance.load(out / "importance.safetensors").loss_increase
    assert losses.isnan().tolist() == [[False, False], [True, True]]


@pytest.mark.slow
def test_inspect_heals(with_words, tmp_path):
    pytest.importorskip("matplotlib")
    model, text = with_words
    words = ["--text", str(text), "--drop", "1", "--heal", "method=norms", "steps=10", "samples=6", "batch_size=2"]
    assert main(["inspect", str(model), "--out", str(tmp_path / "pictures"), *CALIBRATION, *words]) == 0
    data = json.loads((tmp_path / "pictures" / "inspection.json").read_text())
    assert data["curve"][0]["perplexity_healed"] != data["curve"][0]["perplexity"]
    assert data["heal"]["steps"] == 10


WRONG_INSPECTION = {
    "heal without text": (["--heal"], "--heal is shown by the perplexity"),
    "heal field": (["--text", "TEXT", "--heal", "rang=4"], "has no field 'rang'. Did you mean 'rank'?"),
    "text file": (["--text", "no.txt"], "--text: no such text file: no.txt"),
    "drop": (["--text", "TEXT", "--drop", "2"], "cannot drop [2] of the 2 layers"),
    "losses": (["--layer-losses"], "pass widths=True"),
    "shapes": (["--shapes", "ratio=0.75", "steps=3"], "has no field 'steps'"),
    "metric": (["--text", "TEXT", "--metric", "depth"], "metric must be one of"),
}


@pytest.mark.parametrize("name", WRONG_INSPECTION)
def test_wrong_inspection_is_one_line_and_writes_nothing(with_words, tmp_path, capsys, name):
    pytest.importorskip("matplotlib")
    words, message = WRONG_INSPECTION[name]
    model, text = with_words
    words = [str(text) if word == "TEXT" else word for word in words]
    assert main(["inspect", str(model), "--out", str(tmp_path / "pictures"), *CALIBRATION, "--drop", "1", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert list(tmp_path.iterdir()) == []


def test_inspect_without_matplotlib_says_how_to_get_it(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["inspect", str(source), "--out", str(tmp_path / "pictures")]) == 2
    assert 'pip install "optimum-slim[plot]"' in capsys.readouterr().err


def test_then_quantizes_what_the_steps_left(source, tmp_path):
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "slim"
    words = ["--step", "depth", "layers=[0]", "--then", "load_in_4bit=true", "bnb_4bit_quant_type=nf4"]
    assert main(["run", str(source), str(out), *words]) == 0
    saved = json.loads((out / "config.json").read_text())
    assert saved["num_hidden_layers"] == 1
    assert saved["quantization_config"]["quant_method"] == "bitsandbytes"
    assert saved["quantization_config"]["bnb_4bit_quant_type"] == "nf4"


def test_then_on_the_command_line_replaces_that_of_the_recipe(source, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    steps = [{"step": "depth", "drop": 1, "metric": "deepest"}]
    recipe.write_text(yaml.safe_dump({"steps": steps, "then": {"load_in_8bit": True}}))
    words = ["run", str(source), str(tmp_path / "slim"), "--recipe", str(recipe), "--dry-run"]
    assert main(words) == 0
    assert "bitsandbytes int8, 8." in capsys.readouterr().out
    assert main([*words, "--then", "load_in_4bit=true"]) == 0
    assert "bitsandbytes fp4, 4." in capsys.readouterr().out


def run(code: str, *words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, **options)


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "optimum_slim", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "{run,inspect,evaluate,export,list}" in done.stdout


needs_optimum = pytest.mark.skipif(
    not any(importlib.metadata.distributions(name="optimum")), reason="optimum is not installed"
)
OPTIMUM_CLI = """
import sys
sys.argv = ["optimum-cli", *sys.argv[1:]]
from optimum.commands.optimum_cli import main
try:
    main()
finally:
    print("loaded:", sorted({"torch", "transformers", "optimum_slim"} & set(sys.modules)))
"""


@needs_optimum
def test_optimum_cli_help_loads_nothing_heavy():
    done = run(OPTIMUM_CLI, "slim", "run", "--help")
    assert "--recipe" in done.stdout, done.stderr
    assert "loaded: []" in done.stdout


@needs_optimum
def test_optimum_cli_runs_and_passes_the_exit_status_on(tmp_path):
    done = run(OPTIMUM_CLI, "slim", "run", str(tmp_path), str(tmp_path / "out"), "--step", "nope")
    assert done.returncode == 2
    assert "error: unknown step 'nope'" in done.stderr
    assert run(OPTIMUM_CLI, "slim").returncode == 2


@needs_optimum
@pytest.mark.parametrize("fault", ["raise RuntimeError('broken')", "def (", None], ids=["raises", "syntax", "missing"])
def test_a_broken_package_does_not_take_optimum_cli_down(tmp_path, fault):
    package = tmp_path / "optimum_slim"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('broken')")
    if fault is not None:
        (package / "cli.py").write_text(fault)
    namespace = tmp_path / "optimum" / "commands" / "register"
    namespace.mkdir(parents=True)
    (namespace / "register_slim.py").write_bytes(REGISTER.read_bytes())
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + OPTIMUM_CLI
    done = run(code, "--help")
    assert done.returncode == 0, done.stderr
    assert "export" in done.stdout and "slim" not in done.stdout


def test_the_register_file_survives_without_the_package(tmp_path):
    code = (
        "import sys, runpy; sys.modules['optimum_slim'] = None;print(runpy.run_path(sys.argv[1])['REGISTER_COMMANDS'])"
    )
    done = run(code, str(REGISTER), cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr
