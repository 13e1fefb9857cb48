"""What the benchmarks share: the machine, interleaved rounds, one JSON object."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from rich.progress import track

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "examples"))

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Figures = dict[str, float]


def interleaved(contestants: dict[str, Callable[[], None]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Time every contestant once a round, in turn. Returns seconds: name -> one figure a round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in track(range(-warmup, rounds), "rounds", console=None):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(figures: list[float]) -> Figures:
    """Return median and quartiles."""
    lower, median, upper = statistics.quantiles(figures, n=4, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper, "rounds": len(figures)}


def report(name: str, results: dict) -> None:
    """Print one JSON object, and keep it in `benchmarks/results`."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    document = {
        "benchmark": name,
        "results": results,
        "machine": {
            "cpus": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
        },
        "versions": {package: version(package) for package in ("lori_trl", "torch", "transformers", "peft", "trl")},
        "commit": commit.strip(),
    }
    text = json.dumps(document, indent=2)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
