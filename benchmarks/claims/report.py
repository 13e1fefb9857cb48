"""`docs/results.md` and its pictures, from the committed results alone."""

import json
from collections.abc import Callable, Iterable
from functools import partial

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
    Train,
)
from .evidence import MARGIN, BySeed, Estimate, Evidence, SeededCell, is_lower, is_no_worse, minus, pooled
from .parts import (
    COMPARED,
    COMPARED_IN_PAIRS,
    CONTINUED,
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
from .pictures import METHOD_NAMES, draw_curves, draw_merges
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

Written by `python -m benchmarks.claims --report` from `benchmarks/results/claims.jsonl`; nothing is typed by hand.

SmolLM2-135M-Instruct in float32, r = {RANK}, alpha = {2 * RANK}, seven projections; {STEPS} steps of {BATCH} rows of
at most {MAX_LENGTH} tokens, AdamW at a constant rate. Safety rows are half harmful requests that are refused and half
harmless ones that are answered. The loss is that of {TEST_ROWS} held-out rows, in nats a completion token. Each
method's learning rate is tuned for each task on {DEV_ROWS} dev rows and seed 0, from the same three rates on, until
the best is not at the edge. A seed draws rows, their order, A and random masks; ± is the standard error over
{len(SEEDS)} seeds. Differences are paired: same seed, same rows. A claim that something is as good holds where the
difference is at most one standard error and two of them end below {MARGIN} nats; that something is better, where the
difference is more than two standard errors, and either fails where it lies that far on the other side. Of three seeds
that is no more than an 82 % interval. – is not measured yet.
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
How much more the loss on each task is than the single adapter's, the mean over the merged tasks; one weight for all,
the best of a search on seed 0.
"""

Row = list[str]
Judge = Callable[[Estimate], str]


def write_report(store: Store) -> None:
    """Write the page and its pictures."""
    DOCS.mkdir(exist_ok=True)
    page = Page(store)
    lines = page.head()
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
        train, merged, forgotten = self._train, self._merging_difference, self._forgotten_difference
        full = self._from_full

        def on_tasks(method: str, other: str) -> list[BySeed]:
            return [self.evidence.paired(train(method, task=task), train(other, task=task)) for task in TASKS]

        def merges_of(method: str) -> list[BySeed]:
            return [merged((method, tasks, "concat"), ("LoRA", tasks, "concat")) for tasks in MERGED]

        two = MERGED[0]
        claims: list[tuple[str, list[BySeed], Judge]] = [
            ("1. LoRI-D is as good as LoRA", on_tasks("LoRI-D", "LoRA"), is_no_worse),
            ("2. LoRI-S is as good as LoRI-D", on_tasks("LoRI-S", "LoRI-D"), is_no_worse),
            *(
                (
                    f"2. so is sparsity {sparsity:g} ({SPARSITY_TASK})",
                    [self.evidence.paired(train(f"s={sparsity}", SPARSITY_TASK), train("LoRI-D", SPARSITY_TASK))],
                    is_no_worse,
                )
                for sparsity in SPARSITIES
            ),
            ("3. LoRI-D loses less by merging (`concat`) than LoRA", merges_of("LoRI-D"), is_lower),
            ("3. LoRI-S loses less by merging (`concat`) than LoRA", merges_of("LoRI-S"), is_lower),
            (
                "3. independent A lose less by merging than one A",
                [merged(("random", two, "concat"), ("random", two, "concat", True))],
                is_lower,
            ),
            (
                "4. `concat` loses less than `linear`",
                [merged((method, two, "concat"), (method, two, "linear")) for method in COMPARED],
                is_lower,
            ),
            (
                "5. LoRI-S forgets less of safety than LoRA",
                [forgotten("LoRI-S", "LoRA", ("safety", "gsm8k"))],
                is_lower,
            ),
            ("6. disjoint masks forget less than LoRI-S's own", [forgotten("LoRAF", "LoRI-S", SEQUENCE)], is_lower),
            (
                "7. a mask over the model is better than one a matrix",
                [self.evidence.paired(train("LoRI-S", task), self._pooled("matrix", task)) for task in POOLED_TASKS],
                is_lower,
            ),
            (
                f"8. the mask of {CHEAP} dense steps is as good as the whole run's",
                [full(self._masked(Mask("train", CHEAP), task), task) for task in TASKS],
                is_no_worse,
            ),
            (
                f"8. so is that of {CHEAP} batches' gradients (agreement of signs)",
                [full(train("cheap", task=task), task) for task in TASKS],
                is_no_worse,
            ),
            ("8. so is a random mask", [full(train("random", task=task), task) for task in TASKS], is_no_worse),
        ]
        rows = []
        for text, differences, judge in claims:
            mean = pooled(differences)
            rows.append([text, judge(mean), mean.text(sign=True)])
        return _table("claim, verdict, difference in nats", rows)

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
        verdicts = [
            _claim(f"{name} is as good as the whole dense run's", self._from_full(cell, task), is_no_worse)
            for name, cell in (
                ("a random mask (per matrix)", train("random")),
                (f"the mask of {CHEAP} batches' agreement of signs", train("cheap")),
                (f"the mask of {CHEAP} dense steps", self._masked(Mask("train", CHEAP), task)),
            )
        ]
        table = _table("mask, cost, loss, more than with the paper's mask, overlap", rows)
        return [f"**{task}** (without an adapter {base:.3f})", "", *table, *verdicts, ""]

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
        rows, verdicts = [], []
        for method in COMPARED:
            cells = [self._train(method, task=task) for task in TASKS]
            rows.append([_name(method), *(f"{self._loss(cell)}{self._rate(method, task)}"
                                   for cell, task in zip(cells, TASKS, strict=True))])  # fmt: skip
        for claim, method, other in (("1", "LoRI-D", "LoRA"), ("2", "LoRI-S", "LoRI-D")):
            for task in TASKS:
                difference = self.evidence.paired(self._train(method, task=task), self._train(other, task=task))
                verdicts.append(_claim(f"({claim}) {method} is as good as {other} on {task}", difference, is_no_worse))
        return [*_table("method (learning rate), " + ", ".join(TASKS), rows), *verdicts, ""]

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
        loss, rows = self._merging_loss, []
        for method in COMPARED_IN_PAIRS:
            rows.append([_name(method), *(loss(method, tasks, "concat").text(sign=True) for tasks in MERGED),
                         loss(method, MERGED[0], "linear").text(sign=True)])  # fmt: skip
        lines += _table("method, 2 tasks, 3 tasks, 4 tasks, 2 tasks: linear", rows)
        for method in COMPARED[1:]:
            for tasks in MERGED:
                difference = self._merging_difference((method, tasks, "concat"), ("LoRA", tasks, "concat"))
                text = f"(3) {_name(method)} loses less than LoRA in a merge of {len(tasks)}"
                lines.append(_claim(text, difference, is_lower))
        for method in COMPARED:
            difference = self._merging_difference((method, MERGED[0], "concat"), (method, MERGED[0], "linear"))
            text = f"(4) concat loses less than linear with {_name(method)}"
            lines.append(_claim(text, difference, is_lower))
        own, shared = ("random", MERGED[0], "concat"), ("random", MERGED[0], "concat", True)
        text = "LoRI-S (random masks) loses less with independent A than with one A"
        lines.append(_claim(text, self._merging_difference(own, shared), is_lower))
        losses = {method: [loss(method, tasks, "concat") for tasks in MERGED] for method in COMPARED}
        if all(any(point.seeds for point in points) for points in losses.values()):
            draw_merges(losses, [len(tasks) for tasks in MERGED], DOCS / "results_merging.png")
            lines += ["", "![What merging costs](results_merging.png)"]
        return [*lines, ""]

    def _merging_loss(self, *merge) -> Estimate:
        return pooled([self._merged(*merge)])

    def _merging_difference(self, merge: tuple, other: tuple) -> BySeed:
        return minus(self._merged(*merge), self._merged(*other))

    def _merged(self, method: str, tasks: tuple[str, ...], how: str, shared_A: bool = False) -> BySeed:
        """Return how much is lost in a merge, the mean over its tasks."""
        fields = {"shared_A": True} if shared_A else {}
        _, weight = self.tuning.merges(single_adapters(self.tuning, method, tasks, 0, **fields), how)
        value = self.evidence.value

        def lost(seed: int) -> float | None:
            adapters = single_adapters(self.tuning, method, tasks, seed, **fields)
            merge = Merge(adapters, how, weight)
            if merge not in self.store or not all(adapter in self.store for adapter in adapters):
                return None
            return sum(value(merge, cell.task, "loss") - value(cell) for cell in adapters) / len(adapters)

        return lost

    # ---- sequences ---------------------------------------------------------------------------------------------

    def sequences(self) -> list[str]:
        lines = ["Safety, then gsm8k: what is left of safety.", ""]
        rows = [[_name(method), *self._safety_row(method)] for method in COMPARED]
        header = "method, safety before, after, gsm8k, harmful refused before, after, harmless refused before, after"
        lines += _table(header, rows)
        for method in COMPARED[1:]:
            difference = self._forgotten_difference(method, "LoRA", ("safety", "gsm8k"))
            text = f"(5) {_name(method)} forgets less of safety than LoRA"
            lines.append(_claim(text, difference, is_lower))
        lines += ["", f"{', then '.join(SEQUENCE)}: how much more the loss is at the end than when it was learnt.", ""]
        rows = []
        for method in CONTINUED:
            forgotten = pooled([self._forgotten(method, SEQUENCE)]).text(sign=True)
            rows.append([method, forgotten, self._loss(lambda seed, m=method: self._sequence(m, SEQUENCE, seed)[-1])])
        lines += _table(f"method, forgotten of {' and '.join(SEQUENCE[:2])}, loss on {SEQUENCE[-1]}", rows)
        difference = self._forgotten_difference("LoRAF", "LoRI-S", SEQUENCE)
        return [*lines, _claim("(6) LoRAF's disjoint masks forget less than LoRI-S's own", difference, is_lower), ""]

    def _safety_row(self, method: str) -> Row:
        first = lambda seed: self._sequence(method, ("safety", "gsm8k"), seed)[0]  # noqa: E731
        second = lambda seed: self._sequence(method, ("safety", "gsm8k"), seed)[1]  # noqa: E731
        mean, held = self.evidence.mean, lambda seed: Held(second(seed), ("safety",))
        row = [self._loss(first), mean(held, "safety", "loss").text(), self._loss(second)]
        for kind in ("harmful", "harmless"):
            for cell in (first, second):
                row.append(mean(lambda seed, cell=cell: Refusals(cell(seed)), kind).text(2))  # noqa: B023
        return row

    def _forgotten(self, method: str, tasks: tuple[str, ...]) -> BySeed:
        """Return how much more the loss on the earlier tasks is at the end, the mean over them."""
        value = self.evidence.value

        def forgotten(seed: int) -> float | None:
            cells = self._sequence(method, tasks, seed)
            held = Held(cells[-1], tasks[:-1])
            if held not in self.store or not all(cell in self.store for cell in cells):
                return None
            return sum(value(held, cell.task, "loss") - value(cell) for cell in cells[:-1]) / len(cells[:-1])

        return forgotten

    def _forgotten_difference(self, method: str, other: str, tasks: tuple[str, ...]) -> BySeed:
        return minus(self._forgotten(method, tasks), self._forgotten(other, tasks))

    def _sequence(self, method: str, tasks: tuple[str, ...], seed: int) -> list[Train]:
        return sequence(self.tuning, method, tasks, seed)

    # ---- granularity -------------------------------------------------------------------------------------------

    def granularity(self) -> list[str]:
        rows, verdicts = [["model", *(self._loss(self._train("LoRI-S", task=task)) for task in POOLED_TASKS)]], []
        for name in GRANULARITIES:
            cells = {task: self._pooled(name, task) for task in POOLED_TASKS}
            rows.append([name, *map(self._loss, cells.values())])
            for task, cell in cells.items():
                difference = self.evidence.paired(self._train("LoRI-S", task=task), cell)
                text = f"(7) model-wide masks are better than {name}-wide ones on {task}"
                verdicts.append(_claim(text, difference, is_lower))
        table = _table("entries compete within, " + ", ".join(POOLED_TASKS), rows)
        return [*table, *verdicts, ""]

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


def _claim(text: str, difference: BySeed, judge: Judge) -> str:
    """Return a claim with its verdict and the paired difference behind it."""
    mean = pooled([difference])
    return f"- {text}: {judge(mean)}" + (f", {mean.text(sign=True)}" if mean.seeds else "")


def _table(header: str, rows: Iterable[Row]) -> list[str]:
    columns = header.split(", ")
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]
