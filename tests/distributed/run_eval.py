"""What test_evaluation.py starts, alone or on two ranks: `run_eval.py FOLDER ADAPTER DATA`."""

import json
import os
import signal
import sys
from pathlib import Path

from evaluation.benchmark_rows import PROBLEMS
from lm_eval.api.instance import Instance
from tiny import make_llama, make_tokenizer

from lori_trl.cli import main
from lori_trl.evaluation import all_processes
from lori_trl.evaluation.harness import run_samples
from lori_trl.evaluation.harness_model import HarnessModel
from lori_trl.evaluation.processes import OtherProcessFailed, do_once, share_out

GREEDY = {"do_sample": False, "max_gen_toks": 12, "until": []}
SAMPLED = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12, "until": []}


def ask(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def answers() -> dict[str, list]:
    """Answers of every kind, to more prompts than fill the batches of two ranks evenly."""
    prompts = [" ".join(f"w{(7 * i + j) % 90}" for j in range(1 + i % 5)) for i in range(11)]
    model = HarnessModel(make_llama(), make_tokenizer(), batch_size=2, seed=42)
    labels = [(prompt, label) for prompt in prompts for label in (" w3", " w4 w5", " w6")]
    samples = [[problem["completion"], problem["wrong"]] for problem in PROBLEMS]
    return {
        "greedy": model.generate_until(ask("generate_until", [(prompt, GREEDY) for prompt in prompts])),
        "sampled": model.generate_until(ask("generate_until", [(prompt, SAMPLED) for prompt in prompts] * 2)),
        "log-likelihoods": model.loglikelihood(ask("loglikelihood", labels)),
        "passed": run_samples(samples, PROBLEMS),
    }


def evaluate(folder: Path, adapter: str, data: Path) -> None:
    """Run the command with every kind of task."""
    local = [f"{task}={data / task}" for task in ("boolq", "gsm8k", "safety")]
    local += [f"humaneval={data / 'code' / 'humaneval.jsonl'}"]
    chosen = ["--tasks", "boolq", "gsm8k", "safety", "humaneval", "--limit", "5", "--metrics", "loss"]
    settings = ["--max_new_tokens", "8", "--num_samples", "2", "--batch_size", "2", "--allow_code_execution"]
    output = ["--output_path", str(folder / "results.json")]
    assert main(["eval", adapter, *chosen, "--dataset_path", *local, *settings, *output]) == 0


def fail(rank: int) -> None:
    """One process's error is every process's, and none waits for ever."""
    try:
        with all_processes():
            share_out(lambda number: 1 // (number != 1), 9, "work")
    except (ZeroDivisionError, OtherProcessFailed) as error:
        assert isinstance(error, ZeroDivisionError if rank == 1 else OtherProcessFailed)
        return
    raise AssertionError("nobody failed")


if __name__ == "__main__":
    folder, adapter, data = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    with all_processes() as is_writer:
        answered = answers()
        if is_writer:
            (folder / "answers.json").write_text(json.dumps(answered))
    evaluate(folder, adapter, data)
    if ranks > 1:
        fail(rank)
        if rank == 0:
            (folder / "passed").touch()
        with all_processes():
            do_once(lambda: None)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            share_out(lambda number: number, 9, "work")  # the launcher ends this process, which waits for the other
