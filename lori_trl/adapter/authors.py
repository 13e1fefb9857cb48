"""The form in which the paper's authors store masks: `masks/0.9_mask.pt`. Of a pickle, only tensors are read."""

import pickle
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from ..method.layers import module_path
from .mask_files import MasksMetadata

_SPARSITY = re.compile(r"(0\.\d+)_mask\.pt")


def read_authors_masks(file: Path, task: str | None) -> tuple[dict[str, Tensor], MasksMetadata]:
    """
    Read a mask of the authors' code: a dict of full parameter names to bool, pickled by torch.

    Args:
        file (`Path`): the file.
        task (`str`, *optional*): what to call the task, which the file does not say.

    Returns:
        `tuple[dict[str, Tensor], MasksMetadata]`: module path -> bool tensor `(out_features, rank)`; what is known.

    Raises:
        `ValueError`: the file is something else. Nothing of it was executed.
    """
    try:
        with zipfile.ZipFile(file) as archive:  # torch stores without compression; a bomb would not
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise zipfile.BadZipFile("it is compressed")
        names = torch.load(file, map_location="cpu", weights_only=True)
        masks = {module_path(name): mask != 0 for name, mask in names.items() if mask.dim() == 2}
        if len(masks) != len(names) or not masks:
            raise ValueError(f"{len(names)} names stand for {len(masks)} matrices")
        sparsity = _SPARSITY.fullmatch(file.name)
        return masks, MasksMetadata(task=task, sparsity=float(sparsity[1]) if sparsity else None)
    except (RuntimeError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, pickle.PickleError) as error:
        raise ValueError(
            f"`{file}` is no mask file of the LoRI authors' code ({type(error).__name__}). Such a file is a "
            "pickled dict of parameter names to bool tensors and nothing else; nothing of it was executed. Do not "
            "use it, or convert it where you trust it."
        ) from None
