"""Several adapters into one, from their files; and into their base model."""

from .into_base import merge_into_base, push_model
from .merge import merge_lori_adapters
from .methods import METHODS
from .plan import Plan, open_plan

__all__ = ["METHODS", "Plan", "merge_into_base", "merge_lori_adapters", "open_plan", "push_model"]
