"""Training B on a mask."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def mask_gradients(weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> list[RemovableHandle]:
    """
    Keep the gradient of B at zero outside the mask: the `hook` backend.

    The hooks run before a gradient is accumulated, reduced over ranks or clipped, so that nothing behind them sees
    the other entries. With no weight decay on B they then stay as they are, bit for bit, under every optimizer that
    moves each entry by its own gradient.

    Args:
        weights (`Mapping[str, nn.Parameter]`): module path -> lora_B's weight `(out_features, rank)`.
        masks (`Mapping[str, Tensor]`): module path -> bool tensor of the same shape; True is trained.

    Returns:
        `list[RemovableHandle]`: call `.remove()` on each to train densely again.

    Source: Algorithm 1, line 18.
    """
    return [
        weight.register_hook(_zero_outside(masks[path].to(weight.device)))
        for path, weight in weights.items()
        if not masks[path].all()
    ]


def _zero_outside(mask: Tensor):
    outside = ~mask
    return lambda gradient: gradient.masked_fill(outside, 0)
