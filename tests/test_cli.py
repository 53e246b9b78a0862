"""The shell: what it prints, what it writes, what it refuses, and what it does not import."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import optimum_slim
from optimum_slim.cli import main


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


def test_evaluate_prints_and_writes_figures(source, tmp_path, capsys):
    assert main(["evaluate", str(source), "--json", str(tmp_path / "e.json")]) == 0
    assert "decode tokens/s" in capsys.readouterr().out
    assert json.loads((tmp_path / "e.json").read_text())["stored_bits_per_weight"] == 32


@pytest.mark.slow
def test_run_evaluate_measures_before_and_after_in_processes_of_their_own(source, tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "dense"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="[UNK]").save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("a b b a " * 50)
    out = tmp_path / "slim"
    assert main(["run", str(folder), str(out), *STEP, "--evaluate", str(text), "--window", "64"]) == 0
    report = json.loads((out / "slim_report.json").read_text())
    before, after = report["evaluation"]["before"], report["evaluation"]["after"]
    assert before["window"] == after["window"] == 64
    assert after["bytes_on_disk"] < before["bytes_on_disk"]
    assert before["perplexity"] != after["perplexity"]
    assert "perplexity (window 64)" in (out / "README.md").read_text()
    assert "perplexity (window 64)" in capsys.readouterr().out


def run(code: str, *words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, **options)


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "optimum_slim", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "{run,evaluate,list}" in done.stdout


needs_optimum = pytest.mark.skipif(importlib.util.find_spec("optimum") is None, reason="optimum is not installed")
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
