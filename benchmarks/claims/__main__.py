"""The study behind `docs/results.md`.

    python -m benchmarks.claims --data DATA [--only masks merging] [--workers 2]     goes on where it was
    python -m benchmarks.claims --data DATA --again KEY                              a cell again: the same figures?
    python -m benchmarks.claims --report                                             tables and pictures

DATA holds safety/, gsm8k/ and code/, each with train.jsonl and test.jsonl in TRL's prompt-completion form.
Figures go to `benchmarks/results/claims.jsonl`, one line a cell; adapters and masks to the cache, from which nothing
is needed for the report. What is missing in the cache is made again.
"""

import argparse
import multiprocessing
import os
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .cells import Cell
from .parts import PARTS, plan
from .setting import RESULTS
from .store import Store
from .tuning import Tuning
from .work import work

DEFAULT_SECONDS = 200.0  # of a kind of cell that was never run
# Large tensors stay with the process instead of being asked for page by page: a tenth of a step's time.
KEEP_MEMORY = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with safety/, gsm8k/ and code/")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[], help="run only these parts")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figures are kept")
    parser.add_argument("--cache", type=Path, default=Path(".cache/claims"), help="where adapters and masks are kept")
    parser.add_argument("--plan", action="store_true", help="print the plan, and run nothing")
    parser.add_argument("--again", metavar="KEY", help="run one cell once more")
    parser.add_argument("--report", action="store_true", help="write docs/results.md and its pictures")
    options = parser.parse_args()
    if options.report:
        from .report import write_report

        write_report(Store(options.results), Store(RESULTS.with_name("claims_2.jsonl")))
        return
    print_plan(Store(options.results), options.only)
    if options.plan:
        return
    if options.data is None:
        parser.error("--data is needed to run cells")
    os.environ["GLIBC_TUNABLES"] = KEEP_MEMORY
    arguments = options.results, options.data, options.cache.absolute(), tuple(options.only), options.again
    processes = [
        multiprocessing.get_context("spawn").Process(target=work, args=arguments) for _ in range(options.workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def print_plan(store: Store, only: list[str]) -> None:
    """Print how much of every part is done, and the hours of one worker that are left."""
    table = Table("part", "cells", "done", "hours left, one worker on a quiet core")
    counted: set[str] = set()
    for part in only or PARTS:
        cells = [cell for cell in plan(Tuning(store), (part,)) if cell.key not in counted]
        counted |= {cell.key for cell in cells}
        left = [cell for cell in cells if cell not in store]
        hours = sum(expected_seconds(cell, store) for cell in left) / 3600
        table.add_row(part, str(len(cells)), str(len(cells) - len(left)), f"{hours:.1f}")
    Console().print(table)


def expected_seconds(cell: Cell, store: Store) -> float:
    """Return the median of the seconds of what was run of a kind so far."""
    kind = type(cell).__name__
    seconds = [line["seconds"] for line in store.lines.values() if line["cell"]["kind"] == kind]
    return statistics.median(seconds) if seconds else DEFAULT_SECONDS


if __name__ == "__main__":
    main()
