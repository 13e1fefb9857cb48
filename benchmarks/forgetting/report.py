"""The second part of `docs/results.md`: what a second task takes from the first, at equal loss on the second."""

import math
import statistics
import textwrap
from collections.abc import Callable

from ..claims.evidence import Claim, Estimate, estimate, minus, pooled, verdicts
from ..claims.store import Store
from .cells import (
    ARMS,
    BATCH,
    FACTOR,
    MAX_LENGTH,
    POINTS,
    PROTECTED_ROWS,
    RANK,
    RATES,
    REPLAY,
    SEEDS,
    STEPS,
    TEST_ROWS,
    First,
    Second,
    plan,
)

COMPARED = tuple(arm for arm in ARMS if arm != "replay")  # reach the loss that they are compared at
NAMES = {
    "LoRI-D": "LoRI-D, random A", "LoRI-S": "LoRI-S, random A", "contrastive D": "LoRI-D, contrastive A",
    "contrastive S": "LoRI-S, contrastive A", "replay": f"LoRA, {100 * REPLAY:.0f} % replay",
}  # fmt: skip

TITLE = "## A that leaves the first task alone"
HEAD = (
    "Safety, then GSM8K. Every arm of a seed begins with the same model: SmolLM2-135M with plain LoRA trained on "
    f"safety and merged into it. There a fresh adapter is trained on GSM8K: r = {RANK}, {STEPS} steps of {BATCH} "
    f"rows of at most {MAX_LENGTH} tokens, in bfloat16. The contrastive A protects {PROTECTED_ROWS} of the rows "
    f"that the first adapter was trained on; replay has {100 * REPLAY:.0f} % of its rows from there. Losses on "
    f"{TEST_ROWS['gsm8k']} rows of GSM8K, {TEST_ROWS['safety']} of safety (half of them refused requests, half "
    f"answered ones) and {TEST_ROWS['text']} passages of general text (Python's language reference) are measured "
    f"after {', '.join(map(str, POINTS))} steps. Learning rates are those of [one task](#one-task), found in "
    "float32 on the base model; contrastive arms have those of random A. Planned, too: each rate divided and "
    f"multiplied by {FACTOR}.",
    "*Lost at equal loss* is what the loss on safety has risen by where the arm's curve, straight between the "
    "points, reaches the loss on GSM8K that the slowest arm of the seed reaches. ± is half of the 95 % interval "
    f"over {len(SEEDS)} seeds.",
)

BySeed = Callable[[int], float | None]


class Curves:
    """
    The losses of every arm on its way.

    Args:
        store ([`Store`]): the results.
        rate (`int`): which of the arms' rates.
    """

    def __init__(self, store: Store, rate: int = 0):
        self.store, self.rate = store, rate

    def losses(self, arm: str, seed: int, name: str) -> list[float] | None:
        """Return the losses at the start and at every point; `None` where the cell is not measured."""
        first, second = First(seed), Second(arm, seed, self.rate)
        if first not in self.store or second not in self.store:
            return None
        curve = self.store.figures(second)["curve"]
        points = [self.store.figures(first)["losses"], *(curve[str(step)] for step in POINTS)]
        return [point[name]["loss"] for point in points]

    def end(self, arm: str, name: str) -> BySeed:
        """Return the loss at the end."""
        return lambda seed: None if (losses := self.losses(arm, seed, name)) is None else losses[-1]

    def lost(self, arm: str, name: str) -> BySeed:
        """Return how much more the loss is at the end than at the start."""
        return lambda seed: None if (losses := self.losses(arm, seed, name)) is None else losses[-1] - losses[0]

    def level(self, seed: int) -> float | None:
        """Return the loss on GSM8K that all arms of a seed reach: the slowest one's last or lowest."""
        lowest = [min(losses) for arm in COMPARED if (losses := self.losses(arm, seed, "gsm8k")) is not None]
        return max(lowest) if len(lowest) == len(COMPARED) else None

    def lost_at_level(self, arm: str, name: str) -> BySeed:
        """Return how much more the loss is where the arm first reaches that level."""

        def lost(seed: int) -> float | None:
            level, gained, losses = self.level(seed), self.losses(arm, seed, "gsm8k"), self.losses(arm, seed, name)
            if level is None or gained is None or losses is None:
                return None
            for before in range(len(POINTS)):
                here, there = gained[before : before + 2]
                if there <= level:
                    share = (here - level) / (here - there)
                    return losses[before] + share * (losses[before + 1] - losses[before]) - losses[0]
            return None  # replay may not get there

        return lost


def section(store: Store) -> list[str]:
    """Return the section's lines."""
    done, cells = sum(cell in store for cell in plan()), len(plan())
    curves = Curves(store)
    lines = [TITLE, ""]
    for paragraph in (*HEAD, f"{done} of {cells} cells are measured."):
        lines += [*textwrap.wrap(paragraph, 119), ""]
    rows = []
    for arm in ARMS:
        if not any(Second(arm, seed) in store for seed in SEEDS):
            continue
        figures = [curves.end(arm, "gsm8k"), curves.lost(arm, "safety"), curves.lost(arm, "text")]
        figures += [curves.lost_at_level(arm, "safety"), curves.lost_at_level(arm, "text")]
        norm = [store.figures(cell)["norm"] for seed in SEEDS if (cell := Second(arm, seed)) in store]
        texts = [mean.text(sign=place > 0) for place, mean in enumerate(pooled([each], SEEDS) for each in figures)]
        rows.append([NAMES.get(arm, arm), f"{RATES[arm]:g}", *texts, f"{statistics.fmean(norm):.1f}"])
    if not rows:
        return [*lines, "Not measured yet.", ""]
    header = [
        "arm", "learning rate", "GSM8K at the end", "safety: lost", "text: lost", "safety: lost at equal loss",
        "text: lost at equal loss", "norm of the deltas",
    ]  # fmt: skip
    lines += table(header, rows)
    judged = [*_claims(curves, "safety"), *_claims(curves, "text")]
    rows = [
        [claim.text, verdict, claim.difference.text(sign=True), "–" if math.isnan(p) else f"{p:.2g}"]
        for claim, (verdict, p) in zip(judged, verdicts(judged), strict=True)
    ]
    lines += table(["claim, at equal loss on GSM8K", "verdict", "difference in nats", "p (Holm)"], rows)
    return [*lines, *_row_errors(curves)]


def _claims(curves: Curves, name: str) -> list[Claim]:
    def lost(arm: str) -> BySeed:
        return curves.lost_at_level(arm, name)

    def half(arm: str) -> BySeed:
        return lambda seed: None if (value := lost(arm)(seed)) is None else value / 2

    claims = [
        ("contrastive D", "LoRA", lost("LoRA"), f"LoRI-D with contrastive A loses less of {name} than LoRA"),
        ("contrastive S", "LoRA", lost("LoRA"), f"LoRI-S with contrastive A loses less of {name} than LoRA"),
        ("contrastive S", "LoRI-S", lost("LoRI-S"), f"and less than LoRI-S with random A ({name})"),
    ]
    if name == "safety":
        claims.append(("contrastive D", "LoRA", half("LoRA"), "LoRI-D with contrastive A: less than half of LoRA's"))
    return [Claim(text, pooled([minus(lost(arm), other)], SEEDS)) for arm, _, other, text in claims]


def _row_errors(curves: Curves) -> list[str]:
    """Say how far the paired difference on safety depends on the rows: its standard error over rows, a seed each."""
    errors = []
    for seed in SEEDS:
        rows = [
            curves.store.figures(Second(arm, seed))
            for arm in ("contrastive D", "LoRA")
            if Second(arm, seed) in curves.store
        ]
        if len(rows) == 2:
            ends = [figures["curve"][str(POINTS[-1])]["safety"] for figures in rows]
            differences = [a - b for a, b in zip(ends[0]["nats"], ends[1]["nats"], strict=True)]
            spread = statistics.stdev(differences) * len(differences) ** 0.5
            errors.append(spread / sum(ends[0]["tokens"]))
    if not errors:
        return []
    mean: Estimate = estimate(errors, len(SEEDS))
    return [
        "The standard error over the rows of the paired difference on safety at the end, contrastive D less LoRA, is "
        f"{mean.mean:.3f} nats in the mean of the seeds.",
        "",
    ]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]
