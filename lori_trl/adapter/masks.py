"""The masks of a task and their files: in an adapter's folder, alone, or on the Hub."""

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

from ..hub.commit import push_files
from ..hub.download import is_repo_id
from ..method.masks import Masks
from .authors import read_authors_masks
from .compact_file import is_compact, read_compact_masks
from .fetch import fetch_adapter
from .layout import check_task_name
from .mask_files import MasksMetadata, find_masks, pick_task, read_masks, write_masks


class LoriMasks(Masks):
    """
    The masks of one task: module path in the base model -> bool tensor `(out_features, rank)`, True where the task
    trains B.

    A mapping, with `&`, `|`, `-`, `~`, `==` and statistics, all of [`~lori_trl.method.masks.Masks`]; this class adds
    their files.

    ```python
    >>> import torch
    >>> from lori_trl import LoriMasks
    >>> masks = LoriMasks.select({"layers.0.q_proj": torch.tensor([[0.1, -3.0], [2.0, 0.0]])}, sparsity=0.5)
    >>> masks["layers.0.q_proj"].tolist(), masks.density
    ([[False, True], [True, False]], 0.5)

    ```
    """

    @property
    def metadata(self) -> MasksMetadata:
        """What is stored beside the entries: its fields are the keyword arguments that make these masks again."""
        return MasksMetadata(self.task, self.sparsity, self.granularity, self.threshold, self.projection)

    # ---- files -------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> Path:
        """
        Write `masks/<task>.safetensors` into a folder: one bit an entry, metadata as JSON.

        Args:
            folder (`str` or `Path`): the adapter's folder; made if missing.

        Returns:
            `Path`: the file. It replaces an older one in one step.

        Raises:
            `ValueError`: `task` is unset or no valid name.
        """
        return write_masks(folder, self, self.metadata)

    def push_to_hub(self, repo_id: str, *, token: str | None = None, **kwargs: Any) -> CommitInfo:
        """
        Push the masks alone, as `masks/<task>.safetensors`, in one commit.

        Args:
            repo_id (`str`): the repository; made if it is missing.
            token (`str`, *optional*): by default that of `hf auth login`.
            **kwargs: `private`, `revision`, `create_pr` and `commit_message` of [`push_lori_to_hub`].

        Raises: as [`push_lori_to_hub`].
        """
        with tempfile.TemporaryDirectory() as stage:
            file = self.save_pretrained(stage)
            kwargs.setdefault("commit_message", f"LoRI masks: {self.task}")
            return push_files({file.relative_to(stage).as_posix(): file}, repo_id, token=token, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        folder_file_or_repo: str | Path,
        task: str | None = None,
        revision: str | None = None,
        *,
        token: str | None = None,
    ) -> "LoriMasks":
        """
        Load the masks of a task.

        Args:
            folder_file_or_repo (`str` or `Path`):
                An adapter's folder, its `masks/` folder, a mask file, or a repository on the Hub. The authors' own
                repositories and `masks/0.9_mask.pt` files are read too, without unpickling anything but tensors.
            task (`str`, *optional*):
                Which task's masks, where there are several; by default the newest.
            revision (`str`, *optional*):
                A branch, tag or commit of the repository; by default the head of `main`.
            token (`str`, *optional*):
                A token that may read the repository; by default that of `hf auth login`.

        Raises:
            `FileNotFoundError`: there is no such folder, file, repository or task.
            `PermissionError`: the repository may not be read.
            `ConnectionError`: the Hub cannot be reached, and the cache does not have the files.
            `ValueError`: the file is truncated, altered, of a later format or no mask file.
        """
        if task is not None:
            check_task_name(task)
        path = Path(folder_file_or_repo)
        if is_repo_id(folder_file_or_repo):
            path = fetch_adapter(str(folder_file_or_repo), weights=False, revision=revision, token=token)
        file = find_masks(path, task)
        if file.suffix == ".pt":
            entries, metadata = read_authors_masks(file, task)
        elif is_compact(file):
            masks = read_compact_masks(file)
            entries, metadata = masks[pick_task(masks, task, path)]
        else:
            entries, metadata = read_masks(file)
        return cls(entries, **vars(metadata))
