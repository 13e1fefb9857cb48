"""Results on file replace their own kind alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from evaluation.benchmark_rows import figure

from lori_trl.evaluation import (
    read_results,
    records,
    write_results,
)


def test_new_results_replace_their_own_kind_alone(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_results(adapter, records([figure(), figure("boolq", "accuracy", 0.7, stderr=0.1)], str(adapter), "a/base"))
    write_results(adapter, records([figure(value=0.6, dataset="openai/gsm8k")], str(adapter), "a/base"))
    results = {(r["task"], r["metric"]): r for r in read_results(adapter)}
    assert results["gsm8k", "accuracy_strict"]["value"] == 0.6 and results["boolq", "accuracy"]["value"] == 0.7
    assert results["boolq", "accuracy"]["stderr"] == 0.1 and "stderr" not in results["gsm8k", "accuracy_strict"]
    assert results["boolq", "accuracy"]["model"] == {"name": "adapter", "base": "a/base"}
    assert [file.name for file in adapter.iterdir()] == ["eval_results.json"]
    assert str(tmp_path) not in (adapter / "eval_results.json").read_text()


def test_evaluations_at_the_same_time_lose_no_result(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        tasks = [f"task-{number}" for number in range(24)]
        list(pool.map(lambda task: write_results(tmp_path, records([figure(task)], str(tmp_path), None)), tasks))
    assert sorted(result["task"] for result in read_results(tmp_path)) == sorted(tasks)
    assert [file.name for file in tmp_path.iterdir()] == ["eval_results.json"]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"eval_loss": 2.5}', "is not of its form"),  # the Trainer's own file of that name
        ("[1", "is not of its form"),
        ('{"format_version": 9, "results": []}', "format_version 9"),
    ],
)
def test_a_foreign_file_stays(tmp_path, content, part):
    (tmp_path / "eval_results.json").write_text(content)
    with pytest.raises(ValueError, match=part):
        write_results(tmp_path, records([figure()], str(tmp_path), None))
    assert (tmp_path / "eval_results.json").read_text() == content
