"""Saliencies that cost little: how far a few batches' gradients agree in sign, and chance."""

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

CALIBRATION_METHODS = ("train", "gradient", "random")
GRADIENT_BATCHES = 8  # how many gradients are compared by default


class GradientAgreement(torch.optim.Optimizer):
    """
    An optimizer that moves nothing: it remembers how far the gradients of its steps agree in sign.

    In an optimizer's place it gets what any optimizer gets: gradients that are accumulated, averaged over ranks and
    unscaled, a place in the checkpoints, and exact resuming. It keeps two float32 numbers an entry, as many as Adam.

    Args:
        params (`Iterable`): the parameters, or groups of them, whose gradients count.
        lr (`float`, *optional*, defaults to `0.0`): has no effect; learning rate schedulers ask for it.

    ```python
    >>> import torch
    >>> B = torch.zeros(2, requires_grad=True)
    >>> optimizer = GradientAgreement([B])
    >>> for gradient in ([1.0, 4.0], [1.0, -4.0]):
    ...     B.grad = torch.tensor(gradient)
    ...     optimizer.step()
    >>> optimizer.saliency(B), B.detach()
    (tensor([1.4142, 0.0000]), tensor([0., 0.]))

    ```
    """

    def __init__(self, params: Iterable, lr: float = 0.0):
        super().__init__(params, {"lr": lr, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss is known
        """Add the gradients and their squares to the sums."""
        for group in self.param_groups:
            group["steps"] += 1  # float16's scaler leaves steps out whose gradients are not finite
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.add(self.state[parameter], parameter.grad.float())

    def add(self, state: dict[str, Tensor], gradient: Tensor) -> None:
        """Add one gradient to a parameter's sums."""
        for name, value in (("sum", gradient), ("square_sum", gradient.square())):
            if name not in state:
                state[name] = torch.zeros_like(value)
            state[name] += value

    def saliency(self, parameter: Tensor) -> Tensor:
        """
        Return |sum g| / sqrt(sum g^2) over the gradients g of all steps, of the parameter's shape: 0 where there was
        none, 1 after one step, up to the root of the number of steps where all have one sign and size.
        """
        state = self.state[parameter]
        if not state:
            return torch.zeros_like(parameter, dtype=torch.float32)
        return (state["sum"].abs() / state["square_sum"].sqrt()).nan_to_num_(0)


def random_saliency(path: str, shape: tuple[int, ...], *, seed: int) -> Tensor:
    """
    Draw one module's saliency at random, from its own CPU generator, which depends on `(seed, path)` alone.

    Args:
        path (`str`): the module's path in the base model.
        shape (`tuple[int, ...]`): B's, `(out_features, rank)`.
        seed (`int`): the mask's seed.

    Returns:
        `Tensor`: float32, uniform in (0, 1]: no entry is out of the race.
    """
    key = hashlib.sha256(f"mask/{seed}/{path}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:4], "big"))
    return 1 - torch.rand(shape, generator=generator)
