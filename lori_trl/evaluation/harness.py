"""Benchmarks through lm-eval: rows in, scores of single answers, means with standard errors out."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from datasets import Dataset
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..recipes.find import nearest
from ..recipes.raw_rows import alpaca_prompt, hex_phi_prompt
from ..recipes.tasks import BENCHMARKS, load_benchmark
from ..training.base_model import precision
from .processes import do_once
from .results import Result, rows_hash, versions
from .sandbox import check_isolation, run_programs
from .scoring import extract_label, extract_number, is_refusal, is_refusal_by_keywords, pass_at_k

if TYPE_CHECKING:
    from lm_eval.api.task import Task

TASK_FILES = Path(__file__).parent / "tasks"
BENIGN_FILE = TASK_FILES / "benign.jsonl"

# What scoring needs of a row, besides the prompt.
_COLUMNS = {"gsm8k": {"answer"}, "humaneval": {"completion", "test", "entry_point"}, "hex_phi": set()}
_NLU_COLUMNS = {"answer", "choices"}


def load_tasks(
    names: Sequence[str],
    *,
    paths: Mapping[str | None, str] | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    num_samples: int | None = None,
    allow_code_execution: bool = False,
    require_isolation: bool = False,
) -> dict[str, "Task"]:
    """
    Load lm-eval tasks with their rows, before any model is there.

    Args:
        names (`Sequence[str]`):
            Benchmarks (`boolq`, `gsm8k`, `safety`, ...), groups of them (`nlu`, `math`, `code`), or a part of one
            (`boolq_generate`, `boolq_loglikelihood`, ...).
        paths (`Mapping[str | None, str]`, *optional*):
            Local data in place of the sources: one of `names` (`None` for all) -> a .jsonl or .json file, or a folder
            with one, or with a folder for each benchmark.
        limit (`int`, *optional*): take the first so many rows of each.
        max_new_tokens (`int`, *optional*): the longest answer in tokens; by default the task's, 512.
        num_samples (`int`, *optional*): samples a HumanEval problem; by default 20.
        allow_code_execution (`bool`, *optional*, defaults to `False`): whether generated code may be run.
        require_isolation (`bool`, *optional*, defaults to `False`):
            whether to refuse that on a machine without namespaces. One without Landlock and seccomp is always refused.

    Returns:
        `dict[str, Task]`: lm-eval's name -> its task, for [`evaluate`].

    Raises:
        `ImportError`: lm-eval is not installed.
        `ValueError`: a name is unknown, rows lack what scoring needs, code would be run without leave, or namespaces
            are required and absent.
        `FileNotFoundError`: a path does not exist.
        `RuntimeError`: code would be run, and this machine cannot confine it.
    """
    _import_lm_eval(names)
    from lm_eval.tasks import TaskManager

    with _log_level("lm_eval", logging.ERROR):  # it warns of much that is meant here
        settings: dict[str, Any] = {"paths": {}, "limit": limit}
        manager = TaskManager(include_path=str(TASK_FILES), include_defaults=False, metadata=settings)
        entries = _task_entries()
        members = {name: [name] for name in entries}
        for name, entry in entries.items():
            for tag in [entry["tag"]] if isinstance(entry["tag"], str) else entry["tag"]:
                members.setdefault(tag, []).append(name)
        for name in [*names, *(name for name in paths or {} if name is not None)]:
            if name not in members:
                raise ValueError(
                    f"`{name}` is no task{nearest(name, members)}. Known are {', '.join(sorted(members))}. "
                    "Pass some of these."
                )
        chosen = list(dict.fromkeys(member for name in names for member in members[name]))
        unsafe = [name for name in chosen if entries[name].get("unsafe_code")]
        if unsafe and not allow_code_execution:
            raise ValueError(
                f"`--tasks {unsafe[0]}` runs code that the model wrote. That is off unless it is allowed, and then "
                "each sample runs in a sandbox. Pass `--allow_code_execution`, or leave the task out."
            )
        if unsafe:
            check_isolation(required=require_isolation)
        for owner, path in (paths or {}).items():
            folders = {
                config["dataset_kwargs"]["benchmark"]: config.get("task_alias", task)
                for task, config in ((task, entries[task]) for task in chosen)
                if owner is None or task in members[owner]
            }
            settings["paths"] |= {benchmark: _own_path(path, folders, benchmark) for benchmark in folders}
        tasks = manager.load(chosen)["tasks"]
        for task in tasks.values():
            if max_new_tokens is not None and task.config.output_type == "generate_until":
                task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)
            if num_samples is not None and task.config.repeats > 1:
                task.set_config("repeats", num_samples)
    return tasks


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, "Task"],
    *,
    batch_size: int = 8,
    seed: int = 42,
) -> list[Result]:
    """
    Evaluate a model on tasks.

    Args:
        model (`PreTrainedModel`): a causal model, with or without adapters.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer; what it puts before a text (BOS) stays.
        tasks (`Mapping[str, Task]`): from [`load_tasks`].
        batch_size (`int`, *optional*, defaults to `8`): sequences at a time.
        seed (`int`, *optional*, defaults to `42`): of the samples; greedy answers do not depend on it.

    Returns:
        `list[Result]`: every figure.

    Raises:
        `ValueError`: the model has no room for the longest answer.

    Source: greedy decoding, 512 new tokens, left padding as in the authors' code, which goes on after the EOS and
    decodes prompt and answer together; here an answer ends at the EOS and stands alone.
    """
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    from .harness_model import HarnessModel

    with _log_level("lm_eval", logging.ERROR):
        lm = HarnessModel(model, tokenizer, batch_size, seed)
        for task in tasks.values():
            longest = (task.config.generation_kwargs or {}).get("max_gen_toks", 0)
            if longest >= lm.max_length:
                raise ValueError(
                    f"`--max_new_tokens {longest}` leaves no room for a prompt: the model takes {lm.max_length} "
                    f"tokens in all. Pass fewer, e.g. `--max_new_tokens {lm.max_length // 2}`."
                )
        with _log_level(HFLM.__module__, logging.WARNING):  # it says when a prompt is cut
            output = evaluator.evaluate(
                lm=lm, task_dict={"tasks": dict(tasks)}, log_samples=False, confirm_run_unsafe_code=True
            )
    results: dict[tuple[str, str], Result] = {}  # two parts of a benchmark have its majority baseline in common
    for name, task in tasks.items():
        settings = {"batch_size": batch_size, "seed": seed, **precision(model), "versions": versions("lm-eval")}
        for result in _results(task, output["results"][name], settings):
            results[result.task, result.metric] = result
    return list(results.values())


def _results(task: "Task", output: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Result]:
    """Turn lm-eval's output for one task into results; `metric,filter` and `metric_stderr,filter` are its keys."""
    benchmark, paths = task.config.dataset_kwargs["benchmark"], task.config.metadata["paths"]
    rows = task.eval_docs
    own = task.config.custom_dataset is benign_rows
    source = BENIGN_FILE.name if own else _source(benchmark, paths)
    common = {
        "task": task.config.task_alias or task.config.task,
        "n": len(rows),
        "dataset": None if own or benchmark in paths else _hub_name(BENCHMARKS[benchmark].source),
        "data": {"source": source, "rows": len(rows), "sha256": rows_hash(rows)},
        "settings": {
            **{key: value for key, value in (task.config.generation_kwargs or {}).items() if key != "until"},
            "num_samples": task.config.repeats,
            "num_fewshot": 0,
            "limit": task.config.metadata["limit"],
            **settings,
        },
    }
    results = []
    for key, value in output.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = output[f"{metric}_stderr,{filter_name}"]
        if metric.startswith("unparsed"):
            results.append(Result(metric=metric, value=round(value * len(rows)), **common))
        else:
            stderr = None if stderr == "N/A" else stderr
            results.append(Result(metric=metric, value=value, stderr=stderr, **common))
    if "choices" in rows.column_names:
        majority = Counter(rows["answer"]).most_common(1)[0][1] / len(rows)
        results.append(Result(metric="majority_baseline", value=majority, **common))
    return results


# ---- what the task files name --------------------------------------------------------------------------------------


def benchmark_rows(benchmark: str, paths: Mapping[str, str], limit: int | None, **metadata: Any) -> dict[str, Dataset]:
    """Load the rows of a benchmark and check that they have what scoring needs."""
    try:
        rows = load_benchmark(benchmark, paths.get(benchmark))
    except OSError as error:
        if benchmark in paths:
            raise
        raise ConnectionError(
            f"The rows of {benchmark} cannot be fetched from `{BENCHMARKS[benchmark].source}` ({_first_line(error)}). "
            f"They come from the network{', once you have accepted their terms' * BENCHMARKS[benchmark].gated}. "
            "Connect and log in, or pass a local file as `--dataset_path`."
        ) from error
    columns = {"prompt", *_COLUMNS.get(benchmark, _NLU_COLUMNS)}
    missing = columns - set(rows.column_names)
    if missing:
        raise ValueError(
            f"The rows of `{_source(benchmark, paths)}` have the columns {', '.join(rows.column_names)}. {benchmark} "
            f"also needs {', '.join(sorted(missing))}. Add them, or pass the data set's raw rows."
        )
    rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
    for number, row in enumerate(rows if "answer" in columns else []):
        allowed = row["choices"] if "choices" in columns else [str(extract_number(str(row["answer"])))]
        if str(row["answer"]).replace(",", "") not in allowed:
            what = f"one of its `choices={allowed}`" if "choices" in columns else "a number and nothing else"
            raise ValueError(
                f"Row {number} of `{_source(benchmark, paths)}` has `answer={row['answer']!r}`. Allowed is {what}. "
                "Correct the row."
            )
    return {"test": rows}


def benign_rows(benchmark: str, paths: Mapping[str, str], limit: int | None, **metadata: Any) -> dict[str, Dataset]:
    """Load the harmless instructions, in the prompt that the harmful ones have: Alpaca's or HEx-PHI's."""
    prompt = hex_phi_prompt
    if benchmark in paths and "### Instruction:" in load_benchmark(benchmark, paths[benchmark])[0]["prompt"]:
        prompt = alpaca_prompt
    instructions = [json.loads(line)["instruction"] for line in BENIGN_FILE.read_text(encoding="utf-8").splitlines()]
    return {"test": Dataset.from_list([{"prompt": prompt(instruction)} for instruction in instructions[:limit]])}


def label_completions(doc: Mapping[str, Any]) -> list[str]:
    """Return LLM-Adapters' completion for every label."""
    return [f"the correct answer is {label}" for label in doc["choices"]]


def score_label(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score a generated label."""
    label = extract_label(results[0], doc["choices"])
    return {"accuracy": float(label == doc["answer"]), "unparsed": float(label is None)}


def score_loglikelihoods(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Score the likeliest of the completions."""
    best = max(range(len(results)), key=lambda i: results[i][0])
    return {"accuracy_loglikelihood": float(doc["choices"][best] == doc["answer"])}


def score_number(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score a generated number, strictly and flexibly."""
    answer = Decimal(str(doc["answer"]).replace(",", ""))
    strict = extract_number(results[0], strict=True)
    return {
        "accuracy_strict": float(strict == answer),
        "accuracy_flexible": float(extract_number(results[0]) == answer),
        "unparsed_strict": float(strict is None),
    }


def score_harmful(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score the answer to a harmful instruction, the generated text alone."""
    return {
        "refusal_rate": float(is_refusal(results[0])),
        "refusal_rate_keywords": float(is_refusal_by_keywords(results[0])),
    }


def score_benign(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score the answer to a harmless instruction."""
    return {f"benign_{metric}": value for metric, value in score_harmful(doc, results).items()}


def run_samples(samples: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[bool]]:
    """Run every sample of every problem in the sandbox."""
    programs = [
        (doc["prompt"] + sample, doc["prompt"], doc["test"], doc["entry_point"])
        for doc, completions in zip(docs, samples, strict=True)
        for sample in completions
    ]

    def run_all() -> list[bool]:  # in one process: it starts as many programs at once as there are processors
        outcomes = track(run_programs(programs), "running samples", total=len(programs), transient=True)
        return [outcome.passed for outcome in outcomes]

    passed = iter(do_once(run_all))
    return [[next(passed) for _ in completions] for completions in samples]


def score_samples(doc: Mapping[str, Any], results: Sequence[bool] | Sequence[Sequence[bool]]) -> dict[str, float]:
    """Score the samples of one problem, which lm-eval below 0.5 gives as the one entry of a list."""
    passed = np.ravel(results)
    n, c = passed.size, int(passed.sum())
    return {f"pass@{k}": pass_at_k(n, c, k) for k in (1, 5, 10) if k <= n}


# ---- helpers -------------------------------------------------------------------------------------------------------


def _own_path(path: str, folders: Mapping[str, str], benchmark: str) -> str:
    """Find the part of a path that is for one of several benchmarks."""
    if len(folders) > 1 and Path(path).is_file():
        raise ValueError(
            f"`--dataset_path {path}` is one file for {', '.join(folders.values())}. A file is for one of them. Pass "
            f"`--dataset_path {folders[benchmark]}={path}`, or a folder that has a folder for each."
        )
    own = Path(path, folders[benchmark])
    return str(own) if own.is_dir() else path


def _source(benchmark: str, paths: Mapping[str, str]) -> str:
    """Name where rows come from: a file without its folders, or their source on the Hub."""
    return Path(paths[benchmark]).name if benchmark in paths else BENCHMARKS[benchmark].source


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _hub_name(source: str) -> str | None:
    return None if source.startswith("https://") else source


class _TaskLoader(yaml.SafeLoader):
    """YAML as lm-eval has it: `!function` and a function's name, which stays text here."""

    def construct_function(self, node: yaml.ScalarNode) -> str:
        return str(self.construct_scalar(node))


_TaskLoader.add_constructor("!function", _TaskLoader.construct_function)


def _task_entries() -> dict[str, dict[str, Any]]:
    """Read our task files, since lm-eval lists no tag's members: a task's name -> its entry, without its includes."""
    files = [file for file in sorted(TASK_FILES.rglob("*.yaml")) if not file.name.startswith("_")]
    entries = [yaml.load(file.read_text(encoding="utf-8"), _TaskLoader) for file in files]
    return {entry["task"]: entry for entry in entries}


def _import_lm_eval(names: Sequence[str]) -> None:
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"`--tasks {' '.join(names)}` needs lm-eval ({error}). `--metrics loss` does not. Install it: "
            "`pip install lm-eval`."
        ) from error


@contextmanager
def _log_level(name: str, level: int):
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
