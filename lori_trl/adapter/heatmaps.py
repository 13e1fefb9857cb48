"""Heat maps over layers and projections: the density of a mask for the card, and what an inspection shows so."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .masks import LoriMasks

WIDTH = 4.8  # inches of a picture: what a phone can show without shrinking the letters much

Maps = Sequence[tuple[str, Mapping[tuple[int, str], float]]]  # each a title, and (layer, projection) -> value

_USUAL_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def draw_density(masks: LoriMasks | None, file: Path) -> bool:
    """
    Draw the density of a mask by layer and projection, where matplotlib is installed (`lori-trl[plots]`).

    Returns:
        `bool`: whether it was drawn: without matplotlib, or for all of B, there is nothing to see.

    Source: paper Figure 6.
    """
    if masks is None or masks.density == 1 or find_spec("matplotlib") is None:
        return False
    cells = {place: 100 * share for place, share in masks.by_layer_and_projection().items()}
    maps = [(f"Trained entries of B, mean {100 * masks.density:.2g} %", cells)]
    with canvas() as figure_of:
        figure = figure_of(figsize=(1.5 * WIDTH, maps_height(maps)), dpi=110)
        draw_maps(maps, "% of the entries", True, figure)
        figure.savefig(file, metadata={"Software": None})  # the same masks give the same bytes
    return True


@contextmanager
def canvas(ink: str = "black"):
    """Yield a function that makes figures, with small letters in one colour."""
    if find_spec("matplotlib") is None:
        raise ImportError(
            "`matplotlib` is not installed, and pictures need it. It comes with the extra `plots`. Run `pip install "
            "matplotlib`, or leave out the options that draw."
        )
    import matplotlib
    from matplotlib.figure import Figure

    parts = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style = {part: ink for part in parts} | {
        "font.size": 9,
        "axes.titlesize": 9,
        "figure.titlesize": 11,
        "legend.frameon": False,
        "svg.hashsalt": "lori_trl",
        "image.interpolation": "none",
    }
    with matplotlib.rc_context(style):
        yield partial(Figure, layout="constrained")


def maps_height(maps: Maps) -> float:
    """Return the height of heat maps below each other, in inches."""
    return 0.5 + sum(0.45 + 0.19 * len(projection_names([cells])) for _, cells in maps)


def draw_maps(maps: Maps, label: str, shared: bool, figure: Any) -> None:
    """Draw heat maps below each other, layers to the right; with one scale for all, or each its own."""
    ratios = [max(len(projection_names([cells])), 2) for _, cells in maps]
    panels = figure.subplots(len(maps), 1, squeeze=False, height_ratios=ratios)[:, 0]
    top = max((value for _, cells in maps for value in cells.values()), default=1)
    for axes, (title, cells) in zip(panels, maps, strict=True):
        layers, names = layer_numbers(cells), projection_names([cells])
        grid = [[cells.get((layer, name), math.nan) for layer in layers] for name in names]
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=top if shared else None)
        axes.set_yticks(range(len(names)), names, parse_math=False)
        number_layers(axes, layers)
        axes.set_title(title, loc="left", parse_math=False)
        if not shared:
            figure.colorbar(image, ax=axes, label=label, aspect=10)
    panels[-1].set_xlabel("layer")
    if shared:
        figure.colorbar(image, ax=list(panels), label=label, aspect=12 * len(maps))


def number_layers(axes: Any, layers: Sequence[int]) -> None:
    """Number the layers along an axis, at most thirteen of them."""
    step = 1 + (len(layers) - 1) // 12
    axes.set_xticks(range(0, len(layers), step), [layer_label(layer) for layer in layers[::step]])


def projection_names(cells: Iterable[Iterable[tuple[int, str]]]) -> list[str]:
    """Return the kinds of projection that occur, in the order in which a layer of Llama has them."""
    names = {name for mapping in cells for _, name in mapping}
    return [name for name in _USUAL_ORDER if name in names] + sorted(names - {*_USUAL_ORDER})


def layer_numbers(cells: Iterable[tuple[int, str]]) -> list[int]:
    """Return the layers that occur, sorted."""
    return sorted({layer for layer, _ in cells})


def layer_label(layer: int) -> str:
    """Name a layer; -1 stands for what is in none."""
    return "none" if layer < 0 else str(layer)
