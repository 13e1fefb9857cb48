"""The search for a merge's weights, under the name it had before `lori_trl.merging` was a folder."""

from .merging.search import GRID, STRATEGIES, Search, Trial, search_merge_weights

__all__ = ["GRID", "STRATEGIES", "Search", "Trial", "search_merge_weights"]
