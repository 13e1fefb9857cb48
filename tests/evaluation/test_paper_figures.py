"""The paper's figures stand beside those of an adapter that a recipe of the paper has made."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from evaluation.benchmark_rows import figure

from lori_trl.cli import main
from lori_trl.evaluation.paper_figures import markdown_table, paper_figures
from lori_trl.recipes.find import shipped_folder


def adapter(variant="LoRI-S", task="math", rank=32, tasks=1, base="meta-llama/Meta-Llama-3-8B", **config):
    record = None if variant is None else SimpleNamespace(variant=variant)
    return SimpleNamespace(record=record, task=task, tasks=["t"] * tasks, rank=rank, base=base, config=config)


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (adapter(), {("gsm8k", "accuracy_strict"): 0.627}),
        (adapter("LoRI-D", "safety", 64, base="mistralai/Mistral-7B-v0.1"), {("safety", "refusal_rate"): 0.909}),
        (adapter(None, "math-lora"), {("gsm8k", "accuracy_strict"): 0.644}),
        (adapter(None, "math-dora", use_dora=True), {("gsm8k", "accuracy_strict"): 0.654}),
        (adapter(tasks=2), {}),
        (adapter(task="style"), {}),
        (adapter("merged", "math"), {}),
        (adapter(base="me/other"), {}),
        (adapter(base=None), {}),
    ],
)
def test_the_papers_figure_is_of_the_same_base_rank_variant_and_task(of, expected):
    assert paper_figures(of) == pytest.approx(expected)


def test_the_table_in_markdown():
    results = {
        "base": [figure(value=0.5)],
        "a|b": [figure(value=0.625, stderr=0.01), figure("safety", "refusal_rate", 0.9)],
    }
    assert markdown_table(results, {"a|b": {("gsm8k", "accuracy_strict"): 0.627}}).splitlines() == [
        f"| task | metric | n | base | a{chr(92)}|b | paper |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        f"| gsm8k | accuracy_strict | {figure().n} | 0.500 | 0.625 ± 0.010 | 0.627 |",
        f"| safety | refusal_rate | {figure().n} |  | 0.900 |  |",
    ]


def test_the_page_has_the_figures_of_the_file():
    """docs/reproducing.md and the file were made of one table; neither is changed alone."""
    page = (Path(__file__).parents[2] / "docs" / "reproducing.md").read_text(encoding="utf-8")
    tables = json.loads((shipped_folder("recipes") / "paper_figures.json").read_text())
    assert len(tables) == 16
    for key, tasks in tables.items():
        base, _, variant = key.split(", ")
        base = {"Meta-Llama-3-8B": "Llama-3-8B", "Mistral-7B-v0.1": "Mistral-7B"}[base]
        for row in (tasks["nlu"], {**tasks["math"], **tasks["code"], **tasks["safety"]}):
            shown = " | ".join(f"{value:.1f}" for value in row.values())
            assert re.search(rf"^\| {re.escape(base)} \| {variant} \| .*{re.escape(shown)}", page, re.MULTILINE), key


def test_eval_prints_markdown(adapter_folder, model_folder, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "w1 w2", "completion": " w3"}\n')
    adapter = shutil.copytree(adapter_folder, tmp_path / "adapter")  # its results stay in its folder
    call = ["eval", str(adapter), "--base_model", str(model_folder), "--metrics", "loss"]
    assert main([*call, "--dataset_path", str(rows), "--output_path", str(tmp_path / "all.json"), "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "| --- | --- | ---: | ---: | ---: |" in out and "| rows | loss |" in out and "paper" not in out
