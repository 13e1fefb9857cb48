"""Several adapters into one, from their files."""

from .merge import merge_lori_adapters
from .methods import METHODS
from .plan import Plan, open_plan

__all__ = ["METHODS", "Plan", "merge_lori_adapters", "open_plan"]
