"""Weights for a merge, found on held-out data."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapter.folder import read_modules
from ..adapter.load import load_tokenizer
from ..evaluation import completion_loss
from ..evaluation.models import load_model, load_tokenizer_of
from ..method.layers import lora_layers, module_path
from ..training.tokenizer_checks import check_tokenizer
from .plan import Plan, open_plan

logger = logging.getLogger(__name__)

STRATEGIES = ("shared", "coordinate")
# Steps of 1.3 around the paper's weights, 0.3 to 0.5: coarser ones hid what the methods differ by.
GRID = (0.12, 0.16, 0.21, 0.27, 0.35, 0.46, 0.59, 0.77, 1.0, 1.3)
_MAX_ROUNDS = 3


@dataclass(frozen=True)
class Trial:
    """Weights that were tried."""

    weights: tuple[float, ...]  # one for each adapter
    losses: dict[str, float]  # held-out set -> loss of a completion token, in nats

    @property
    def objective(self) -> float:
        """The mean of the losses over the held-out sets, each counts the same; infinite where one is no number."""
        mean = sum(self.losses.values()) / len(self.losses)
        return mean if math.isfinite(mean) else math.inf


@dataclass(frozen=True)
class Search:
    """A search for the weights of a merge."""

    strategy: str  # `"shared"` or `"coordinate"`
    grid: tuple[float, ...]  # the weights that were tried for an adapter
    base: Trial  # the base model alone, all weights 0
    trials: list[Trial]  # in the order in which they were tried

    @property
    def best(self) -> Trial:
        """The trial of the lowest mean loss, the first of several."""
        return min(self.trials, key=lambda trial: trial.objective)

    @property
    def record(self) -> dict[str, Any]:
        """All of it in plain values, for `lori_config.json`."""
        return {
            "strategy": self.strategy,
            "objective": "mean over the held-out sets of the loss of a completion token",
            "grid": list(self.grid),
            "base": _numbers(self.base.losses),
            "trials": [
                {"weights": list(trial.weights), **_numbers({"losses": trial.losses, "objective": trial.objective})}
                for trial in self.trials
            ],
        }


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Return figures as JSON holds them: `None` for what is no number."""
    return {
        name: _numbers(value) if isinstance(value, dict) else value if math.isfinite(value) else None
        for name, value in values.items()
    }


def default_grid(method: str) -> tuple[float, ...]:
    """Return the weights to try; of `linear`, whose weights enter the delta squared, the square roots of those."""
    return tuple(round(math.sqrt(weight), 4) for weight in GRID) if method == "linear" else GRID


def search_merge_weights(
    adapters: Sequence[str | Path],
    heldout: Mapping[str, Iterable[Mapping[str, Any]]],
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    method: str = "concat",
    strategy: str = "coordinate",
    grid: Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    base_model: str | None = None,
    batch_size: int = 8,
    token: str | None = None,
    dtype: str = "float32",
    load_in_4bit: bool = False,
) -> Search:
    """
    Search the weights of a merge for the lowest loss on held-out completions, the mean over the held-out sets.

    The base model is loaded once and the adapters are read once; every trial merges their factors in memory.

    Args:
        adapters (`Sequence[str]`): as in [`merge_lori_adapters`].
        heldout (`Mapping[str, Iterable]`): name -> prompt-completion rows that no adapter was trained on; one set a
            task, as a rule.
        model (`PreTrainedModel`, *optional*):
            The base model, left as it was; by default the one that the adapters name is loaded.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Its tokenizer; where the model is loaded here, the adapters' own if they bring the same, else the base's.
        method (`str`, *optional*, defaults to `"concat"`): as in [`merge_lori_adapters`].
        strategy (`str`, *optional*, defaults to `"coordinate"`):
            `"shared"` tries every weight of the grid, the same for all adapters. `"coordinate"` goes on from the best
            of these: it tries the grid for one adapter after the other, and again until nothing gets better (at most
            3 rounds).
        grid (`Sequence[float]`, *optional*): the weights to try, in any order; by default [`default_grid`].
        density, rank, seed, base_model, token: as in [`merge_lori_adapters`].
        batch_size (`int`, *optional*, defaults to 8): rows a forward pass.
        dtype (`str`, *optional*, defaults to `"float32"`): what the base model is loaded in.
        load_in_4bit (`bool`, *optional*, defaults to `False`): whether its linear layers are packed into 4 bits.

    Returns:
        [`Search`]: its `best.weights` are for [`merge_lori_adapters`].

    Raises: as [`merge_lori_adapters`], and `ValueError` where there are no held-out rows, the grid is empty, or the
        adapters do not fit the model.

    Source: the paper gives all adapters one weight and compares a few (Figures 4 d and 7).
    """
    grid = tuple(sorted(set(default_grid(method) if grid is None else grid)))
    _check_search(heldout, strategy, grid)
    sets = {name: list(rows) for name, rows in heldout.items()}
    with open_plan(
        adapters, method, density=density, rank=rank, seed=seed, base_model=base_model, token=token
    ) as plan:
        if model is None:
            if plan.base is None:
                raise ValueError(
                    "`base_model` is missing, and the adapters name none. The search needs the base model, a folder "
                    "or a name on the Hub. Pass it."
                )
            tokenizer = load_tokenizer(plan.tokenizer) or load_tokenizer_of(plan.base)
            for name, rows in sets.items():
                check_tokenizer(rows, tokenizer, name)
            model, _ = load_model(plan.base, dtype, load_in_4bit=load_in_4bit)
        factors = dict(read_modules(plan.sources, plan.paths, torch.float32))
        if not {*plan.paths} <= {module_path(name) for name, _ in model.named_modules()}:
            raise _no_base(plan)
        merged = get_peft_model(model, plan.adapter_config())
    layers = lora_layers(merged, "default")
    tried: dict[tuple[float, ...], Trial] = {}
    count = len(plan.sources)
    coordinates = count if strategy == "coordinate" and count > 1 else 0
    try:
        if any((layer.out_features, layer.in_features) != plan.shapes[path] for path, layer in layers.items()):
            raise _no_base(plan)
        with Progress(transient=True) as progress:
            bar = progress.add_task("weights tried", total=1 + len(grid) + _MAX_ROUNDS * coordinates * (len(grid) - 1))

            def attempt(weights: tuple[float, ...]) -> Trial:
                if weights not in tried:
                    _set_factors(plan, layers, factors, weights)
                    losses = {
                        name: completion_loss(merged, tokenizer, rows, batch_size=batch_size).loss
                        for name, rows in sets.items()
                    }
                    tried[weights] = Trial(weights, losses)
                progress.advance(bar)
                return tried[weights]

            base = attempt((0.0,) * count)
            del tried[base.weights]
            best = min((attempt((weight,) * count) for weight in grid), key=lambda trial: trial.objective)
            for _ in range(_MAX_ROUNDS if coordinates else 0):
                before = best
                for number in range(coordinates):
                    others = [
                        (*best.weights[:number], weight, *best.weights[number + 1 :])
                        for weight in grid
                        if weight != best.weights[number]
                    ]
                    best = min([best, *map(attempt, others)], key=lambda trial: trial.objective)
                if best is before:
                    break
    finally:
        merged.unload()
    search = Search(strategy, grid, base, list(tried.values()))
    if search.best.objective == math.inf:
        raise ValueError(
            f"No weights of the grid {', '.join(map(str, grid))} give a loss that is a number. Merged adapters work "
            "with some weights at least. Look at each with `lori eval --metrics loss`, or pass a lower `grid`."
        )
    edges = {grid[0], grid[-1]} & set(search.best.weights)
    if edges and len(grid) > 1:
        logger.warning(
            f"The best weights, {', '.join(map(str, search.best.weights))}, are at the edge of the grid, "
            f"{', '.join(map(str, grid))}. Better ones may lie beyond it. Pass a wider `grid`."
        )
    return search


def _check_search(heldout: Mapping[str, Any], strategy: str, grid: Sequence[float]) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(
            f"`strategy={strategy!r}` is not known. Allowed are {', '.join(STRATEGIES)}. Leave it unset for "
            "'coordinate'."
        )
    if not grid or 0 in grid:
        raise ValueError(
            f"`grid={list(grid)}` is empty or has a 0. It lists the weights to try, other than 0. Pass e.g. "
            "`grid=(0.2, 0.3, 0.5)`."
        )
    if not heldout:
        raise ValueError(
            "`heldout` names no data. The weights are chosen by the loss on held-out completions, one set a task as a "
            "rule. Pass e.g. `heldout={'math': rows}`, or `--heldout math.jsonl`."
        )


def _no_base(plan: Plan) -> ValueError:
    return ValueError(
        "The model does not fit the adapters: it lacks modules that they change, or has them in other shapes. It must "
        f"be their base model, {plan.base or 'which they do not name'}. Pass that one as `base_model`."
    )


@torch.no_grad()
def _set_factors(
    plan: Plan,
    layers: Mapping[str, LoraLayer],
    factors: Mapping[str, Mapping[int, tuple[Tensor, Tensor]]],
    weights: Sequence[float],
) -> None:
    for path, layer in layers.items():
        A, B = plan.merge(path, factors[path], weights)
        layer.lora_A["default"].weight.copy_(A)
        layer.lora_B["default"].weight.copy_(B)
