"""`lori merge`: several adapters into one, by weights that are given or searched for."""

import argparse
from pathlib import Path
from typing import Any, cast

from ..recipes.find import find_recipe, validate_recipe
from .options import add_allow_modified, add_precision
from .terminal import show

_EXAMPLE = """
examples:
  lori merge math-lori-s me/code-lori-s --weights 0.5 0.4 --output_dir math-code
  lori merge --recipe table8_lori_s_concat.yaml --output_dir merged
  lori merge --into_base code-lori-s --output_dir code-model
  lori merge math-lori-s code-lori-s --search coordinate --heldout math.jsonl code.jsonl --output_dir math-code
"""


def add_parser(commands) -> None:
    merge = commands.add_parser(
        "merge",
        help="merge adapters into one, or into their base model",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_arguments(merge)
    merge.add_argument("--recipe", help="a YAML file or a shipped recipe's name; options go over it")
    merge.add_argument(
        "--into_base",
        action="store_true",
        help="write a whole model instead of an adapter: the base with the adapters added (default: merged-model)",
    )
    merge.add_argument("--push", metavar="REPO", help="with --into_base: push the model there, in one commit")
    add_precision(merge)
    add_allow_modified(merge)
    merge.add_argument("--overwrite", action="store_true", help="replace an adapter that is in --output_dir")
    merge.set_defaults(func=run)


def recipe_parser() -> argparse.ArgumentParser:
    """What a merge recipe may hold."""
    parser = argparse.ArgumentParser(prog="lori merge")
    _add_arguments(parser)
    return parser


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    methods = ["concat", "linear", "linear_peft", "magnitude", "ties", "dare", "dare_ties", "svd"]
    parser.add_argument("adapters", type=str, nargs="*", help="folders, compact files or names on the Hub")
    parser.add_argument("--output_dir", type=str, help="where to (default: merged-lori)")
    parser.add_argument("--weights", type=float, nargs="+", help="one for each adapter, or one for all (default: 1/n)")
    parser.add_argument(
        "--method",
        type=str,
        choices=methods,
        help="concat: the weighted sum, exactly, ranks add up (default); linear: A and B summed by themselves; "
        "linear_peft: with square roots of the weights; magnitude, ties, dare, dare_ties: pruned first, as PEFT does; "
        "svd: the weighted sum brought down to --rank",
    )
    parser.add_argument("--density", type=float, help="what magnitude, ties, dare and dare_ties keep, in (0, 1]")
    parser.add_argument("--rank", type=int, help="what svd is to leave (default: the adapters' highest)")
    parser.add_argument("--seed", type=int, help="of the random numbers of dare and dare_ties (default: 0)")
    parser.add_argument(
        "--base_model",
        type=str,
        help="the base model to record, and to search with; by default the one that the adapters name",
    )
    parser.add_argument(
        "--search",
        type=str,
        choices=["shared", "coordinate"],
        help="find the weights that give the lowest loss on --heldout: one for all adapters, or then one for each "
        "(default where --heldout is given and --weights is not: coordinate)",
    )
    parser.add_argument(
        "--heldout",
        type=str,
        nargs="+",
        help=".jsonl or .json files that no adapter was trained on; the objective "
        "is the mean over the files of the loss of a completion token",
    )
    parser.add_argument(
        "--grid", type=float, nargs="+", help="the weights to try (default: 0.12 to 1.3 in steps of 1.3)"
    )


def run(options: argparse.Namespace) -> None:
    from rich.table import Table

    from ..adapter.record import Merge, read_record
    from ..adapter.write import check_output
    from ..merging import merge_lori_adapters

    settings = {}
    if options.recipe is not None:
        settings = validate_recipe(find_recipe(options.recipe), recipe_parser())
    given = vars(options)
    for action in recipe_parser()._actions:
        if given.get(action.dest) not in (None, []):
            settings[action.dest] = given[action.dest]
    if isinstance(weights := settings.get("weights"), list) and len(weights) == 1:
        settings["weights"] = weights[0]
    adapters = settings.pop("adapters", [])
    strategy, heldout, grid = (settings.pop(key, None) for key in ("search", "heldout", "grid"))
    if strategy is None and heldout and "weights" not in settings:
        strategy = "coordinate"
    precision = {"dtype": options.dtype, "load_in_4bit": options.load_in_4bit or None}
    settings.setdefault("output_dir", "merged-model" if options.into_base else "merged-lori")
    check_output(settings["output_dir"], adapters, overwrite=options.overwrite)
    of_search = {
        "heldout": heldout,
        "grid": grid,
        **(precision if not options.into_base else {"load_in_4bit": precision["load_in_4bit"]}),
    }
    if strategy is not None:
        settings |= _search(adapters, strategy, heldout, grid, settings, _given(precision))
    elif unused := sorted(_given(of_search)):
        raise ValueError(
            f"`{' '.join(f'--{name}' for name in unused)}` without `--search`. What is for the search for "
            "weights has no other effect. Add `--search shared`, or leave it out."
        )
    if options.into_base:
        return _into_base(adapters, settings, options)
    if options.push is not None:
        raise ValueError(
            f"`--push {options.push}` without `--into_base`. It is for whole models. Push a merged adapter with "
            "`lori push`, or add `--into_base`."
        )
    folder = merge_lori_adapters(
        adapters, **settings, overwrite=options.overwrite, allow_modified=options.allow_modified
    )
    record = read_record(folder)
    merge = cast(Merge, record.merge)  # a merged adapter's record has it
    table = Table(title=f"merged by {merge.method}: {record.task}")
    for column in ("adapter", "task", "weight", "rank"):
        table.add_column(column, justify="right" if column in ("weight", "rank") else "left")
    for adapter in merge.adapters:
        table.add_row(adapter.source, adapter.task, f"{adapter.weight:g}", str(adapter.rank))
    show(table)
    if merge.lost is not None:
        show(_lost_table(merge.lost))
    show(f"saved to {folder}")


def _lost_table(lost: dict[str, float]):
    """Tabulate the share of each delta's norm that `svd` lost; experts share a cell, which shows the worst of them."""
    from rich.table import Table

    from ..method.layers import layer_of, projection_of

    cells: dict[int, dict[str, float]] = {}
    for path, share in lost.items():
        row = cells.setdefault(int(layer_of(path)), {})
        row[projection_of(path)] = max(share, row.get(projection_of(path), 0.0))
    columns = sorted({name for row in cells.values() for name in row})
    table = Table(title="lost of the norm, by module")
    for name in ("layer", *columns):
        table.add_column(name, justify="right")
    for layer, row in sorted(cells.items()):
        table.add_row(str(layer), *(f"{100 * row[name]:.1f} %" if name in row else "" for name in columns))
    return table


def _into_base(adapters: list[str], settings: dict[str, Any], options: argparse.Namespace) -> None:
    from ..merging import merge_into_base, push_model

    settings.pop("search", None)  # an adapter's record notes it; a whole model has none
    folder = merge_into_base(
        adapters, **settings, dtype=options.dtype, overwrite=options.overwrite, allow_modified=options.allow_modified
    )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    show(f"saved to {folder}, {size / 1e9:.3f} GB")
    if options.push is not None:
        show(push_model(folder, options.push).commit_url)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _search(adapters, strategy, heldout, grid, settings, precision) -> dict[str, Any]:
    """Search for the weights of a merge, and print what was tried. Returns the weights and the search's record."""
    from rich.table import Table

    from ..merging.search import search_merge_weights
    from ..recipes.data import LoriScriptArguments, load_training_data

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
    facts = {key: settings[key] for key in ("method", "density", "rank", "seed", "base_model") if key in settings}
    search = search_merge_weights(adapters, rows, strategy=strategy, grid=grid, **facts, **precision)
    table = Table(title=f"completion loss by weights, {strategy} search")
    for column in ("weights", *rows, *(["mean"] if len(rows) > 1 else [])):
        table.add_column(column, justify="right")
    for trial in (search.base, *search.trials):
        losses = [*trial.losses.values(), *([trial.objective] if len(rows) > 1 else [])]
        name = "base model" if trial is search.base else " ".join(f"{weight:g}" for weight in trial.weights)
        table.add_row(name, *(f"{loss:.4f}" for loss in losses), style="bold" if trial is search.best else None)
    show(table)
    return {"weights": list(search.best.weights), "search": search.record}
