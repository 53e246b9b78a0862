"""Report: one dict, four forms, and a table a reader can check."""

import csv
import io
import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
from rich.console import Console

from optimum_slim.report import Report, compare, megabytes


@dataclass
class FakeStepReport:
    step: dict
    seconds: float
    layers: list


def make_report(**changes):
    layers = [
        {"name": "a.up", "shape": [8, 4], "bits_per_weight": 2.0, "relative_error": 0.25},
        {"name": "a.down", "shape": (4, 24), "bits_per_weight": 4.0, "relative_error": 0.75},
    ]
    fields = {
        "model": "owner/tiny",
        "steps": [FakeStepReport({"step": "pt2llm", "group_size": 128}, 1.5, layers)],
        "sizes": {"before": 4_000_000, "after": 1_000_000},
        "evaluation": {
            "before": {"perplexity": 20.0, "window": 512, "tasks": {"arc_easy acc": 0.5}},
            "after": {"perplexity": 30.0, "window": 512, "tasks": {"arc_easy acc": 0.4}},
        },
        "notes": ["embeddings stay dense"],
    }
    return Report(**(fields | changes))


def test_json_holds_everything(tmp_path):
    report = make_report()
    read = json.loads(report.save(tmp_path / "report.json").read_text())
    assert read["steps"][0]["step"] == {"step": "pt2llm", "group_size": 128}
    assert read["steps"][0]["layers"][1]["shape"] == [4, 24]
    assert Report(**read).to_dict() == read


def test_csv_has_one_line_per_layer(tmp_path):
    rows = list(csv.DictReader(io.StringIO(make_report().save(tmp_path / "r.csv").read_text())))
    assert [(row["step"], row["name"], row["shape"]) for row in rows] == [
        ("0:pt2llm", "a.up", "8x4"),
        ("0:pt2llm", "a.down", "4x24"),
    ]


def test_table_weighs_bits_by_layer_size_and_names_the_worst_layer(tmp_path):
    text = make_report().save(tmp_path / "r.md").read_text()
    row = next(line for line in text.splitlines() if "pt2llm" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["pt2llm", "1.5", "2", "128", "3.500", "0.5", "a.down (0.75)"]
    assert "| perplexity (window 512) | 20" in " ".join(text.split())
    assert "- embeddings stay dense" in text


def test_compare_gives_ratios_and_keeps_tasks():
    rows = compare({"perplexity": 20.0, "tasks": {"x": 0.5}}, {"perplexity": 30.0, "tasks": {"x": 0.4}})
    assert rows == [("perplexity", "20", "30", "1.50x"), ("x", "0.5", "0.4", "0.80x")]
    assert compare(None, {"bytes_on_disk": 2_000_000}) == [("weight files", "", "2.0 MB", "")]
    assert compare(None, None) == []
    large = compare({"perplexity": 49_688.86, "parameters": 1_234_567}, None)
    assert [row[1] for row in large] == ["49,689", "1,234,567"]


def test_show_is_plain_without_a_terminal_and_drawn_on_one():
    plain, drawn = io.StringIO(), io.StringIO()
    make_report().show(Console(file=plain, force_terminal=False))
    make_report().show(Console(file=drawn, force_terminal=True, width=160))
    assert plain.getvalue() == str(make_report())
    assert plain.getvalue().isascii()
    assert "╭" in drawn.getvalue()


def test_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'r.txt': end the name in .json, .csv, .md"):
        make_report().save(tmp_path / "r.txt")


def test_a_local_path_is_cut_to_its_name(tmp_path):
    folder = tmp_path / "secret" / "model"
    folder.mkdir(parents=True)
    assert make_report(model=str(folder)).to_dict()["model"] == "model"
    assert make_report(model="owner/tiny").to_dict()["model"] == "owner/tiny"


def test_an_empty_report_still_prints():
    assert str(Report()).startswith("optimum-slim report: model")
    assert Report().to_csv() == "step\n"


def test_notes_are_kept_once():
    report = Report()
    report.note("same")
    report.note("same")
    assert report.notes == ["same"]


@pytest.mark.parametrize(("count", "text"), [(999, "0.0 MB"), (83_100_000, "83.1 MB"), (2_500_000_000, "2.50 GB")])
def test_megabytes(count, text):
    assert megabytes(count) == text


def test_reading_a_report_needs_no_torch():
    code = (
        "import importlib.util, sys; s = importlib.util.spec_from_file_location('r', sys.argv[1]);"
        "m = importlib.util.module_from_spec(s); sys.modules['r'] = m; s.loader.exec_module(m);"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    import optimum_slim.report

    subprocess.run([sys.executable, "-c", code, optimum_slim.report.__file__], check=True)
