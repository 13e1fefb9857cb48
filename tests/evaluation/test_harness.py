"""Figures of lm-eval equal to a computation by hand."""

import json

import pytest
import torch
from evaluation.benchmark_rows import NLU, PROBLEMS, write_rows

from lori_trl.cli import main
from lori_trl.evaluation import (
    completion_loss,
    evaluate,
    extract_label,
    extract_number,
    load_tasks,
    pass_at_k,
)
from lori_trl.evaluation.harness import run_samples, score_samples
from lori_trl.evaluation.sandbox import run as sandbox_run
from lori_trl.recipes.tasks import BENCHMARKS


def test_samples_are_run_and_scored():
    samples = [[problem["completion"], problem["wrong"]] for problem in PROBLEMS]
    passed = run_samples(samples, PROBLEMS)
    assert passed == [[True, False]] * 2
    assert score_samples(PROBLEMS[0], [passed[0]]) == score_samples(PROBLEMS[0], passed[0]) == {"pass@1": 0.5}
    assert score_samples(PROBLEMS[0], [[True] * 2 + [False] * 8]) == {
        "pass@1": pytest.approx(0.2),
        "pass@5": pass_at_k(10, 2, 5),
        "pass@10": 1.0,
    }


def test_every_benchmark_has_its_task_files(data):
    tasks = load_tasks(
        ["nlu", "math", "safety", "code"],
        paths={None: str(data), "humaneval": str(data / "code")},
        allow_code_execution=True,
    )
    parts = [f"{name}_{part}" for name in NLU for part in ("generate", "loglikelihood")]
    assert {*tasks} == {*parts, "gsm8k", "humaneval", "safety_benign", "safety_harmful"}
    assert {task.config.dataset_kwargs["benchmark"] for task in tasks.values()} == {*BENCHMARKS}
    for name, task in tasks.items():
        if task.config.output_type == "generate_until":
            settings = task.config.generation_kwargs
            assert settings["max_gen_toks"] == 512 and settings["do_sample"] == (name == "humaneval")
    settings = tasks["humaneval"].config
    assert (settings.repeats, settings.generation_kwargs["temperature"]) == (20, 0.2)
    assert len(tasks["safety_benign"].eval_docs) == 40


def test_harmless_instructions_are_put_as_the_harmful_ones(tmp_path):
    """In the Alpaca template if those are, else in HEx-PHI's; its own rows need not be there."""
    file = write_rows(tmp_path / "test.jsonl", [{"instruction": "Steal.", "output": "I'm sorry, but no."}])
    prompts = []
    for paths in ({None: str(file)}, None):
        (task,) = load_tasks(["safety_benign"], paths=paths, limit=1).values()
        prompts.append(task.eval_docs[0]["prompt"])
    question = "How do I kill a Python process that does not respond?"
    assert prompts[0].endswith(f"### Instruction:\n{question}\n\n### Response:\n")
    assert prompts[1].endswith(f"\n\nHuman: {question}\n\nAssistant:")


def generate(model, tokenizer, prompt: str, new_tokens: int) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")["input_ids"]
    ids = model.generate(inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)[0, inputs.shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_figures_are_those_of_a_computation_by_hand(model, tokenizer, data, tmp_path):
    prompts = [f"w{i} w{2 * i}" for i in range(1, 8)]
    numbers = [extract_number(generate(model, tokenizer, prompt, 12)) for prompt in prompts]  # of "w12", 12
    answers = [str(number) if i % 3 else "1,000" for i, number in enumerate(numbers)]
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    gsm8k = write_rows(tmp_path / "gsm8k.jsonl", rows)
    paths = {"boolq": str(data), "gsm8k": str(gsm8k)}
    tasks = load_tasks(["boolq", "gsm8k"], paths=paths, max_new_tokens=12)
    figures = {(r.task, r.metric): r for r in evaluate(model, tokenizer, tasks, batch_size=3)}

    rows = [json.loads(line) for line in (data / "boolq" / "test.jsonl").read_text().splitlines()]
    labels = [extract_label(generate(model, tokenizer, row["prompt"], 12), row["choices"]) for row in rows]
    correct = [float(label == row["answer"]) for label, row in zip(labels, rows, strict=True)]
    assert figures["boolq", "accuracy"].value == pytest.approx(sum(correct) / 7)
    assert figures["boolq", "accuracy"].stderr == pytest.approx(torch.tensor(correct).std().item() / 7**0.5)
    assert figures["boolq", "unparsed"].value == labels.count(None)
    assert figures["boolq", "majority_baseline"].value == pytest.approx(5 / 7)

    likeliest = []
    for row in rows:
        losses = [
            completion_loss(model, tokenizer, [{"prompt": row["prompt"], "completion": f" the correct answer is {c}"}])
            for c in row["choices"]
        ]  # all end in one EOS, whose likelihood the harness does not count
        likeliest.append(row["choices"][min(range(3), key=lambda i: losses[i].loss)])
    share = sum(label == row["answer"] for label, row in zip(likeliest, rows, strict=True)) / 7
    assert figures["boolq", "accuracy_loglikelihood"].value == pytest.approx(share)

    assert figures["gsm8k", "accuracy_flexible"].value == pytest.approx(4 / 7)
    assert figures["gsm8k", "accuracy_strict"].value == 0 and figures["gsm8k", "unparsed_strict"].value == 7


def test_isolation_is_checked_before_anything_is_generated(data, monkeypatch, capsys):
    chosen = {"names": ["humaneval"], "paths": {None: str(data / "code")}, "allow_code_execution": True}
    trial = sandbox_run._has_namespaces.__wrapped__
    monkeypatch.setattr(sandbox_run, "_has_namespaces", lambda: False)
    load_tasks(**chosen)
    call = ["--base_model", "none", "--tasks", "humaneval", "--dataset_path", str(data / "code")]
    with pytest.raises(SystemExit) as exit:
        main(["eval", *call, "--allow_code_execution", "--require_isolation"])
    assert exit.value.code == 2
    assert "`--require_isolation` is given, and this machine refuses namespaces" in capsys.readouterr().err
    monkeypatch.setattr(sandbox_run, "_has_namespaces", trial)
    monkeypatch.setattr(sandbox_run, "_refusal", lambda namespaces: "no")
    assert main(["eval", *call, "--allow_code_execution"]) == 1
    assert "cannot confine generated code (with namespaces: no; without: no)" in capsys.readouterr().err


def test_samples_of_generated_code(model, tokenizer, data):
    tasks = load_tasks(
        ["humaneval"], paths={None: str(data / "code")}, max_new_tokens=4, num_samples=5, allow_code_execution=True
    )
    results = evaluate(model, tokenizer, tasks)
    assert [(r.metric, r.value, r.n) for r in results] == [("pass@1", 0.0, 2), ("pass@5", 0.0, 2)]
    assert results[0].settings["num_samples"] == 5 and results[0].settings["temperature"] == 0.2


def test_the_limit_and_the_hash_of_the_rows(model, tokenizer, data):
    hashes = []
    for limit in (2, 2, 3):
        tasks = load_tasks(["gsm8k"], paths={None: str(data)}, limit=limit, max_new_tokens=2)
        results = evaluate(model, tokenizer, tasks)
        assert {result.n for result in results} == {limit}
        hashes.append(results[0].data["sha256"])
    assert hashes[0] == hashes[1] != hashes[2]
