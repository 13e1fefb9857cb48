"""Running the cells that are not done, one after the other, beside other processes that do the same."""

import fcntl
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .cells import Cell
from .data import Rows
from .measuring import measure
from .parts import plan
from .setting import ROOT
from .store import Store
from .tuning import Tuning

console = Console()


def work(results: Path, data: Path, cache: Path, only: tuple[str, ...], again: str | None) -> None:
    """Be one worker: run all cells of some parts, or one cell again."""
    store = Store(results)
    worker = Worker(store, Rows(data), cache, lambda: plan(Tuning(store), only))
    if again is None:
        worker.run()
    else:
        worker.run_again(again)


class Worker:
    """
    One process, one thread: what a cell gives does not depend on how many others work.

    Args:
        store ([`Store`]): the results.
        rows ([`Rows`]): the data.
        cache (`Path`): where adapters and masks are kept, a folder a cell.
        plan (`Callable`): returns the cells, in order, as far as they are known.
        measured (`Callable`, *optional*): runs a cell and returns its figures.
    """

    def __init__(
        self, store: Store, rows: Any, cache: Path, plan: Callable[[], list[Cell]], measured: Callable = measure
    ):
        self.store, self.rows, self.cache, self.plan, self.measured = store, rows, cache, plan, measured
        self.commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    def run(self) -> None:
        """Run cells until all are done."""
        torch.set_num_threads(1)
        while True:
            self.store.read()
            left = [cell for cell in self.plan() if cell not in self.store]
            if not left:
                return
            if not any(self.run_cell(cell) for cell in left if cell.settled):
                time.sleep(10)  # what is left is in other hands, or waits for it

    def run_again(self, key: str) -> None:
        """Run one cell again, whether it is done or not."""
        torch.set_num_threads(1)
        cell = next(cell for cell in self.plan() if cell.key == key)
        self._done(cell).unlink(missing_ok=True)
        self.run_cell(cell)

    def run_cell(self, cell: Cell) -> bool:
        """Run a cell, or first one whose files it needs and which are not here. False: another process has it."""
        for need in cell.needs:
            if not self._done(need).is_file():
                return self.run_cell(need)
        with self._lock(cell) as free:
            if not free or (cell in self.store and self._done(cell).is_file()):
                return False
            self.measure(cell)
        return True

    def measure(self, cell: Cell) -> None:
        """Measure a cell and keep the figures. A cell measured before must give the same again."""
        console.print(f"{time.strftime('%H:%M:%S')} {cell}", soft_wrap=True, highlight=False)
        started = time.process_time()
        shutil.rmtree(self.folder(cell), ignore_errors=True)  # what a kill, or an earlier run, has left
        self.folder(cell).mkdir(parents=True)
        figures = self.measured(cell, self.rows, self.folder)
        seconds = round(time.process_time() - started, 1)
        if cell not in self.store:
            versions = {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
            self.store.add(cell, figures, seconds=seconds, commit=self.commit, versions=versions)
        elif figures != self.store.figures(cell):
            console.print(f"[red]not the same again:[/] {self.store.figures(cell)} before, {figures} now", cell)
        else:
            console.print("the same again, to the last digit")
        self._done(cell).touch()

    def folder(self, cell: Cell) -> Path:
        """Return the folder of a cell's files."""
        return self.cache / cell.key

    def _done(self, cell: Cell) -> Path:
        return self.cache / f"{cell.key}.done"

    @contextmanager
    def _lock(self, cell: Cell):
        self.cache.mkdir(parents=True, exist_ok=True)
        with open(self.cache / f"{cell.key}.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            self.store.read()
            yield True
