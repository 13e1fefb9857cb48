"""What rewards generated answers: functions by their names, and a reward model."""

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import find_adapter_config_file
from trl import rewards

from ..adapter.folder import open_adapter
from ..adapter.load import load_lori_adapter
from .base_model import load_base_model

# TRL's own names on its command line, and what it makes them with there.
_NAMED = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
_MADE = {"get_soft_overlong_punishment": {"max_completion_len": 1280, "soft_punish_cache": 256}}


def find_reward_functions(names: Iterable[str]) -> list[Callable[..., Any]]:
    """
    Find reward functions by their names, as `trl grpo` does.

    Args:
        names (`Iterable[str]`): names of TRL's, or import paths, looked up from the working directory too.

    Raises:
        `ValueError`: there is no such function.
    """
    return [_find(name) for name in names]


def _find(name: str) -> Callable[..., Any]:
    if name in _NAMED:
        return getattr(rewards, name)
    if name in _MADE:
        return getattr(rewards, name)(**_MADE[name])
    module_name, _, function_name = name.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
        fault = None if callable(function) else f"it is a {type(function).__name__}"
    except (ImportError, AttributeError, ValueError) as error:  # a name without a module is a ValueError
        fault = str(error)
    if fault is not None:
        raise ValueError(
            f"`reward_funcs={name}` is no function that can be imported ({fault}). Allowed are "
            f"{', '.join((*_NAMED, *_MADE))}, and import paths, e.g. `my_rewards.is_short` for the function "
            "`is_short` of `my_rewards.py` in the folder where the command is run. Correct the name."
        )
    return function


def load_reward_model(name_or_path: str, **arguments: Any) -> PreTrainedModel:
    """
    Load a model that scores answers, frozen; of an adapter of `lori reward`, with its base.

    Args:
        name_or_path (`str`): a model of sequence classification or such an adapter, in a folder or on the Hub.
        **arguments (`Any`, *optional*): as of `from_pretrained`.

    Raises:
        `FileNotFoundError`, `OSError`, `ValueError`: as of [`load_base_model`] and [`load_lori_adapter`].
    """
    arguments |= {"architecture": AutoModelForSequenceClassification, "num_labels": 1}
    if find_adapter_config_file(name_or_path) is None:
        return load_base_model(name_or_path, **arguments).requires_grad_(False)
    with open_adapter(name_or_path) as adapter:
        base = adapter.config["base_model_name_or_path"]
    return load_lori_adapter(load_base_model(base, **arguments), name_or_path).merge_and_unload().requires_grad_(False)
