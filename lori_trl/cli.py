"""The command line: `lori` and its commands, and `lori-sft`. All that prints is here."""

import argparse
import os
import shutil
import sys
import tempfile
import warnings
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from .recipes import (
    find_recipe,
    is_merge_recipe,
    list_recipes,
    nearest,
    read_recipe,
    recipe_facts,
    validate_recipe,
)

_SFT_EXAMPLE = """
several processes: --accelerate_config single | ddp | fsdp2 | zero3 | FILE, and --num_processes N

example:
  lori-sft --recipe code_lori_s.yaml --output_dir code-lori-s --per_device_train_batch_size 8
  lori-sft --accelerate_config ddp --num_processes 8 --recipe code_lori_s.yaml --output_dir code-lori-s
"""
_LAUNCH_FILES = {"single": "single_gpu", "ddp": "multi_gpu", "fsdp2": "fsdp2", "zero3": "zero3"}  # TRL's names


def main(arguments: list[str] | None = None) -> int:
    """Run `lori`. Returns the exit code: 0; 2 for a wrong call; 1 for a failed push."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["sft"]:
        return sft(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="lori",
        description="Train LoRI adapters.",
        epilog="example:\n  lori recipes list",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("sft", add_help=False, help="train an adapter (the same as lori-sft)")
    recipes = commands.add_parser(
        "recipes",
        help="the shipped recipes",
        epilog="example:\n  lori recipes copy code_lori_s.yaml my_recipe.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = recipes.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="list the shipped recipes")
    for action, what in (("show", "print a recipe"), ("validate", "check a recipe, all faults at once")):
        actions.add_parser(action, help=what).add_argument("recipe", help="a YAML file or a shipped recipe's name")
    copy = actions.add_parser("copy", help="copy a shipped recipe, to change it")
    copy.add_argument("recipe", help="a shipped recipe's name")
    copy.add_argument("target", type=Path, help="the new file")
    _add_tasks_command(commands)
    _add_merge_command(commands)
    _add_hub_commands(commands)
    _add_eval_command(commands)
    _add_inspect_command(commands)
    options = parser.parse_args(arguments)
    run = {"recipes": _recipes, "tasks": _tasks, "merge": _merge, "eval": _eval, "inspect": _inspect}
    run |= {"push": _push, "export": _export, "expand": _expand}
    with _bad_input("lori"):
        try:
            run[options.command](options)
        except RuntimeError as error:  # the call was right, the Hub was not
            print(f"lori: {error}", file=sys.stderr)
            return 1
    return 0


def _add_hub_commands(commands) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    push = commands.add_parser(
        "push",
        help="push an adapter's folder to the Hub, in one commit",
        epilog="example:\n  lori push code-lori-s me/code-lori-s --private",
        formatter_class=raw,
    )
    push.add_argument("folder", type=Path, help="the adapter's folder")
    push.add_argument("repo", help="the repository on the Hub, namespace/name; made if it is missing")
    push.add_argument("--private", action="store_true", default=None, help="make a private repository")
    push.add_argument("--revision", help="the branch; made if it is missing")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    push.add_argument(
        "--include", nargs="+", default=["peft"], choices=["peft", "compact"], help="which forms of the adapter"
    )
    push.add_argument("--dry-run", action="store_true", help="list the files and their sizes, and push nothing")
    export = commands.add_parser(
        "export",
        help="write an adapter as one small file",
        epilog="example:\n  lori export --compact code-lori-s code-lori-s.safetensors --dtype bfloat16",
        formatter_class=raw,
    )
    export.add_argument("--compact", action="store_true", required=True, help="the form: seed, positions and values")
    export.add_argument("folder", type=Path, help="the adapter's folder")
    export.add_argument("file", type=Path, help="the new file")
    export.add_argument("--dtype", choices=["bfloat16", "float16"], help="round the values; by default they are exact")
    expand = commands.add_parser(
        "expand",
        help="restore the plain PEFT files from the compact form",
        epilog="example:\n  lori expand code-lori-s.safetensors code-lori-s",
        formatter_class=raw,
    )
    expand.add_argument("file", type=Path, help="the compact file")
    expand.add_argument("folder", type=Path, help="where to")


def _add_tasks_command(commands) -> None:
    tasks = commands.add_parser(
        "tasks",
        help="who owns how much of an adapter's B; extract or remove a task",
        epilog="example:\n  lori tasks two-tasks --extract math --output_dir math-alone",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks.add_argument("adapter", help="the adapter: a folder, a compact file or a name on the Hub")
    change = tasks.add_mutually_exclusive_group()
    change.add_argument("--extract", metavar="TASK", help="write this task's own adapter")
    change.add_argument("--remove", metavar="TASK", help="write the adapter without this task")
    tasks.add_argument("--output_dir", type=Path, help="the new folder, for --extract and --remove")


def _tasks(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from .continual import extract_task, read_ledger, remove_task

    changed = options.extract or options.remove
    if (changed is None) != (options.output_dir is None):
        raise ValueError(
            f"`--output_dir {options.output_dir}` with {'a' if changed else 'no'} task to extract or remove. They go "
            "together. Pass both, or neither to see the ledger."
        )
    if changed is not None:
        (extract_task if options.extract else remove_task)(options.adapter, changed, options.output_dir)
    ledger = read_ledger(options.output_dir or options.adapter)
    table = Table("task, oldest first", title=f"{options.output_dir or options.adapter}: who owns B")
    for column in ("trained", "still its own", "of B", "steps", "rows"):
        table.add_column(column, justify="right")
    for task in ledger.tasks:
        facts = task.record["training"] or {}
        known = [facts.get("steps"), (facts.get("dataset") or {}).get("rows")]
        share = f"{100 * task.owned / ledger.numel:.2f} %"
        counts = [f"{task.trained:,}", f"{task.owned:,}", share]
        table.add_row(task.task, *counts, *("" if fact is None else f"{fact:,}" for fact in known))
    table.add_section()
    table.add_row("free", "", f"{ledger.free:,}", f"{100 * ledger.free / ledger.numel:.2f} %")
    Console().print(table)
    print(f"{ledger.more_tasks} more disjoint tasks of sparsity {ledger.sparsity:g} fit.")


_MERGE_EXAMPLE = """
examples:
  lori merge math-lori-s me/code-lori-s --weights 0.5 0.4 --output_dir math-code
  lori merge --recipe table8_lori_s_concat.yaml --output_dir merged
  lori merge math-lori-s code-lori-s --search coordinate --heldout math.jsonl code.jsonl --output_dir math-code
"""


def _add_merge_command(commands) -> None:
    merge = commands.add_parser(
        "merge",
        help="merge adapters into one",
        epilog=_MERGE_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_merge_arguments(merge)
    merge.add_argument("--recipe", help="a YAML file or a shipped recipe's name; options go over it")


def _merge_parser() -> argparse.ArgumentParser:
    """What a merge recipe may hold."""
    parser = argparse.ArgumentParser(prog="lori merge")
    _add_merge_arguments(parser)
    return parser


def _add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    methods = ["concat", "linear", "linear_peft", "magnitude", "ties", "dare"]
    parser.add_argument("adapters", type=str, nargs="*", help="folders, compact files or names on the Hub")
    parser.add_argument("--output_dir", type=str, help="where to (default: merged-lori)")
    parser.add_argument("--weights", type=float, nargs="+", help="one for each adapter, or one for all (default: 1/n)")
    parser.add_argument(
        "--method",
        type=str,
        choices=methods,
        help="concat: the weighted sum, exactly, ranks add up (default); linear: A and B summed by themselves; "
        "linear_peft: with square roots of the weights; magnitude, ties, dare: pruned first, as PEFT does",
    )
    parser.add_argument("--density", type=float, help="what magnitude, ties and dare keep, in (0, 1]")
    parser.add_argument("--seed", type=int, help="of dare's random numbers (default: 0)")
    parser.add_argument(
        "--base_model",
        type=str,
        help="the base model to record, and to search with; by default the one that the adapters name",
    )
    parser.add_argument(
        "--search",
        type=str,
        choices=["shared", "coordinate"],
        help="find the weights that give the lowest loss on --heldout: one for all adapters, or then one for each",
    )
    parser.add_argument(
        "--heldout",
        type=str,
        nargs="+",
        help=".jsonl or .json files that no adapter was trained on; the objective "
        "is the mean over the files of the loss of a completion token",
    )
    parser.add_argument("--grid", type=float, nargs="+", help="the weights to try (default: 0.1 to 1)")


def _merge(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from .adapter import read_lori_config
    from .merging import merge_lori_adapters

    settings = {}
    if options.recipe is not None:
        file = find_recipe(options.recipe)
        validate_recipe(file, _merge_parser())
        settings = {key: value for key, value in read_recipe(file).items() if value is not None}
    given = vars(options)
    for action in _merge_parser()._actions:
        if given.get(action.dest) not in (None, []):
            settings[action.dest] = given[action.dest]
    if isinstance(weights := settings.get("weights"), list) and len(weights) == 1:
        settings["weights"] = weights[0]
    adapters = settings.pop("adapters", [])
    strategy, heldout, grid = (settings.pop(key, None) for key in ("search", "heldout", "grid"))
    if strategy is not None:
        settings |= _search(adapters, strategy, heldout, grid, settings)
    elif heldout is not None or grid is not None:
        raise ValueError(
            f"`--heldout {heldout}`, `--grid {grid}` without `--search`. They are for the search for weights. Add "
            "`--search shared`, or leave them out."
        )
    folder = merge_lori_adapters(adapters, **settings)
    config = read_lori_config(folder)
    table = Table(title=f"merged by {config['merge']['method']}: {config['task']}")
    for column in ("adapter", "task", "weight", "rank"):
        table.add_column(column, justify="right" if column in ("weight", "rank") else "left")
    for adapter in config["merge"]["adapters"]:
        table.add_row(adapter["source"], adapter["task"], f"{adapter['weight']:g}", str(adapter["rank"]))
    Console().print(table)
    print(f"saved to {folder}")


def _search(adapters, strategy, heldout, grid, settings) -> dict[str, Any]:
    """Search for the weights of a merge, and print what was tried. Returns the weights and the search's record."""
    from rich.console import Console
    from rich.table import Table

    from .merging.search import GRID, search_merge_weights
    from .tasks import LoriScriptArguments, load_training_data

    if "weights" in settings:
        raise ValueError(
            f"`weights={settings['weights']}` and `--search` exclude each other: the search finds the weights. Leave "
            "one out."
        )
    names = {"/".join(Path(file).with_suffix("").parts[-2:]): file for file in heldout or []}
    if len(names) < len(heldout or []):
        raise ValueError(
            f"`--heldout {' '.join(heldout)}` names a file twice, or two files alike. Each must have a folder's and a "
            "file's name of its own. Rename one, or leave it out."
        )
    rows = {name: load_training_data(LoriScriptArguments(dataset_path=file))["train"] for name, file in names.items()}
    facts = {key: settings[key] for key in ("method", "density", "seed", "base_model") if key in settings}
    search = search_merge_weights(adapters, rows, strategy=strategy, grid=grid or GRID, **facts)
    table = Table(title=f"completion loss by weights, {strategy} search")
    for column in ("weights", *rows, *(["mean"] if len(rows) > 1 else [])):
        table.add_column(column, justify="right")
    for trial in (search.base, *search.trials):
        losses = [*trial.losses.values(), *([trial.objective] if len(rows) > 1 else [])]
        name = "base model" if trial is search.base else " ".join(f"{weight:g}" for weight in trial.weights)
        table.add_row(name, *(f"{loss:.4f}" for loss in losses), style="bold" if trial is search.best else None)
    Console().print(table)
    return {"weights": list(search.best.weights), "search": search.record}


def _push(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from .hub import adapter_files, push_lori_to_hub

    if options.dry_run:
        with adapter_files(options.folder, options.repo, options.include) as files:
            table = Table("file", "bytes", title=f"{options.folder} -> {options.repo}")
            for name, file in files.items():
                table.add_row(name, f"{file.stat().st_size:,}")
            table.add_row("together", f"{sum(file.stat().st_size for file in files.values()):,}")
        Console().print(table)
        return
    commit = push_lori_to_hub(
        options.folder,
        options.repo,
        private=options.private,
        revision=options.revision,
        create_pr=options.create_pr,
        include=options.include,
    )
    print(commit.pr_url or commit.commit_url)


def _export(options: argparse.Namespace) -> None:
    import torch

    from .compact import export_compact

    dtype = getattr(torch, options.dtype) if options.dtype else None
    file = export_compact(options.folder, options.file, dtype=dtype)
    print(f"{file}: {file.stat().st_size:,} bytes")


def _expand(options: argparse.Namespace) -> None:
    from .compact import expand

    expand(options.file, options.folder)
    print(f"{options.folder}: the plain PEFT adapter")


def _add_eval_command(commands) -> None:
    evaluation = commands.add_parser(
        "eval",
        help="evaluate adapters beside their base model",
        epilog="example:\n  lori eval code-lori-s math-lori-s --tasks gsm8k boolq safety\n"
        "  lori eval code-lori-s --metrics loss --dataset_path held_out.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = evaluation.add_argument
    add("models", nargs="*", metavar="MODEL", help="adapters: folders, compact files, repositories; or model folders")
    add("--base_model", help="the base model; by default the one that the adapters name")
    add("--tasks", nargs="+", default=[], help="nlu, math, code, safety, or single ones: boolq, gsm8k, humaneval, ...")
    add("--metrics", nargs="+", default=[], choices=["loss"], help="loss: of the completions in the local data")
    add(
        "--dataset_path",
        nargs="+",
        default=[],
        metavar="[TASK=]PATH",
        help="local data, a .jsonl or .json file or a folder, for all tasks or for one; by default those on the Hub",
    )
    add("--limit", type=int, help="take the first so many rows of each set")
    add("--batch_size", type=int, default=8, help="sequences at a time (default: 8)")
    add("--max_new_tokens", type=int, help="the longest answer (default: 512)")
    add("--num_samples", type=int, help="samples a HumanEval problem (default: 20)")
    add("--seed", type=int, default=42, help="of the samples (default: 42)")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights")
    add("--allow_code_execution", action="store_true", help="run the code that models write, in a sandbox")
    add("--output_path", type=Path, help="one more JSON file, with the results of all models and the base")


def _eval(options: argparse.Namespace) -> None:
    from rich.console import Console

    from .evaluation import models, results
    from .evaluation.harness import evaluate, load_tasks
    from .evaluation.loss import held_out_rows, measure_loss

    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT and transformers about each other's names
    for name in ("limit", "batch_size", "max_new_tokens", "num_samples"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"`--{name} {value}` is too few. Allowed are 1 and more. Pass a positive number.")
    if not options.tasks and not options.metrics:
        raise ValueError(
            "Neither `--tasks` nor `--metrics` is given. Allowed are tasks such as boolq, gsm8k, safety or humaneval, "
            "and `--metrics loss`. Pass what to measure."
        )
    paths = _local_data(options.dataset_path)
    base_name = models.find_base_model(options.base_model, options.models)
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
        held_out = {path: held_out_rows(path, options.limit) for path in paths.values()}
    tasks = {}
    if options.tasks:
        tasks = load_tasks(
            options.tasks,
            paths=paths,
            limit=options.limit,
            max_new_tokens=options.max_new_tokens,
            num_samples=options.num_samples,
            allow_code_execution=options.allow_code_execution,
        )
    console = Console()
    compared, on_file = {}, []

    def measure(name: str, label: str, model, tokenizer, base: str | None) -> None:
        console.print(f"{label}:")
        figures = [measure_loss(model, tokenizer, path, rows, options.batch_size) for path, rows in held_out.items()]
        if tasks:
            figures += evaluate(model, tokenizer, tasks, batch_size=options.batch_size, seed=options.seed)
        compared[label] = figures
        new = results.records(figures, name, base)
        on_file.extend(new)
        if name in folders:
            results.write_results(name, new)
        if options.output_path is not None:
            results.write_file(options.output_path, on_file)

    whole = [name for name in options.models if models.is_whole_model(name)]
    if base_name is not None:
        model, tokenizer = models.load_model(base_name, options.dtype)
        adapters = [name for name in options.models if name not in whole]
        for name in adapters:
            with models.with_adapter(model, name):  # whatever does not fit fails before hours of work
                pass
        measure(base_name, "base", model, tokenizer, None)
        for name in adapters:
            with models.with_adapter(model, name) as adapted:
                own = models.own_tokenizer(name, tokenizer)
                measure(name, _label(name, options.models), adapted, own, base_name)
        del model
    for name in whole:
        measure(name, _label(name, options.models), *models.load_model(name, options.dtype), None)
    console.print(results.results_table(compared))
    elsewhere = [name for name in options.models if name not in folders]
    if elsewhere and options.output_path is None:
        print(f"No file was written for {', '.join(elsewhere)}: `--output_path FILE` writes one for all models.")


def _label(name: str, names: list[str]) -> str:
    """Name a model by the last part of its path, if no other ends so."""
    last = Path(name).name
    return name if [Path(other).name for other in names].count(last) > 1 or last == "base" else last


def _local_data(given: list[str]) -> dict[str | None, str]:
    """Parse `[TASK=]PATH`: task, or None for all, -> path."""
    paths = {}
    for text in given:
        task, equals, path = text.partition("=")
        if Path(text).exists() or not equals:
            task, path = None, text
        if task in paths:
            raise ValueError(
                f"`--dataset_path {' '.join(given)}` has two paths for {task or 'all tasks'}. Allowed is one. Pass "
                "`TASK=PATH` for each task."
            )
        if not Path(path).exists():
            raise FileNotFoundError(
                f"`--dataset_path {text}` does not exist. Allowed is a .jsonl or .json file or a folder, with `TASK=` "
                "before it if it is for one task. Correct the path."
            )
        paths[task] = path
    return paths


def _add_inspect_command(commands) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show where tasks train, and how far their masks and deltas meet",
        epilog="example:\n  lori inspect safety-lori code-lori --html interference.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect.add_argument("adapters", nargs="+", help="folders or Hub names of LoRI or plain LoRA adapters")
    inspect.add_argument("--save", type=Path, metavar="FILE.png|FOLDER", help="draw one picture, or a folder of them")
    inspect.add_argument("--html", type=Path, metavar="FILE", help="write one page that needs no network")
    inspect.add_argument("--json", metavar="FILE", help="write the numbers; - for the standard output, without tables")


def _inspect(options: argparse.Namespace) -> None:
    import json

    from rich.console import Console
    from rich.progress import track

    from .files import replacing
    from .inspection import inspect_adapters, inspection_sections, render_page, render_picture, render_pictures
    from .terminal import printable

    to_screen = options.json == "-"
    json_file = Path(options.json) if options.json and not to_screen else None
    one_picture = options.save is not None and options.save.suffix == ".png"
    for option, file in (("save", options.save), ("html", options.html), ("json", json_file)):
        if file is not None:
            _check_target(option, file, folder=option == "save" and not one_picture)
    console = Console(stderr=True)
    inspection = inspect_adapters(
        options.adapters,
        track=lambda paths: track(paths, "reading", console=console, transient=True, disable=not console.is_terminal),
    )
    sections = inspection_sections(inspection)
    numbers = json.dumps(inspection.to_dict(), indent=1, allow_nan=False) + "\n"
    files: dict[Path, bytes] = {}
    if json_file is not None:
        files[json_file] = numbers.encode()
    if options.html is not None:
        files[options.html] = render_page(inspection, sections).encode()
    if one_picture:
        files[options.save] = render_picture(sections)
    elif options.save is not None:
        files |= {options.save / f"{key}.png": picture for key, picture in render_pictures(sections).items()}
        options.save.mkdir(exist_ok=True)
    for file, contents in files.items():
        with replacing(file) as partial:
            partial.write_bytes(contents)
    if to_screen:
        print(numbers, end="")
        return
    console = Console()
    for section in sections:
        console.print(section.for_terminal(), "")
    for line in [*(f"- {note}" for note in inspection.notes), *(f"written: {file}" for file in files)]:
        console.print(printable(line), highlight=False)


def _check_target(option: str, target: Path, *, folder: bool) -> None:
    """Raise unless a file or folder can be written, before work goes into what to write."""
    wrong_kind = target.is_file() or (target.suffix and not target.is_dir()) if folder else target.is_dir()
    if wrong_kind or not os.access(target if target.is_dir() else target.parent, os.W_OK | os.X_OK):
        allowed = "a file that ends in .png, or a folder," if option == "save" else "a file"
        raise OSError(
            f"`--{option} {target}` cannot be written. Allowed is {allowed} in a folder that exists and is writable. "
            "Pass another, or make the folder above it."
        )


def _recipes(options: argparse.Namespace) -> None:
    if options.action == "list":
        from rich.console import Console
        from rich.table import Table

        table = Table("recipe", "task", "base", "variant", "rank", "source", box=None, padding=(0, 1, 0, 0))
        merges = Table("for lori merge", "adapters", "weights", "method", "density", box=None, padding=(0, 1, 0, 0))
        runs = []
        for file in list_recipes():
            if is_merge_recipe(file):
                recipe = read_recipe(file)
                values = ", ".join(recipe["adapters"]), recipe["weights"], recipe["method"], recipe.get("density", "")
                merges.add_row(file.name, *map(str, values))
            else:
                *facts, measured = recipe_facts(file).values()
                table.add_row(file.name, *facts)
                runs += [f"run here: {file.name}: {measured}"] if measured else []
        console = Console(width=max(Console().width, 120))  # no name is cut, in a pipe neither
        console.print(table, *runs, "", merges, sep="\n", highlight=False, soft_wrap=True)
        return
    file = find_recipe(options.recipe)
    if options.action == "show":
        print(file.read_text(encoding="utf-8"), end="")
    elif options.action == "validate":
        validate_recipe(file, _merge_parser() if is_merge_recipe(file) else _sft_parser())
        print(f"{file.name}: no faults")
    elif options.target.exists():
        raise FileExistsError(
            f"`{options.target}` exists. A copy goes to a new file. Choose another name or delete it."
        )
    else:
        shutil.copyfile(file, options.target)


def sft(arguments: list[str] | None = None) -> int:
    """Run `lori-sft`. Returns the exit code: 0; 2 for a wrong call; a failed run raises."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--accelerate_config" in arguments:
        return _launch(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL and transformers about each other's names
    with _bad_input("lori-sft"):
        parser = _sft_parser()
        script, args, model_args, recipe = _parse_sft(parser, arguments)
        if script.dry_run:
            _dry_run(script, args, model_args)
            return 0
        trainer = _build_trainer(script, args, model_args)
    trainer.recipe = recipe
    resume = args.resume_from_checkpoint
    with _bad_input("lori-sft", (ValueError, FileNotFoundError)):
        output = trainer.train(True if str(resume).lower() == "true" else resume)
    trainer.save_model()
    metrics = output.metrics
    if trainer.eval_dataset is not None:
        evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        metrics |= trainer.evaluate()
        metrics["initial_eval_loss"] = [*evaluations, metrics["eval_loss"]][0]
    trainer.save_metrics("all", metrics, combined=False)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    if trainer.is_world_process_zero():
        _print_outcome(trainer, metrics)
    trainer.end()
    return 0


def _launch(arguments: list[str]) -> int:
    """Start `lori-sft` on several processes, with one of the launch files that TRL ships or a file of one's own."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--accelerate_config")
    finder.add_argument("--num_processes")
    options, rest = finder.parse_known_args(arguments)
    with _bad_input("lori-sft"):
        name = _LAUNCH_FILES.get(options.accelerate_config, options.accelerate_config)
        if not Path(name).is_file() and name not in _LAUNCH_FILES.values():
            raise FileNotFoundError(
                f"`--accelerate_config {name}` is neither a file nor a shipped launch file. Shipped are "
                f"{', '.join(_LAUNCH_FILES)}. Pass one of these, or a file that `accelerate config` wrote."
            )
    launch = resolve_accelerate_config_argument(["--accelerate_config", name])
    if options.num_processes is not None:
        launch += ["--num_processes", options.num_processes]
    launch_command(launch_command_parser().parse_args([*launch, "--module", "lori_trl.cli", "sft", *rest]))
    return 0


def _sft_parser():
    from trl import ModelConfig, TrlParser

    from .config import LoriSFTConfig
    from .tasks import LoriScriptArguments

    class Parser(TrlParser):
        def error(self, message: str):  # argparse would print pages of usage first
            raise ValueError(f"{message}. `lori-sft --help` lists what is allowed. Correct the call.")

    parser = Parser(
        (LoriScriptArguments, LoriSFTConfig, ModelConfig),
        prog="lori-sft",
        allow_abbrev=False,
        description="Train a LoRI adapter: calibrate, select the mask, adapt.",
        epilog=_SFT_EXAMPLE,
        formatter_class=_HelpFormatter,
    )
    parser.set_defaults(use_peft=True, lora_target_modules="all-linear")
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def _parse_sft(parser, arguments: list[str]) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Parse recipe and command line. Returns the three configurations and the recipe as it is run."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe")
    name = finder.parse_known_args(arguments)[0].recipe
    recipe = {}
    if name is not None:
        file = find_recipe(name)
        if file.parent.name == "baselines":
            raise ValueError(
                f"`--recipe {name}` is a baseline for TRL's own trainer. `lori-sft` trains LoRI adapters. Run it with "
                f"`trl sft --config {file}`."
            )
        validate_recipe(file, parser)
        recipe = read_recipe(file)
        arguments = ["--config", str(file), *arguments]
    *configs, unknown = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise ValueError(
            f"`{unknown[0]}` is no option{nearest(unknown[0], known)}. `lori-sft --help` lists all. Correct it."
        )
    script, args, model_args = configs
    if model_args.model_name_or_path is None:
        raise ValueError(
            "`model_name_or_path` is missing. It names the base model, on the Hub or in a folder. Pass e.g. "
            "`--model_name_or_path meta-llama/Meta-Llama-3-8B`, or a `--recipe` that does."
        )
    given = {
        argument.lstrip("-").partition("=")[0].replace("-", "_") for argument in arguments if argument[:2] == "--"
    }
    for config in configs:
        set_here = {key: value for key, value in vars(config).items() if key in given}
        recipe |= {key: value.value if isinstance(value, Enum) else value for key, value in set_here.items()}
    for one, other in (("dataset_path", "dataset_name"), ("dataset_name", "dataset_path")):
        if one in given and other not in given:  # one's own data in place of the recipe's
            setattr(script, other, None)
            recipe.pop(other, None)
    for secret_or_ours in ("hub_token", "env", "recipe", "dry_run"):
        recipe.pop(secret_or_ours, None)
    script.recipe = str(file) if name is not None else None
    return script, args, model_args, recipe


def _dry_run(script, args, model_args) -> None:
    from peft import PeftConfig
    from rich.console import Console
    from transformers import AutoConfig
    from trl import get_peft_config

    from .counting import KNOWN_CONFIGS, count_parameters

    peft_config = get_peft_config(model_args)
    if script.adapter_name_or_path is not None:
        peft_config = PeftConfig.from_pretrained(script.adapter_name_or_path)
    config = KNOWN_CONFIGS.get(model_args.model_name_or_path) or AutoConfig.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
    )
    counts = count_parameters(config, peft_config, args.sparsity)
    Console().print(counts.table(), counts.memory_table(_bytes_of_base(model_args)))


def _bytes_of_base(model_args) -> float:
    if model_args.load_in_4bit:
        return 0.56  # NF4: half a byte, and a float32 scale every 64 entries
    if model_args.load_in_8bit:
        return 1.0
    return {"bfloat16": 2.0, "float16": 2.0}.get(model_args.dtype, 4.0)


def _build_trainer(script, args, model_args):
    from transformers import AutoTokenizer
    from trl import get_peft_config, get_quantization_config
    from trl.trainer.utils import create_model_from_path

    from .adapter import load_lori_adapter
    from .tasks import data_name, load_training_data
    from .trainer import LoriSFTTrainer

    data = load_training_data(script, args.dataset_text_field)
    evaluated = args.eval_strategy != "no" or args.eval_on_start
    if evaluated and script.dataset_test_split not in data:
        raise ValueError(
            f"`eval_strategy={args.eval_strategy.value}`, `eval_on_start={args.eval_on_start}`: the split "
            f"{script.dataset_test_split!r} is needed, and the data have {', '.join(data)}. Pass one of these as "
            "`dataset_test_split`, or evaluate nothing."
        )
    if args.task_name is None:
        args.task_name = data_name(script)
    _check_writable(args.output_dir)
    model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
        **(args.model_init_kwargs or {}),
    }
    args.model_init_kwargs = None
    model = create_model_from_path(model_args.model_name_or_path, **model_init_kwargs)
    peft_config = get_peft_config(model_args)
    if script.adapter_name_or_path is not None:
        model = load_lori_adapter(model, script.adapter_name_or_path, is_trainable=True)
        peft_config = None
    return LoriSFTTrainer(
        model,
        args,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if evaluated else None,
        processing_class=AutoTokenizer.from_pretrained(
            model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
        ),
        peft_config=peft_config,
    )


def _check_writable(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(
            f"`output_dir={folder}` cannot be written: {error.strerror}. A folder is needed in which files can be "
            "made. Pass another `--output_dir`."
        ) from error


def _print_outcome(trainer, metrics: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    masks, counts = trainer.masks, trainer.lori_config["counts"]
    table = Table(show_header=False, title=f"{trainer.lori_config['variant']} adapter {trainer.task_name!r}")
    table.add_row("plain LoRA would train", f"{counts['lora']:,}")
    table.add_row(
        "LoRI trained", f"{counts['selected']:,} ({100 * counts['selected'] / counts['lora']:.2f} % of LoRA)"
    )
    table.add_row("density", f"{masks.num_selected:,} / {masks.numel:,} = {masks.density:.8f}")
    if "eval_loss" in metrics:
        table.add_row("held-out loss, first evaluation", f"{metrics['initial_eval_loss']:.4f}")
        table.add_row("held-out loss, at the end", f"{metrics['eval_loss']:.4f}")
    table.add_row("saved to", trainer.args.output_dir)
    Console().print(table)


@contextmanager
def _bad_input(program: str, errors: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, ImportError)):
    """Turn an error about the input into one message and exit code 2."""
    try:
        yield
    except errors as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    sys.exit(main())
