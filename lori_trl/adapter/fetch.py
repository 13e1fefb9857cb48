"""An adapter's files, or its masks alone, from the Hub."""

from pathlib import Path

from ..hub.download import fetch_from_hub
from .layout import choose, max_bytes


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
        if not chosen:
            raise FileNotFoundError(
                f"`{repo_id}` holds no LoRI adapter or masks: none of its {len(names)} files is one of theirs. Such a "
                "repository has a lori_config.json and masks/, or the authors' masks/0.9_mask.pt. Pass another."
            )
        return chosen

    return fetch_from_hub(repo_id, wanted, max_bytes=max_bytes, revision=revision, token=token)
