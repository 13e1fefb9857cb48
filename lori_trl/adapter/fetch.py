"""An adapter's files, or its masks alone, from the Hub."""

import re
from collections.abc import Iterable
from pathlib import Path

from ..hub.download import fetch_from_hub
from .layout import ADAPTER_WEIGHTS, choose, max_bytes


def fetch_adapter(
    repo_id: str, *, weights: bool = True, revision: str | None = None, token: str | None = None
) -> Path:
    """
    Fetch an adapter's files into the Hub's cache: all of one commit, each checked against its hash.

    Args:
        repo_id (`str`): the repository, `namespace/name`.
        weights (`bool`, *optional*, defaults to `True`): whether the weights are wanted too, or the masks alone.
        revision (`str`, *optional*): a branch, tag or commit; by default the head of `main`.
        token (`str`, *optional*): by default that of `hf auth login`.

    Returns:
        `Path`: the folder in the cache that has the files.

    Raises:
        `FileNotFoundError`: there is no such repository or revision, or no adapter or masks in it.
        `PermissionError`: the token is invalid, or the repository is gated.
        `ConnectionError`: the Hub cannot be reached, and the cache does not have the files.
        `ValueError`: a file is not what the Hub says it is, or has a name or size that no adapter's file has.
    """

    def wanted(names: list[str]) -> list[str]:
        chosen = choose(names, weights=weights)
        if not chosen and weights:
            refuse_other_weights(repo_id, names)
        if not chosen:
            raise FileNotFoundError(
                f"`{repo_id}` holds no LoRI adapter or masks: none of its {len(names)} files is one of theirs. Such a "
                "repository has a lori_config.json and masks/, or the authors' masks/0.9_mask.pt. Pass another."
            )
        return chosen

    return fetch_from_hub(repo_id, wanted, max_bytes=max_bytes, revision=revision, token=token)


def refuse_other_weights(name: str, files: Iterable[str]) -> None:
    """
    Raise `FileNotFoundError`, and say how to convert them, if an adapter has its weights in another form.

    Args:
        name (`str`): the adapter: a folder or a repository.
        files (`Iterable[str]`): the names of its files.
    """
    folder = name if Path(name).is_dir() else name.rpartition("/")[2]
    others = sorted(each for each in files if re.fullmatch(r"adapter_model(-\d+-of-\d+)?\.(bin|safetensors)", each))
    if not others or ADAPTER_WEIGHTS in others:
        return
    if others[0] == "adapter_model.bin":
        code = f"PeftModel.from_pretrained(base, {name!r}).save_pretrained({folder!r})"
    else:
        load = "load_file(file)" if others[0].endswith(".safetensors") else "torch.load(file, weights_only=True)"
        code = (
            f"save_file({{k: v for file in Path({folder!r}).glob('adapter_model-*') for k, v in {load}.items()}}, "
            f"{f'{folder}/{ADAPTER_WEIGHTS}'!r}, metadata={{'format': 'pt'}})"
        )
    raise FileNotFoundError(
        f"`{name}` has its weights in {others[0]}. What is read here is one {ADAPTER_WEIGHTS}, which holds no code. "
        f"Convert it: `{code}`."
    )
