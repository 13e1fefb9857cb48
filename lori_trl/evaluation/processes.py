"""Evaluation on several processes: each holds the whole model and does its share of the batches."""

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.progress import track

T = TypeVar("T")


class OtherProcessFailed(RuntimeError):
    """Another process of the launch has failed, and this one cannot go on without it."""


_launch: ContextVar[PartialState | None] = ContextVar("launch", default=None)


@contextmanager
def all_processes() -> Iterator[bool]:
    """
    Share what is evaluated inside among all processes of a launch. Every one of them must run it.

    Yields:
        `bool`: whether this process is the one that writes.

    Raises:
        `ValueError`: the launch shards models.
        `OtherProcessFailed`: an error in one process ends all.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        yield True
        return
    for engine in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false") == "true":
            raise ValueError(
                f"The launch file shards models by {engine}, and {processes} processes evaluate. Allowed is one where "
                "every process holds the whole model. Pass `--multi_gpu` to `accelerate launch`, or evaluate in one "
                "process, which spreads a model over all GPUs."
            )
    # Whoever is done waits for the slowest, however long that takes.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))
    atexit.register(state.destroy_process_group)
    token = _launch.set(state)
    try:
        yield state.is_main_process
        _exchange(lambda rank, ranks: None)  # an error behind the last exchange is one of all, too
    except OtherProcessFailed:
        raise
    except Exception as error:
        _gather(failure=f"Process {state.process_index} of {state.num_processes} failed: {error!r}.")
        raise
    finally:
        _launch.reset(token)


def device_map() -> dict[str, torch.device] | str | None:
    """
    Return where this process puts a model: on its own accelerator (a GPU, XPU, MPS, ...), over all if it is alone, or
    on the CPU (`None`).
    """
    state = _launch.get()
    if not torch.accelerator.is_available():
        return None
    return "auto" if state is None else {"": state.device}


def share_out(work: Callable[[int], T], count: int, description: str) -> list[T]:
    """
    Do work in numbered parts, each process every so manieth, and hand the outcomes of all to all.

    Args:
        work (`Callable[[int], T]`): number of the part -> its outcome. It must not depend on the parts before.
        count (`int`): how many parts there are.
        description (`str`): of the progress bar.

    Returns:
        `list[T]`: the outcomes in the order of the parts, whatever the number of processes.

    Raises:
        `OtherProcessFailed`: an error in one process ends all.
    """

    def own_share(rank: int, ranks: int) -> dict[int, T]:
        numbers = range(rank, count, ranks)
        return {number: work(number) for number in track(numbers, description, transient=True, disable=rank > 0)}

    outcomes = {number: outcome for share in _exchange(own_share) for number, outcome in share.items()}
    return [outcomes[number] for number in range(count)]


def do_once(work: Callable[[], T]) -> T:
    """
    Do work in the first process, and hand its outcome to all.

    Raises:
        `OtherProcessFailed`: an error in one process ends all.
    """
    (outcome,) = _exchange(lambda rank, ranks: [work()] if rank == 0 else [])[0]
    return outcome


def _exchange(work: Callable[[int, int], T]) -> list[T]:
    """Do this process's work, told its rank and the number of ranks; return that of every process."""
    state = _launch.get()
    if state is None:
        return [work(0, 1)]
    shares = _gather(work(state.process_index, state.num_processes))
    if failures := [failure for _, failure in shares if failure is not None]:
        raise OtherProcessFailed(" ".join(failures))
    return [outcome for outcome, _ in shares]


def _gather(outcome: Any = None, failure: str | None = None) -> list[tuple[Any, str | None]]:
    """Meet all processes: each brings an outcome, or says why it has none."""
    return gather_object([(outcome, failure)])
