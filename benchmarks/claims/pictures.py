"""The pictures of `docs/results.md`."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .evidence import Estimate
from .tuning import OTHER_MASKS

COLORS = {
    "train": "#0072b2", "agreement": "#d55e00", "adam": "#009e73", "random, per matrix": "#7f7f7f", "LoRI-D": "black",
    "LoRA": "#cc79a7", "LoRI-S": "#0072b2", "random": "#7f7f7f", "cheap": "#d55e00",
}  # fmt: skip
LABELS = {
    "train": "first steps of a dense run", "agreement": "agreement of signs at B0",
    "adam": "Adam's moves on gradients at B0",
}  # fmt: skip
# On the page, too.
METHOD_NAMES = {"random": "LoRI-S, random mask"} | {
    method: f"LoRI-S, mask of {mask.batches} {'dense steps' if mask.method == 'train' else 'batches'}"
    for method, mask in OTHER_MASKS.items()
}


def draw_curves(tasks: dict[str, dict], file: Path) -> None:
    """
    Draw what is lost against the length of the calibration.

    Args:
        tasks (`dict[str, dict]`):
            Task -> `points`, method -> [(batches, difference to the paper's mask), ...], and `levels`, name ->
            difference, of what has no length.
        file (`Path`): the .png file.
    """
    figure = Figure(figsize=(max(5.0, 3.4 * len(tasks)), 3.6), layout="constrained", dpi=110)
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axes, (task, curve) in zip(panels, tasks.items(), strict=True):
        axes.axhline(0, color="#bdbdbd", linewidth=1, label="mask of the whole dense run")
        for name, level in curve["levels"].items():
            axes.axhline(level.mean, color=COLORS[name], linestyle="--", linewidth=1.2, label=LABELS.get(name, name))
            if level.seeds > 1:
                axes.axhspan(
                    level.mean - level.stderr, level.mean + level.stderr, color=COLORS[name], alpha=0.12, lw=0
                )
        for method, points in curve["points"].items():
            batches, estimates = zip(*points, strict=True)
            aside = 1.05 ** (list(LABELS).index(method) - 1)  # so that error bars do not hide each other
            _line(axes, [aside * count for count in batches], estimates, COLORS[method], LABELS[method])
        axes.set_xscale("log", base=2)
        axes.set_xticks([2, 4, 8, 15, 30], ["2", "4", "8", "15", "30"])
        axes.minorticks_off()
        axes.set_xlabel("batches looked at")
        axes.set_title(task, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("loss, more than with\nthe paper's mask (nats)")
    _save(figure, file)


def _line(axes, x: Sequence[float], estimates: tuple[Estimate, ...], color: str, label: str) -> None:
    errors = [point.stderr if point.seeds > 1 else 0 for point in estimates]
    means = [point.mean for point in estimates]
    axes.errorbar(x, means, yerr=errors, color=color, marker="o", markersize=4, capsize=2, linewidth=1.4, label=label)


def _save(figure: Figure, file: Path) -> None:
    entries = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(file, metadata={"Software": None})
