"""`lori tasks`: who owns how much of an adapter's B; extract or remove a task."""

import argparse
from pathlib import Path

from .options import add_allow_modified
from .terminal import show


def add_parser(commands) -> None:
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
    add_allow_modified(tasks)
    tasks.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    from rich.table import Table

    from ..adapter.vllm_limits import describe_rank
    from ..continual import extract_task, read_ledger, remove_task

    changed = options.extract or options.remove
    if (changed is None) != (options.output_dir is None):
        raise ValueError(
            f"`--output_dir {options.output_dir}` with {'a' if changed else 'no'} task to extract or remove. They go "
            "together. Pass both, or neither to see the ledger."
        )
    if changed is not None:
        change = extract_task if options.extract else remove_task
        change(options.adapter, changed, options.output_dir, allow_modified=options.allow_modified)
    ledger = read_ledger(options.output_dir or options.adapter, allow_modified=options.allow_modified)
    table = Table("task, oldest first", title=f"{options.output_dir or options.adapter}: who owns B")
    for column in ("columns", "trained", "still its own", "of B", "steps", "rows"):
        table.add_column(column, justify="right")
    for task in ledger.tasks:
        run = task.record.training
        known = [run and run.steps, run and run.dataset and run.dataset.rows]
        share = f"{100 * task.owned / ledger.numel:.2f} %"
        first, last = task.columns
        counts = [f"{first + 1} to {last}", f"{task.trained:,}", f"{task.owned:,}", share]
        table.add_row(task.task, *counts, *("" if fact is None else f"{fact:,}" for fact in known))
    table.add_section()
    table.add_row("free", "", "", f"{ledger.free:,}", f"{100 * ledger.free / ledger.numel:.2f} %")
    show(table)
    if any(task.columns != (0, ledger.rank) for task in ledger.tasks):
        show(f"It was grown, and has {describe_rank(ledger.rank)}.")
    show(f"{ledger.more_tasks} more disjoint tasks of sparsity {ledger.sparsity:g} fit.")
