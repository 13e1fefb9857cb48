"""`lori eval` on two ranks, on the CPU by gloo: the answers and figures of one process, and one writer."""

import json
import sys

import pytest
from evaluation.benchmark_rows import write_data
from launches import HERE, launch, run
from tiny import trained_adapter

pytestmark = pytest.mark.distributed


def test_two_ranks_evaluate_as_one_process_does(tmp_path, table):
    folders = [tmp_path / "alone", tmp_path / "together"]
    for folder in folders:
        folder.mkdir()
    data = write_data(tmp_path / "data")
    adapter = str(trained_adapter())
    alone = run([sys.executable, HERE / "run_eval.py", folders[0], adapter, data])
    assert alone.returncode == 0, alone.stderr[-4000:]
    together = launch("ddp", "run_eval.py", folders[1], adapter, data)
    assert (folders[1] / "passed").is_file(), together.stderr[-4000:]
    assert together.returncode != 0 and "SIGKILL" in together.stderr  # the last thing that happens there

    answers = [json.loads((folder / "answers.json").read_text()) for folder in folders]
    assert answers[0] == answers[1]
    assert answers[0]["greedy"] != answers[0]["sampled"][:11] != answers[0]["sampled"][11:]
    results = [json.loads((folder / "results.json").read_text())["results"] for folder in folders]
    pairs = zip(*results, strict=True)
    difference = max(abs(each["value"] - expected["value"]) for expected, each in pairs)
    table.append(("ddp", "lori eval", "", "evaluation", f"{difference:.1e}", ""))
    assert results[0] == results[1]
    assert len({(result["task"], result["metric"]) for result in results[0]}) > 10
    assert together.stdout.split() == alone.stdout.split()  # one table
