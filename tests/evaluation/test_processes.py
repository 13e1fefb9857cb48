"""Batches dealt out among processes, which are threads here; tests/distributed has real ones."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from lori_trl.evaluation import all_processes, completion_loss, processes
from lori_trl.evaluation.processes import OtherProcessFailed, do_once, share_out


@pytest.fixture
def launch(monkeypatch):
    """Return a function that runs another one in several processes and returns the outcome or error of each."""

    def run(function, ranks: int = 3) -> list:
        barrier, brought = threading.Barrier(ranks, timeout=30), [None] * ranks
        here = threading.local()

        def gather(objects):
            brought[here.rank] = objects
            barrier.wait()
            gathered = [each for objects in brought for each in objects]
            barrier.wait()
            return gathered

        def state(**_):
            return SimpleNamespace(
                process_index=here.rank,
                num_processes=ranks,
                is_main_process=here.rank == 0,
                destroy_process_group=lambda: None,
            )

        def run_as(rank: int):
            here.rank = rank
            try:
                with all_processes() as is_writer:
                    assert is_writer == (rank == 0)
                    return function(rank)
            except Exception as error:
                return error

        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        monkeypatch.setattr(processes, "PartialState", state)
        monkeypatch.setattr(processes, "gather_object", gather)
        with ThreadPoolExecutor(ranks) as pool:
            return list(pool.map(run_as, range(ranks)))

    return run


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_every_part_is_done_once_and_all_get_all_in_order(launch, count):
    done = []

    def work(number: int) -> str:
        done.append(number)
        return f"part {number}"

    expected = share_out(work, count, "alone")
    assert expected == [f"part {number}" for number in range(count)] and done == list(range(count))
    done.clear()
    assert launch(lambda rank: share_out(work, count, "together")) == [expected] * 3
    assert sorted(done) == list(range(count))


def test_what_is_done_once_is_done_by_the_first(launch):
    assert do_once(lambda: "alone") == "alone"
    assert launch(lambda rank: do_once(lambda: rank)) == [0, 0, 0]


@pytest.mark.parametrize("where", ["within the work", "before it", "behind it"])
def test_an_error_in_one_process_ends_all(launch, where):
    def run(rank: int) -> None:
        fails = rank == 1
        if fails and where == "before it":
            raise FileNotFoundError("no such adapter")
        share_out(lambda number: 1 // (not (fails and where == "within the work")), 9, "work")
        if fails and where == "behind it":
            raise OSError("disk full")

    first, second, third = launch(run)
    assert not isinstance(second, OtherProcessFailed) and isinstance(second, Exception)
    for error in (first, third):
        assert isinstance(error, OtherProcessFailed) and str(error) == f"Process 1 of 3 failed: {second!r}."


def test_the_loss_is_that_of_one_process_to_the_last_digit(launch, model, tokenizer, rows):
    rows = rows.select(range(11))
    expected = completion_loss(model, tokenizer, rows, batch_size=2)
    assert launch(lambda rank: completion_loss(model, tokenizer, rows, batch_size=2)) == [expected] * 3


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_a_launch_that_shards_the_model_is_refused(monkeypatch, engine):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ValueError, match="Pass `--multi_gpu`"), all_processes():
        pass
