"""`lori eval`: adapters beside their base model."""

import argparse
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .options import add_allow_modified, add_precision
from .targets import check_targets
from .terminal import show


def add_parser(commands) -> None:
    evaluation = commands.add_parser(
        "eval",
        help="evaluate adapters beside their base model",
        epilog="example:\n  lori eval code-lori-s math-lori-s --tasks gsm8k boolq safety\n"
        "  lori eval code-lori-s --metrics loss --dataset_path held_out.jsonl\n"
        "  lori eval --sequence safety-lori then-math-lori --dataset_path safety=a.jsonl math=b.jsonl\n"
        "  accelerate launch --multi_gpu -m lori_trl.cli eval code-lori-s --tasks nlu",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = evaluation.add_argument
    add("models", nargs="*", metavar="MODEL", help="adapters: folders, compact files, repositories; or model folders")
    add("--base_model", help="the base model; by default the one that the adapters name")
    add("--tasks", nargs="+", default=[], help="nlu, math, code, safety, or single ones: boolq, gsm8k, humaneval, ...")
    add(
        "--metrics",
        nargs="+",
        default=[],
        choices=["loss"],
        help="loss: of completions, answers or text in local data",
    )
    add(
        "--dataset_path",
        nargs="+",
        default=[],
        metavar="[NAME=]PATH",
        help="local data, a .jsonl, .json, .csv or .parquet file or a folder, for all tasks or for one, or, with the "
        "loss, under a name for the table; by default those on the Hub",
    )
    add(
        "--sequence",
        action="store_true",
        help="the models are stages of one adapter, a task more in each: the loss of every task after every stage, "
        "and what was forgotten; the first sets of --dataset_path are the tasks', in the same order",
    )
    add("--limit", type=int, help="take the first so many rows of each set")
    add("--batch_size", type=int, default=8, help="sequences at a time (default: 8)")
    add("--max_new_tokens", type=int, help="the longest answer (default: 512)")
    add("--num_samples", type=int, help="samples a HumanEval problem (default: 20)")
    add("--seed", type=int, default=42, help="of the samples (default: 42)")
    add_precision(evaluation)
    add("--allow_code_execution", action="store_true", help="run the code that models write, in a sandbox")
    add("--require_isolation", action="store_true", help="refuse to run it on a machine without namespaces")
    add("--output_path", type=Path, help="one more JSON file, with the results of all models and the base")
    add("--overwrite", action="store_true", help="replace the file of --output_path if it exists")
    add(
        "--markdown",
        action="store_true",
        help="print the table as Markdown, with the paper's figures where it has any",
    )
    add_allow_modified(evaluation)
    evaluation.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    from ..evaluation.processes import all_processes

    with all_processes() as is_writer:
        _run(options, is_writer)


def _run(options: argparse.Namespace, is_writer: bool) -> None:
    from ..adapter.folder import open_adapter
    from ..evaluation import models, results
    from ..evaluation.harness import evaluate, load_tasks
    from ..evaluation.loss import measure_loss
    from ..evaluation.paper_figures import markdown_table, paper_figures

    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT and transformers about each other's names
    for name in ("limit", "batch_size", "max_new_tokens", "num_samples"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"`--{name} {value}` is too few. Allowed are 1 and more. Pass a positive number.")
    if options.sequence:
        return _run_sequence(options, is_writer)
    if not options.tasks and not options.metrics:
        raise ValueError(
            "Neither `--tasks` nor `--metrics` is given. Allowed are tasks such as boolq, gsm8k, safety or humaneval, "
            "and `--metrics loss`. Pass what to measure."
        )
    paths = _local_data(options.dataset_path)
    inputs = [*options.models, *paths.values()]
    check_targets({"--output_path": options.output_path}, inputs, overwrite=options.overwrite)
    base_name = models.find_base_model(options.base_model, options.models, allow_modified=options.allow_modified)
    folders = [name for name in options.models if os.path.isdir(name) and os.access(name, os.W_OK)]
    for folder in folders:
        results.read_results(folder)
    held_out = {}
    if "loss" in options.metrics:
        if not paths:
            raise ValueError(
                "`--metrics loss` has no data. It needs a local file with prompts and completions. Pass "
                "`--dataset_path held_out.jsonl`."
            )
        held_out = _held_out(paths, options.limit)
    tasks = {}
    if options.tasks:
        tasks = load_tasks(
            options.tasks,
            paths=paths,
            limit=options.limit,
            max_new_tokens=options.max_new_tokens,
            num_samples=options.num_samples,
            allow_code_execution=options.allow_code_execution,
            require_isolation=options.require_isolation,
        )
    tokenizers = _tokenizers(options, base_name, held_out)
    compared, on_file, paper = {}, [], {}

    def measure(name: str, label: str, model, tokenizer, base: str | None) -> None:
        show(f"{label}:")
        sets = held_out if tokenizers[name] is not None else {}
        figures = [
            measure_loss(model, tokenizers[name], path, rows, options.batch_size, task)
            for task, (path, rows) in sets.items()
        ]
        for each in figures:
            if not math.isfinite(each.value):
                show(f"{label}: the loss of {each.task} is {each.value}, no number, and is not written")
        if tasks:
            figures += evaluate(model, tokenizer, tasks, batch_size=options.batch_size, seed=options.seed)
        compared[label] = figures
        if not is_writer:
            return
        new = results.records(figures, name, base)
        on_file.extend(new)
        if name in folders:
            results.write_results(name, new)
        if options.output_path is not None:
            results.write_file(options.output_path, on_file)

    precision = {"dtype": options.dtype or "float32", "load_in_4bit": options.load_in_4bit}
    whole = [name for name in options.models if models.is_whole_model(name)]
    if base_name is not None:
        model, tokenizer = models.load_model(base_name, **precision)
        adapters = [name for name in options.models if name not in whole]
        for name in adapters:
            with models.with_adapter(model, name, allow_modified=options.allow_modified):
                pass  # whatever does not fit fails before hours of work
            with open_adapter(name, allow_modified=options.allow_modified) as adapter:
                paper[_label(name, options.models)] = paper_figures(adapter)
        measure(base_name, "base", model, tokenizer, None)
        for name in adapters:
            with models.with_adapter(model, name, allow_modified=options.allow_modified) as (adapted, own):
                measure(name, _label(name, options.models), adapted, own or tokenizer, base_name)
        del model
    for name in whole:
        measure(name, _label(name, options.models), *models.load_model(name, **precision), None)
    if options.markdown:
        show(markdown_table(compared, paper))
    else:
        show(results.results_table(compared))
    elsewhere = [name for name in options.models if name not in folders]
    if elsewhere and options.output_path is None:
        show(f"No file was written for {', '.join(elsewhere)}: `--output_path FILE` writes one for all models.")


def _run_sequence(options: argparse.Namespace, is_writer: bool) -> None:
    """Measure the loss of every set after every stage, and say what was forgotten."""
    from importlib.util import find_spec

    from ..evaluation import models
    from ..evaluation.loss import measure_loss
    from ..evaluation.sequence import SequenceResults, sequence_results

    if options.tasks:
        raise ValueError(
            f"`--sequence` with `--tasks {' '.join(options.tasks)}`: a sequence is measured by the loss on your own "
            "rows. Allowed is `--dataset_path`, one set for each adapter. Leave `--tasks` out."
        )
    paths = {name or Path(path).stem: path for name, path in _local_data(options.dataset_path).items()}
    stages = ["base", *(_label(name, options.models) for name in options.models)]
    empty = ((),) * len(stages)
    SequenceResults(tuple(stages), tuple(paths), (), empty, empty)  # raises where there are too few sets
    picture = options.output_path.with_suffix(".png") if options.output_path and find_spec("matplotlib") else None
    targets = {"--output_path": options.output_path, "the picture": picture}
    check_targets(targets, [*options.models, *paths.values()], overwrite=options.overwrite)
    base_name = models.find_base_model(options.base_model, options.models, allow_modified=options.allow_modified)
    if base_name is None:
        raise ValueError(
            f"`--sequence {' '.join(options.models)}` are whole models. A sequence is one base model and the adapters "
            "that were trained on it, one after another. Pass adapters."
        )
    held_out = _held_out(paths, options.limit)
    tokenizers = _tokenizers(options, base_name, held_out, base_is_needed=True)
    model, _ = models.load_model(base_name, dtype=options.dtype or "float32", load_in_4bit=options.load_in_4bit)

    def measure(label: str, model, tokenizer) -> list:
        show(f"{label}:")
        return [
            measure_loss(model, tokenizer, path, rows, options.batch_size, task)
            for task, (path, rows) in held_out.items()
        ]

    figures = [measure("base", model, tokenizers[base_name])]
    for name, label in zip(options.models, stages[1:], strict=True):
        with models.with_adapter(model, name, allow_modified=options.allow_modified) as (adapted, _):
            figures.append(measure(label, adapted, tokenizers[name]))
    results = sequence_results(stages, list(paths), figures)
    show(results.table(), *results.sentences())
    if is_writer and options.output_path is not None:
        show(f"written to {results.write(options.output_path)}")
        if picture is not None:
            show(f"drawn in {results.draw(picture)}")


def _held_out(paths: Mapping[Any, str], limit: int | None) -> dict[str, tuple[str, Any]]:
    """Read held-out rows: name -> path and rows. The name is the one that was given, or made of the path."""
    from ..evaluation.loss import held_out_rows, name_of_rows

    held_out: dict[str, tuple[str, Any]] = {}
    for given, path in paths.items():
        if (name := given or name_of_rows(path)) in held_out:
            raise ValueError(
                f"`--dataset_path {path}` and `{held_out[name][0]}` are both called {name!r}. Each set has a name of "
                "its own in the table. Pass `NAME=PATH`."
            )
        held_out[name] = path, held_out_rows(path, limit)
    return held_out


def _tokenizers(
    options: argparse.Namespace,
    base_name: str | None,
    held_out: Mapping[str, tuple[str, Any]],
    *,
    base_is_needed=False,
) -> dict[str, Any]:
    """
    Load every model's tokenizer, and check that it takes the held-out rows: before any model is loaded.

    A base without a chat template is measured with an adapter's tokenizer, if the adapter has no new tokens.

    Returns:
        `dict[str, Any]`: model -> tokenizer; `None` for a base that cannot be measured on these rows.
    """
    from transformers import AutoConfig

    from ..evaluation import models
    from ..training.tokenizer_checks import check_tokenizer

    def check(tokenizer: Any) -> None:
        for path, rows in held_out.values():
            check_tokenizer(rows, tokenizer, Path(path).name)

    base = None if base_name is None else models.load_tokenizer_of(base_name)
    tokenizers = {}
    for name in options.models:
        if models.is_whole_model(name):
            tokenizers[name] = models.load_tokenizer_of(name)
        else:
            tokenizers[name] = models.adapter_tokenizer(name, allow_modified=options.allow_modified) or base
        check(tokenizers[name])
    if base_name is None:
        return tokenizers
    try:
        check(base)
        return tokenizers | {base_name: base}
    except ValueError as fault:
        rows = AutoConfig.from_pretrained(base_name).get_text_config().vocab_size
        others = [name for name in options.models if len(tokenizers[name]) <= rows]
        if not options.models or (base_is_needed and not others):
            raise
        how = f"with the tokenizer of {others[0]}" if others else "on tasks alone"
        show(f"base: measured {how}, for the base's own does not take the rows: {fault}")
        return tokenizers | {base_name: tokenizers[others[0]] if others else None}


def _label(name: str, names: list[str]) -> str:
    """Name a model by the last part of its path, if no other ends so."""
    last = Path(name).name
    return name if [Path(other).name for other in names].count(last) > 1 or last == "base" else last


def _local_data(given: list[str]) -> dict[str | None, str]:
    """Parse `[TASK=]PATH`: task, or None for all, -> path."""
    paths: dict[str | None, str] = {}
    for text in given:
        first, equals, rest = text.partition("=")
        task, path = (None, text) if Path(text).exists() or not equals else (first, rest)
        if task in paths:
            raise ValueError(
                f"`--dataset_path {' '.join(given)}` has two paths for {task or 'all tasks'}. Allowed is one. Pass "
                "`TASK=PATH` for each task."
            )
        if not Path(path).exists():
            raise FileNotFoundError(
                f"`--dataset_path {text}` does not exist. Allowed is a .jsonl, .json, .csv or .parquet file or a "
                "folder, with `TASK=` before it if it is for one task. Correct the path."
            )
        paths[task] = path
    return paths
