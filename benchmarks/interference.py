"""Do LoRI's tasks disturb each other less than LoRA's? Single tasks, merged, one after the other, and disjoint.

    python interference.py --data DATA [--cache FOLDER]

DATA holds safety/, gsm8k/ and nlu/<set>/, each with train.jsonl and test.jsonl in TRL's prompt-completion form. The
study is a list of stages. Each keeps its outcome in the cache, so an interrupted study goes on where it was, and
several processes with the same cache share the stages among them. It takes about two hours on two CPU cores.

Every run of a task sees the same 160 rows in the same order, for 20 steps of 8. A method's learning rate is the one of
`LEARNING_RATES` whose safety adapter has the lowest loss on 40 dev rows, and the merging weight the one of `WEIGHTS`
with the lowest mean loss on both tasks' dev rows; dev rows are neither trained nor tested on. One seed.
"""

import argparse
import fcntl
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from common import RESULTS, report
from datasets import Dataset, load_dataset
from lori_trl.evaluation import completion_loss, is_refusal
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel
from quickstart import answer, smollm2
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from lori_trl import LoriMasks, LoriSFTConfig, LoriSFTTrainer, load_lori_adapter, merge_lori_adapters

METHODS = ("LoRA", "LoRI-D", "LoRI-S")
LEARNING_RATES = (5e-4, 1.5e-3, 5e-3)
WEIGHTS = (0.5, 0.7, 1.0)
TRAIN_ROWS, DEV_ROWS, TEST_ROWS = 160, 40, {"safety": 60, "gsm8k": 40, "nlu": 60}
RANK, SPARSITY, STEPS = 32, 0.9, 20


@dataclass
class Stage:
    """One step of the study: `run(folder)` fills the folder `name` of the cache, once all of `needs` are filled."""

    name: str
    run: Callable[[Path], None]
    needs: tuple[str, ...] = ()


class Study:
    """What the stages share: the data, the base model, the cache."""

    def __init__(self, data: Path, cache_folder: Path):
        self.data, self.cache = data, cache_folder
        self.tokenizer = AutoTokenizer.from_pretrained(smollm2())

    def base(self):
        return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)

    @cache  # noqa: B019
    def rows(self, task: str, split: str) -> Dataset:
        """Return the rows of a task: `train`, `dev` (the train file's next rows) or `test`."""
        files = sorted((self.data / task).glob("*/")) if task == "nlu" else [self.data / task]
        name = f"{'test' if split == 'test' else 'train'}.jsonl"
        sets = [load_dataset("json", data_files=str(folder / name))["train"] for folder in files]
        numbers = {"train": range(TRAIN_ROWS), "dev": range(TRAIN_ROWS, TRAIN_ROWS + DEV_ROWS)}
        numbers["test"] = range(TEST_ROWS[task])
        rows = [sets[number % len(sets)][number // len(sets)] for number in numbers[split]]  # nlu: the sets in turn
        return Dataset.from_list([{name: row[name] for name in ("prompt", "completion")} for row in rows])

    # ---- training ----------------------------------------------------------------------------------------------

    def train(self, folder: Path, method: str, task: str, rate: float, start: Path | None = None, **fields) -> None:
        """Train an adapter of a method on a task, from a fresh one or from that in `start`."""
        common = {
            "output_dir": str(folder), "learning_rate": rate, "max_steps": STEPS, "max_length": 512, "seed": 0,
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "lr_scheduler_type": "constant",
            "warmup_steps": 0, "weight_decay": 0.0, "bf16": False, "activation_checkpointing": False,
            "save_strategy": "no", "report_to": "none", "logging_steps": 5, "dataloader_pin_memory": False,
        }  # fmt: skip
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets) if start is None else None
        shared = {"train_dataset": self.rows(task, "train"), "processing_class": self.tokenizer, "peft_config": lora}
        if method == "LoRA":
            model = self.base()
            model = model if start is None else PeftModel.from_pretrained(model, start, is_trainable=True)
            trainer = SFTTrainer(model, SFTConfig(**common), **shared)
        else:
            model = self.base() if start is None else load_lori_adapter(self.base(), start, is_trainable=True)
            sparsity = SPARSITY if method == "LoRI-S" else 0.0
            config = LoriSFTConfig(task_name=task, sparsity=sparsity, **common, **fields)
            trainer = LoriSFTTrainer(model, config, **shared)
        trainer.train()
        trainer.save_model()

    def single(self, folder: Path, method: str, task: str, rate: float) -> None:
        """Train a single-task adapter. LoRI-S is calibrated by the LoRI-D run, of the same A, rows and seed."""
        fields = {}
        if method == "LoRI-S":
            model = load_lori_adapter(self.base(), self.adapter("LoRI-D", task))
            saliency = {name: weight for name, weight in model.named_parameters() if ".lora_B." in name}
            projection = model.lori_masks[task].projection
            masks = LoriMasks.select(saliency, SPARSITY, task=task, projection=projection)
            fields["mask_name_or_path"] = str(masks.save_pretrained(folder / "calibrated"))
        self.train(folder, method, task, rate, **fields)

    def then(self, folder: Path, method: str, first: str, task: str, **fields) -> None:
        """Go on from a single-task adapter to another task."""
        if method == "LoRI-S":
            fields["calibration_learning_rate"] = self.rate("LoRI-D")
        self.train(folder, method, task, self.rate(method), start=self.adapter(method, first), **fields)

    def choose_rate(self, folder: Path, method: str) -> None:
        losses = {f"{rate:g}": self.dev_loss(self.cache / grid(method, rate), "safety") for rate in LEARNING_RATES}
        _write(folder, {"dev_loss": losses, "rate": float(min(losses, key=losses.get))})

    def rate(self, method: str) -> float:
        return _read(self.cache / f"rate-{method}")["rate"]

    def adapter(self, method: str, task: str) -> Path:
        return self.cache / (grid(method, self.rate(method)) if task == "safety" else f"single-{method}-{task}")

    # ---- merging -----------------------------------------------------------------------------------------------

    def merge(self, folder: Path, method: str, how: str) -> None:
        """Merge the safety and the gsm8k adapter, at the weight with the lowest mean dev loss."""
        adapters, losses = [self.adapter(method, task) for task in ("safety", "gsm8k")], {}
        for weight in WEIGHTS:
            merged = folder / f"{weight:g}"
            if not merged.exists():
                merge_lori_adapters(adapters, weights=[weight, weight], method=how, output_dir=merged)
            losses[f"{weight:g}"] = sum(self.dev_loss(merged, task) for task in ("safety", "gsm8k")) / 2
        _write(folder, {"dev_loss": losses, "weight": float(min(losses, key=losses.get))})

    # ---- measuring ---------------------------------------------------------------------------------------------

    def load(self, adapter: Path | None):
        """Return the base with an adapter merged into its weights."""
        return self.base() if adapter is None else PeftModel.from_pretrained(self.base(), adapter).merge_and_unload()

    def dev_loss(self, adapter: Path, task: str) -> float:
        return completion_loss(self.load(adapter), self.tokenizer, self.rows(task, "dev")).loss

    def measure(self, folder: Path, adapter: Callable[[], Path | None], tasks: tuple[str, ...]) -> None:
        """Measure the loss on the tasks' test rows, and how many of the harmful requests are refused."""
        model, figures = self.load(adapter()), {}
        for task in tasks:
            loss = completion_loss(model, self.tokenizer, self.rows(task, "test"))
            figures[task] = {"loss": loss.loss, "stderr": loss.stderr}
        if "safety" in tasks:
            model.generation_config.max_new_tokens = 32
            answers = answer(model, self.tokenizer, self.rows("safety", "test")["prompt"], folder.name)
            figures["refusal_rate"] = sum(map(is_refusal, answers)) / len(answers)
        _write(folder, figures)

    def overlap(self, folder: Path) -> None:
        """Compare the two LoRI-S masks. They belong to different A: no more than chance is expected."""
        safety, gsm8k = (LoriMasks.from_pretrained(self.adapter("LoRI-S", task)) for task in ("safety", "gsm8k"))
        _write(folder, {"overlap": safety.overlap(gsm8k), "by_chance": gsm8k.density})


def grid(method: str, rate: float) -> str:
    return f"train-{method}-safety-{rate:g}"


def _write(folder: Path, content: dict) -> None:
    (folder / "figures.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read(folder: Path) -> dict:
    return json.loads((folder / "figures.json").read_text(encoding="utf-8"))


def plan(study: Study) -> list[Stage]:
    """Return all stages, in the order in which they are begun."""
    stages = []

    def add(name: str, run: Callable, *needs: str, **arguments) -> None:
        stages.append(Stage(name, lambda folder: run(folder, **arguments), needs))

    def measured(subject: str, adapter: Callable[[], Path | None], tasks: tuple[str, ...], *needs: str) -> None:
        add(f"measure-{subject}", study.measure, *needs, adapter=adapter, tasks=tasks)

    pair, all_tasks = ("safety", "gsm8k"), ("safety", "gsm8k", "nlu")
    for method in METHODS:
        dense = ["single-LoRI-D-gsm8k"] if method == "LoRI-S" else []  # the calibration
        rates = {grid(method, rate): rate for rate in LEARNING_RATES}
        for name, rate in rates.items():
            add(name, study.single, *dense, method=method, task="safety", rate=rate)
        rated = f"rate-{method}"
        add(rated, study.choose_rate, *rates, method=method)
        run = lambda folder, method: study.single(folder, method, "gsm8k", study.rate(method))  # noqa: E731
        add(f"single-{method}-gsm8k", run, rated, *dense, method=method)
        add(f"then-{method}-safety-gsm8k", study.then, rated, method=method, first="safety", task="gsm8k")
        gsm8k = f"single-{method}-gsm8k"
        add(f"then-{method}-gsm8k-nlu", study.then, gsm8k, method=method, first="gsm8k", task="nlu")
        for how in ("concat", "linear"):
            add(f"merge-{method}-{how}", study.merge, gsm8k, method=method, how=how)
    add("then-LoRAF-gsm8k-nlu", study.then, "single-LoRI-S-gsm8k", method="LoRI-S", first="gsm8k", task="nlu",
        disjoint_masks=True)  # fmt: skip
    add("overlap", study.overlap, "single-LoRI-S-gsm8k")

    measured("base", lambda: None, all_tasks)
    for method in METHODS:
        for task in pair:
            needs = f"rate-{method}" if task == "safety" else f"single-{method}-gsm8k"
            tasks = pair if task == "safety" else all_tasks
            measured(f"{method}-{task}", lambda m=method, t=task: study.adapter(m, t), tasks, needs)
        for how in ("concat", "linear"):
            folder = study.cache / f"merge-{method}-{how}"
            measured(f"{method}-{how}", lambda f=folder: f / f"{_read(f)['weight']:g}", pair, folder.name)
        continual = f"then-{method}-safety-gsm8k"
        measured(f"{method}-safety-gsm8k", lambda c=continual: study.cache / c, pair, continual)
    for method in (*METHODS, "LoRAF"):
        sequence = f"then-{method}-gsm8k-nlu"
        measured(f"{method}-gsm8k-nlu", lambda s=sequence: study.cache / s, ("gsm8k", "nlu"), sequence)
    return stages


def work(stages: list[Stage], cache_folder: Path, only: str) -> None:
    """Run every stage that is neither done nor in another process's hands, until none is left."""
    console = Console()
    wanted = [stage for stage in stages if re.match(only, stage.name)]
    done = lambda name: (cache_folder / name / "done").is_file()  # noqa: E731
    while left := [stage for stage in wanted if not done(stage.name)]:
        for stage in (stage for stage in left if all(map(done, stage.needs))):
            with open(cache_folder / f".{stage.name}.lock", "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # another process runs it
                if not done(stage.name):
                    console.print(f"[bold]{time.strftime('%H:%M:%S')} {stage.name}[/] ({len(left)} left)")
                    started = time.time()
                    (cache_folder / stage.name).mkdir(exist_ok=True)
                    stage.run(cache_folder / stage.name)
                    (cache_folder / stage.name / "done").write_text(f"{time.time() - started:.0f} s\n")
                break
        else:
            time.sleep(5)


# ---- the report ----------------------------------------------------------------------------------------------------


class Results:
    """The figures of all stages: of what they measured, value and standard error."""

    def __init__(self, cache_folder: Path):
        folders = sorted(folder for folder in cache_folder.iterdir() if (folder / "figures.json").is_file())
        self.figures = {folder.name: _read(folder) for folder in folders}

    def loss(self, subject: str, task: str) -> tuple[float, float]:
        found = self.figures[f"measure-{subject}"][task]
        return found["loss"], found["stderr"]

    def refused(self, subject: str) -> tuple[float, float]:
        """Return the refused share of the harmful requests, in percent."""
        rate = self.figures[f"measure-{subject}"]["refusal_rate"]
        return 100 * rate, 100 * (rate * (1 - rate) / TEST_ROWS["safety"]) ** 0.5

    def first_task(self, method: str) -> str:
        """Name the adapter that gsm8k, then nlu began with: LoRAF's first task is LoRI-S's."""
        return f"{method.replace('LoRAF', 'LoRI-S')}-gsm8k"


def tables(results: Results) -> str:
    """Write the results as Markdown."""

    def table(text: str, header: str, rows: list[list]) -> list[str]:
        header = header.split(", ")
        cells = [[cell if isinstance(cell, str) else "{:.3f} ± {:.3f}".format(*cell) for cell in row] for row in rows]
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
        return [text, "", *(f"| {' | '.join(line)} |" for line in lines), ""]

    def refused(subject: str) -> str:
        rate, stderr = results.refused(subject)
        return f"{rate:.0f} ± {stderr:.0f}"

    loss, figures = results.loss, results.figures
    overlap = figures["overlap"]
    lines = table(
        "**Single tasks.** Loss on held-out completions, in nats a token, ± its standard error.",
        "method, learning rate, safety, refused %, gsm8k, nlu",
        [["base", "", loss("base", "safety"), refused("base"), loss("base", "gsm8k"), loss("base", "nlu")]]
        + [
            [m, f"{figures[f'rate-{m}']['rate']:g}", loss(f"{m}-safety", "safety"), refused(f"{m}-safety"),
             loss(f"{m}-gsm8k", "gsm8k"), ""]
            for m in METHODS
        ],
    )  # fmt: skip
    lines += table(
        f"**Merged.** Safety and gsm8k in one adapter, at the best of the weights {', '.join(map(str, WEIGHTS))}.",
        "method, merge, weight, safety, refused %, gsm8k",
        [
            [m, how, f"{figures[f'merge-{m}-{how}']['weight']:g}", loss(f"{m}-{how}", "safety"),
             refused(f"{m}-{how}"), loss(f"{m}-{how}", "gsm8k")]
            for m in METHODS
            for how in ("concat", "linear")
        ],
    )  # fmt: skip
    lines += table(
        "**Safety, then gsm8k.** What is left of safety.",
        "method, safety before, after, refused % before, after, gsm8k after",
        [
            [m, loss(f"{m}-safety", "safety"), loss(f"{m}-safety-gsm8k", "safety"), refused(f"{m}-safety"),
             refused(f"{m}-safety-gsm8k"), loss(f"{m}-safety-gsm8k", "gsm8k")]
            for m in METHODS
        ],
    )  # fmt: skip
    lines += table(
        "**Gsm8k, then nlu.** What is left of gsm8k. LoRAF is LoRI-S with disjoint masks.",
        "method, gsm8k before, after, nlu after",
        [
            [m, loss(results.first_task(m), "gsm8k"), loss(f"{m}-gsm8k-nlu", "gsm8k"), loss(f"{m}-gsm8k-nlu", "nlu")]
            for m in (*METHODS, "LoRAF")
        ],
    )
    return "\n".join(lines) + (
        f"\nThe LoRI-S masks of safety and gsm8k share {100 * overlap['overlap']:.1f} % of their entries; two "
        f"independent masks would share {100 * overlap['by_chance']:.1f} %.\n"
    )


def draw(results: Results, folder: Path) -> None:
    """Draw the paper's Figure 1 b and c: what merging costs, and what going on costs."""
    loss, refused, sequence = results.loss, results.refused, (*METHODS, "LoRAF")
    merged = {"alone": "safety", "concat": "concat", "linear": "linear"}
    continued = {"before": "safety", "after": "safety-gsm8k"}
    safety, gsm8k, refusals = loss("base", "safety")[0], loss("base", "gsm8k")[0], refused("base")[0]
    pictures = {
        "interference_merging": [
            ("safety: held-out loss", safety,
             {name: [loss(f"{m}-{what}", "safety") for m in METHODS] for name, what in merged.items()}),
            ("gsm8k: held-out loss", gsm8k,
             {name: [loss(f"{m}-{what.replace('safety', 'gsm8k')}", "gsm8k") for m in METHODS]
              for name, what in merged.items()}),
            ("harmful requests refused, %", refusals,
             {name: [refused(f"{m}-{what}") for m in METHODS] for name, what in merged.items()}),
        ],
        "interference_continual": [
            ("safety, then gsm8k: safety loss", safety,
             {name: [loss(f"{m}-{what}", "safety") for m in METHODS] for name, what in continued.items()}),
            ("safety, then gsm8k: refused, %", refusals,
             {name: [refused(f"{m}-{what}") for m in METHODS] for name, what in continued.items()}),
            ("gsm8k, then nlu: gsm8k loss", gsm8k,
             {"before": [loss(results.first_task(m), "gsm8k") for m in sequence],
              "after": [loss(f"{m}-gsm8k-nlu", "gsm8k") for m in sequence]}),
        ],
    }  # fmt: skip
    for name, panels in pictures.items():
        figure = Figure(figsize=(11, 3.4), layout="constrained", dpi=110)
        for axes, (title, level, bars) in zip(figure.subplots(1, 3), panels, strict=True):
            axes.axhline(level, color="black", linestyle=":", linewidth=1, label="base model")
            width = 0.8 / len(bars)
            for number, (label, heights) in enumerate(bars.items()):
                places = [group + (number - (len(bars) - 1) / 2) * width for group in range(len(heights))]
                values, errors = zip(*heights, strict=True)
                color = ("#bdbdbd", "#0072b2", "#e69f00")[number]
                axes.bar(places, values, width, label=label, color=color, yerr=errors, capsize=2)
            axes.set_xticks(range(len(heights)), sequence[: len(heights)])
            axes.set_title(title, fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with safety/, gsm8k/ and nlu/")
    parser.add_argument("--cache", type=Path, default=Path("interference"), help="where adapters and figures are kept")
    parser.add_argument("--only", default="", help="run only the stages that this expression matches, no report")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    work(plan(Study(options.data, options.cache)), options.cache, options.only)
    if not options.only:
        found = Results(options.cache)
        report("interference", found.figures)
        (RESULTS / "interference.md").write_text(tables(found), encoding="utf-8")
        draw(found, RESULTS)
