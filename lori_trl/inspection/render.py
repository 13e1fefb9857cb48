"""An inspection's sections as a page and as pictures."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from ..adapter.heatmaps import WIDTH, canvas
from .sections import Drawing, Section, verdict
from .statistics import Inspection

_INK = "#010203"  # stands for the page's own text colour in an SVG


def render_page(inspection: Inspection, sections: Sequence[Section]) -> str:
    """
    Render one HTML page that needs no other file and no network.

    Raises:
        `ImportError`: matplotlib is not installed.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    pictures = {section.key: _svg(section.key, section.drawing) for section in sections if section.drawing is not None}
    names = [adapter.name for adapter in inspection.adapters]
    page = environment.get_template("page.html.jinja")
    seen_first = sorted(sections, key=lambda section: section.drawing is None)
    return page.render(
        names=names, verdict=verdict(inspection), notes=inspection.notes, sections=seen_first, pictures=pictures
    )


def render_pictures(sections: Sequence[Section]) -> dict[str, bytes]:
    """
    Draw every section that has a picture.

    Returns:
        `dict[str, bytes]`: the section's key -> a PNG.

    Raises:
        `ImportError`: matplotlib is not installed.
        `ValueError`: there is nothing to draw.
    """
    return {key: _png([[drawing]]) for key, drawing in _drawings(sections).items()}


def render_picture(sections: Sequence[Section]) -> bytes:
    """
    Draw all sections that have a picture into one PNG, in two columns.

    Raises:
        `ImportError`: matplotlib is not installed.
        `ValueError`: there is nothing to draw.
    """
    columns: list[list[Drawing]] = [[], []]
    for drawing in _drawings(sections).values():
        min(columns, key=_height).append(drawing)
    return _png([column for column in columns if column])


def _drawings(sections: Sequence[Section]) -> dict[str, Drawing]:
    drawings = {section.key: section.drawing for section in sections if section.drawing is not None}
    if not drawings:
        raise ValueError(
            "`--save` has nothing to draw: every B is zero. A trained adapter is needed. Pass one, or leave out "
            "`--save`."
        )
    return drawings


def _height(drawings: Sequence[Drawing]) -> float:
    return sum(drawing.height + 0.35 for drawing in drawings)


def _png(columns: Sequence[Sequence[Drawing]]) -> bytes:
    height = max(map(_height, columns))
    with canvas() as figure_of:
        figure = figure_of(figsize=(WIDTH * len(columns), height), dpi=160)
        for part, column in zip(figure.subfigures(1, len(columns), squeeze=False)[0], columns, strict=True):
            heights = [drawing.height + 0.35 for drawing in column]
            heights += [height - sum(heights)] if height - sum(heights) > 0.01 else []
            panels = part.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
            for panel, drawing in zip(panels, column, strict=False):  # the last panel may be empty
                panel.suptitle(drawing.title, fontweight="bold")
                drawing.draw(panel)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _svg(key: str, drawing: Drawing) -> str:
    """Return a drawing as an `<svg>` for a page: letters in the page's colour, ids that occur nowhere else."""
    with canvas(_INK) as figure_of:
        figure = figure_of(figsize=(WIDTH, drawing.height))
        drawing.draw(figure)
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()
    svg = re.sub(r"<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{key}-", svg).replace(_INK, "currentColor")
    size = re.compile(r'<svg ([^>]*?)(?:width|height)="[\d.]+pt"')
    while size.match(svg):
        svg = size.sub(r"<svg \1", svg, count=1)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
