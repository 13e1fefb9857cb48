"""What a sequence of tasks forgets: every task after every stage, and what that adds up to."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..adapter.heatmaps import WIDTH, canvas
from ..inputs.files import replacing

FORMAT_VERSION = 1


@dataclass(frozen=True)
class SequenceResults:
    """
    The figures of every task after every stage of learning one task after another.

    Raises:
        `ValueError`: there are fewer sets than tasks.

    Source: the matrix R of Lopez-Paz and Ranzato, Gradient Episodic Memory, 2017 (arXiv 1706.08840), section 2; its
    first row, here the base model, is their vector b.
    """

    stages: tuple[str, ...]  # the base model, then the adapter after each of the n tasks
    # the n tasks' data, in the order in which they were learnt; then what belongs to none of them, such as general
    # text
    sets: tuple[str, ...]
    metrics: tuple[str, ...]  # of each set: `loss`, in nats, or the name of a score, in [0, 1]
    values: tuple[tuple[float, ...], ...]  # `(stages, sets)`
    stderr: tuple[tuple[float | None, ...], ...]  # `(stages, sets)`, their standard errors over rows

    def __post_init__(self):
        if len(self.sets) < self.tasks:
            raise ValueError(
                f"{self.tasks} adapters have {len(self.sets)} sets of rows, {', '.join(self.sets)}. Each adapter "
                "needs the rows of the task that it learnt last, in the same order. Pass one set for each, and then "
                "any others, e.g. `--dataset_path safety=a.jsonl math=b.jsonl general=c.jsonl`."
            )

    @property
    def tasks(self) -> int:
        """How many tasks were learnt."""
        return len(self.stages) - 1

    def loss_of(self, stage: int, column: int) -> float:
        """Return a figure as a loss: a score with its sign turned, so that more is worse for all."""
        value = self.values[stage][column]
        return value if self.metrics[column] == "loss" else -value

    @property
    def learnt(self) -> list[float]:
        """What each task gained on its own data when it was learnt, against the stage before it."""
        return [self.loss_of(task, task) - self.loss_of(task + 1, task) for task in range(self.tasks)]

    @property
    def backward_transfer(self) -> float | None:
        """
        The mean over all tasks but the last of what the later ones gave it; below 0 they took. `None` of one task.

        Source: GEM, eq. 2, R(T, i) - R(i, i), with the sign of a score: of losses, the loss right after the task was
        learnt less that at the end.
        """
        gained = [self.loss_of(task + 1, task) - self.loss_of(self.tasks, task) for task in range(self.tasks - 1)]
        return sum(gained) / len(gained) if gained else None

    @property
    def forgetting(self) -> float | None:
        """
        The mean over all tasks but the last of how far each fell from its best stage to the end. `None` of one task.

        Source: Chaudhry et al., Riemannian Walk, 2018 (arXiv 1801.10112), section 3, forgetting measure.
        """
        fallen = [
            self.loss_of(self.tasks, task)
            - min(self.loss_of(stage, task) for stage in range(task + 1, self.tasks + 1))
            for task in range(self.tasks - 1)
        ]
        return sum(fallen) / len(fallen) if fallen else None

    @property
    def lost(self) -> dict[str, float]:
        """What the sets that belong to no task lost from the base model to the end: nats, or points of a score."""
        return {
            name: self.loss_of(self.tasks, column) - self.loss_of(0, column)
            for column, name in enumerate(self.sets)
            if column >= self.tasks
        }

    def to_dict(self) -> dict[str, Any]:
        """Return all of it in plain values, for JSON."""
        return {
            "format_version": FORMAT_VERSION,
            "stages": list(self.stages),
            "sets": list(self.sets),
            "metrics": list(self.metrics),
            "values": [list(row) for row in self.values],
            "stderr": [list(row) for row in self.stderr],
            "learnt": self.learnt,
            "backward_transfer": self.backward_transfer,
            "forgetting": self.forgetting,
            "lost": self.lost,
        }

    def write(self, file: str | Path) -> Path:
        """Write them as JSON. The file is replaced in one step."""
        with replacing(file) as partial:
            partial.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return Path(file)

    def table(self) -> Table:
        """Return the matrix for the terminal; in brackets is the task that a stage has just learnt."""
        table = Table(title="every task after every stage", title_justify="left")
        table.add_column("after")
        for name, metric in zip(self.sets, self.metrics, strict=True):
            table.add_column(f"{name}\n{metric}", justify="right")
        for stage, (name, row) in enumerate(zip(self.stages, self.values, strict=True)):
            cells = [f"{value:.4f}" for value in row]
            if stage:
                cells[stage - 1] = f"[{cells[stage - 1]}]"
            table.add_row(name, *cells)
        return table

    def sentences(self) -> list[str]:
        """Say in words what the matrix adds up to."""
        said = []
        if self.backward_transfer is not None and self.forgetting is not None:
            given = "gave" if self.backward_transfer >= 0 else "took from"
            said.append(
                f"Backward transfer {self.backward_transfer:+.4f}: later tasks {given} the earlier ones, in the mean."
            )
            said.append(f"Forgetting {self.forgetting:.4f}: how far a task fell from its best stage to the end.")
        for name, amount in self.lost.items():
            verb = "lost" if amount >= 0 else "gained"
            said.append(f"{name} {verb} {abs(amount):.4f} against the base model.")
        return said

    def draw(self, file: str | Path) -> Path:
        """
        Draw the matrix: how each set's figure changed from the base model, stage by stage.

        Raises:
            `ImportError`: matplotlib is not installed.
        """
        change = [
            [self.loss_of(0, c) - self.loss_of(s, c) for c in range(len(self.sets))] for s in range(len(self.stages))
        ]
        limit = max([1e-6, *(abs(value) for row in change for value in row if math.isfinite(value))])
        with canvas() as figure_of:
            figure = figure_of(
                figsize=(max(WIDTH, 1.6 + 1.0 * len(self.sets)), 1.4 + 0.45 * len(self.stages)), dpi=110
            )
            axes = figure.subplots()
            image = axes.imshow(change, aspect="auto", cmap="PuOr_r", vmin=-limit, vmax=limit)
            axes.set_xticks(range(len(self.sets)), self.sets, parse_math=False)
            axes.set_yticks(
                range(len(self.stages)), [f"after {name}" if n else name for n, name in enumerate(self.stages)]
            )
            for stage, row in enumerate(self.values):
                for column, value in enumerate(row):
                    dark = abs(change[stage][column]) > 0.65 * limit
                    weight = "bold" if stage == column + 1 else "normal"
                    color = "white" if dark else "black"
                    axes.text(column, stage, f"{value:.3f}", ha="center", va="center", color=color, weight=weight)
            figure.colorbar(image, ax=axes, label="better than the base model")
            figure.savefig(file, metadata={"Software": None})
        return Path(file)


def sequence_results(stages: Sequence[str], sets: Sequence[str], figures: Sequence[Sequence[Any]]) -> SequenceResults:
    """
    Put measured figures into the matrix.

    Args:
        stages (`Sequence[str]`): the base model's name, then the adapters', in the order in which they were trained.
        sets (`Sequence[str]`): the names of the sets of rows.
        figures (`Sequence[Sequence[Result]]`): of every stage, the [`Result`] of every set.
    """
    return SequenceResults(
        tuple(stages),
        tuple(sets),
        tuple(result.metric for result in figures[0]),
        tuple(tuple(result.value for result in row) for row in figures),
        tuple(tuple(result.stderr for result in row) for row in figures),
    )
