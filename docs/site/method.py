"""Draw docs/method.png, the picture of the method: `python docs/site/method.py`."""

from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

PICTURE = Path(__file__).parents[1] / "method.png"
ROWS, RANK, COLUMNS, KEPT = 12, 5, 11, 0.1
TRAINED, ZERO = "#D55E00", "#f3f3f3"


def main() -> None:
    draw = np.random.default_rng(3)
    sizes = [draw.exponential(size=(ROWS, RANK)) for _ in range(2)]  # two matrices compete: the mask is global
    threshold = np.sort(np.concatenate([size.ravel() for size in sizes]))[-int(2 * ROWS * RANK * KEPT)]
    frozen = [draw.random((RANK, COLUMNS)) for _ in range(2)]
    figure = Figure(figsize=(9, 3.3), dpi=110)
    panels = (
        ("1  Calibrate", "Train all of B,\nfor a while.", lambda size: 0.15 + 0.85 * size / size.max()),
        ("2  Select", "Keep the 10 % that moved most,\nover the whole model.", lambda size: (size >= threshold) * 1.0),
        ("3  Reset", "B goes back to zero.\nThe mask stays.", lambda size: (size >= threshold) * 0.25),
        (
            "4  Adapt",
            "Train the mask's entries\nand nothing else.",
            lambda size: (size >= threshold) * (0.4 + size / 8),
        ),
    )
    colors = ListedColormap([_mixed(share) for share in np.linspace(0, 1, 256)])
    for number, (title, text, shade) in enumerate(panels):
        left = 0.02 + number * 0.25
        figure.text(left + 0.1, 0.93, title, ha="center", fontsize=12, weight="bold")
        for matrix, size in enumerate(sizes):
            axes = figure.add_axes((left + 0.015 + matrix * 0.095, 0.43, 0.075, 0.44))
            axes.imshow(np.clip(shade(size), 0, 1), cmap=colors, vmin=0, vmax=1, aspect="auto")
            _grid(axes, ROWS, RANK)
            axes.set_ylabel("B" if matrix == 0 else "", rotation=0, labelpad=8, fontsize=10)
            below = figure.add_axes((left + 0.015 + matrix * 0.095, 0.235, 0.075, 0.15))
            below.imshow(frozen[matrix], cmap="Greys", vmin=-0.6, vmax=2.2, aspect="auto")
            _grid(below, RANK, COLUMNS)
            below.set_ylabel("A" if matrix == 0 else "", rotation=0, labelpad=8, va="center", fontsize=10)
        figure.text(left + 0.1, 0.13, text, ha="center", va="center", fontsize=9.5)
        if number < len(panels) - 1:
            ends = (left + 0.207, 0.62), (left + 0.243, 0.62)
            arrow = FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=14, color="black")
            figure.add_artist(arrow)
    figure.text(
        0.5,
        0.02,
        "A is random and frozen from first to last (grey).  B: white is zero, orange is trained.",
        ha="center",
    )
    figure.savefig(PICTURE, metadata={"Software": None})


def _mixed(share: float) -> tuple[float, ...]:
    ends = [tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)) for color in (ZERO, TRAINED)]
    return tuple(low + share * (high - low) for low, high in zip(*ends, strict=True))


def _grid(axes, rows: int, columns: int) -> None:
    axes.set_xticks(np.arange(-0.5, columns), [])
    axes.set_yticks(np.arange(-0.5, rows), [])
    axes.grid(color="white", linewidth=1)
    axes.tick_params(length=0)


if __name__ == "__main__":
    main()
