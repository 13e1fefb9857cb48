"""How good a model is: loss on held-out rows, accuracy, refusals, pass@k."""

from .loss import CompletionLoss, completion_loss
from .scoring import extract_label, extract_number, is_refusal, is_refusal_by_keywords, pass_at_k

__all__ = [
    "CompletionLoss",
    "completion_loss",
    "extract_label",
    "extract_number",
    "is_refusal",
    "is_refusal_by_keywords",
    "pass_at_k",
]
