"""How good a model is: loss on held-out rows, accuracy, refusals, pass@k."""

from .harness import evaluate, load_tasks
from .loss import CompletionLoss, completion_loss, held_out_rows
from .models import find_base_model, is_whole_model, load_model, with_adapter
from .processes import all_processes
from .results import Result, read_results, records, results_table, write_file, write_results
from .scoring import extract_label, extract_number, is_refusal, is_refusal_by_keywords, pass_at_k

__all__ = [
    "CompletionLoss",
    "Result",
    "all_processes",
    "completion_loss",
    "evaluate",
    "extract_label",
    "extract_number",
    "find_base_model",
    "held_out_rows",
    "is_refusal",
    "is_refusal_by_keywords",
    "is_whole_model",
    "load_model",
    "load_tasks",
    "pass_at_k",
    "read_results",
    "records",
    "results_table",
    "with_adapter",
    "write_file",
    "write_results",
]
