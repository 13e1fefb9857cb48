"""Safety, then GSM8K: what of safety is left, at equal loss on GSM8K.

    python -m benchmarks.forgetting --data DATA          goes on where it was, one process of one thread
    python -m benchmarks.forgetting --plan               what is done and what is left
    python -m benchmarks.forgetting --data DATA --again KEY

DATA is as for `benchmarks.claims`. Figures go to `benchmarks/results/claims_2.jsonl`, one line a cell; models and
adapters to the cache. `python -m benchmarks.claims --report` writes the page.
"""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from ..claims.data import Rows
from ..claims.setting import RESULTS
from ..claims.store import Store
from ..claims.work import Worker
from .cells import plan
from .losses import StudyRows
from .run import measure

RESULTS_2 = RESULTS.with_name("claims_2.jsonl")
# Large tensors stay with the process instead of being asked for page by page: a tenth of a step's time.
KEEP_MEMORY = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with safety/ and gsm8k/")
    parser.add_argument("--results", type=Path, default=RESULTS_2, help="where the figures are kept")
    parser.add_argument("--cache", type=Path, default=Path(".cache/forgetting"), help="where models and adapters are")
    parser.add_argument("--plan", action="store_true", help="print the plan, and run nothing")
    parser.add_argument("--again", metavar="KEY", help="run one cell once more")
    options = parser.parse_args()
    store = Store(options.results)
    if options.plan:
        for cell in plan():
            Console().print("done" if cell in store else "left", cell, soft_wrap=True, highlight=False)
        return
    if options.data is None:
        parser.error("--data is needed to run cells")
    if os.environ.get("GLIBC_TUNABLES") != KEEP_MEMORY:  # read when a process starts
        arguments = [sys.executable, "-m", "benchmarks.forgetting", *sys.argv[1:]]
        os.execve(sys.executable, arguments, os.environ | {"GLIBC_TUNABLES": KEEP_MEMORY})
    rows = StudyRows(Rows(options.data))
    worker = Worker(store, rows, options.cache.absolute(), plan, measure)
    worker.run_again(options.again) if options.again else worker.run()


if __name__ == "__main__":
    main()
