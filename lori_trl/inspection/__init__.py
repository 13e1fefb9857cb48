"""Interference in numbers and pictures: where tasks train, and how far their masks and deltas meet."""

from .measure import inspect_adapters
from .render import render_page, render_picture, render_pictures
from .sections import inspection_sections, verdict
from .statistics import Inspection, Magnitudes

__all__ = [
    "Inspection",
    "Magnitudes",
    "inspect_adapters",
    "inspection_sections",
    "render_page",
    "render_picture",
    "render_pictures",
    "verdict",
]
