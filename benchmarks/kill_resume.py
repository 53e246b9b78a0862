"""A run killed at random moments, started again after each, against one that nothing disturbs.

    python benchmarks/kill_resume.py [--model FOLDER] [--step sparsegpt] [--calibration SOURCE k=v ...] [--kills 20]

The shell command slims the model (SmolLM2-135M-Instruct) once undisturbed. Then it runs again with another target and
gets SIGKILL, and again with the same words, until it was killed so often and left alone at last. The moments are
drawn uniformly over the work: so many finished layers and a part of the next one. At the end all files of both
results are compared byte for byte (in `slim_report.json` and the card, the seconds may differ). Writes
results/kill_resume.csv (one line per kill) and .md; ends with status 1 if a file differs.
"""

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stream_memory import machine

from optimum_slim.checkpoint import run_folder


ROOT = Path(__file__).resolve().parent.parent
FIELDS = ("kill", "layers_finished", "seconds_after_start", "planned_layers")
TIMES = re.compile(r'"seconds": [\d.e+-]+|^\| \w+ +\| [\d.]+ ', re.MULTILINE)


def start(options: argparse.Namespace, out: Path) -> subprocess.Popen:
    words = [sys.executable, "-m", "optimum_slim", "run", str(options.model), str(out)]
    words += ["--step", *options.step, "--calibration", *options.calibration]
    return subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)


def finished(out: Path) -> int:
    """Layers that a run with this target has finished."""
    return len([*run_folder(out).glob("layer-*.json")])


def undisturbed(options: argparse.Namespace, out: Path) -> dict[str, float]:
    """Run to the end; returns when the first layer was finished, what a layer takes and the whole, in seconds."""
    begin, times, count = time.monotonic(), [], 0
    process = start(options, out)
    while process.poll() is None:
        if (now := finished(out)) > count:
            count = now
            times.append(time.monotonic() - begin)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"the undisturbed run failed with status {process.returncode}")
    layer = (times[-1] - times[0]) / max(1, len(times) - 1)
    layers = len([*out.glob("model-*.safetensors")]) - 1
    return {"first": times[0], "layer": layer, "all": time.monotonic() - begin, "layers": layers}


def kill_at(options: argparse.Namespace, out: Path, point: float, pace: dict[str, float]) -> dict | None:
    """Start a run and kill it `point` layers into the work; `None` if it ended before."""
    begin = time.monotonic()
    process = start(options, out)
    resumed = finished(out)
    while process.poll() is None and finished(out) < int(point):
        time.sleep(0.01)
    wait = (point % 1) * pace["layer"]
    if resumed >= int(point):  # this layer was begun before: starting up and catching up are part of the time
        wait = (point % 1) * (pace["first"] + pace["layer"])
    deadline = time.monotonic() + wait
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    if process.poll() is not None:
        if process.returncode:
            raise SystemExit(f"a resumed run failed with status {process.returncode}")
        return None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return {"layers_finished": finished(out), "seconds_after_start": f"{time.monotonic() - begin:.2f}"}


def differing(one: Path, other: Path) -> list[str]:
    """Names of the files that are not the same, apart from the seconds in the report and in the card."""
    names = {file.name for folder in (one, other) for file in folder.iterdir()}

    def content(file: Path) -> bytes | None:
        if not file.is_file():
            return None
        if file.name in ("slim_report.json", "README.md"):
            text = TIMES.sub("", file.read_text(encoding="utf-8"))
            return re.sub(r" +|-+", " ", text).encode()  # the width of a column follows its figures
        return file.read_bytes()

    return sorted(name for name in names if content(one / name) != content(other / name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a model (SmolLM2-135M-Instruct)")
    parser.add_argument("--step", nargs="+", default=["pt2llm", "rounds=0"], metavar=("NAME", "k=v"))
    parser.add_argument("--calibration", nargs="+", default=["model", "samples=16", "length=256"])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if options.model is None:
        sys.path.insert(0, str(ROOT / "examples"))
        import smollm2

        options.model = smollm2.fetch()
    with tempfile.TemporaryDirectory() as temporary:
        whole, out = Path(temporary).resolve() / "whole", Path(temporary).resolve() / "killed"
        pace = undisturbed(options, whole)
        layers = int(pace["layers"])
        chance = random.Random(options.seed)
        points = sorted(chance.uniform(0, layers) for _ in range(options.kills))
        kills, begin = [], time.monotonic()
        for point in points:
            killed = kill_at(options, out, point, pace)
            if killed is None:
                break
            kills.append({"kill": len(kills) + 1, "planned_layers": f"{point:.2f}"} | killed)
            print(kills[-1], flush=True)
        if run_folder(out).is_dir() and (status := start(options, out).wait()):
            raise SystemExit(f"the last run failed with status {status}")
        seconds = time.monotonic() - begin
        different = differing(whole, out)
        files = len([*whole.iterdir()])
        left = sorted(path.name for path in Path(temporary).iterdir() if path not in (whole, out))
        shutil.rmtree(whole)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "kill_resume.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kills)
    verdict = "all the same" if not different else f"different: {', '.join(different)}"
    summary = {
        "model": options.model.name,
        "step": " ".join(options.step),
        "decoder layers": layers,
        "kills": len(kills),
        "layers finished when killed": ", ".join(str(kill["layers_finished"]) for kill in kills),
        "seconds undisturbed": f"{pace['all']:.0f}",
        "seconds of all runs with kills": f"{seconds:.0f}",
        f"{files} files compared byte for byte": verdict,
        "left beside the result": json.dumps(left),
    }
    lines = ["# A run killed at random", "", machine() + ".", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in summary.items()]
    (options.out / "kill_resume.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 1 if different or left else 0


if __name__ == "__main__":
    sys.exit(main())
