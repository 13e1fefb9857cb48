"""lm-eval's model, with batches of its own making, which are shared out among processes."""

import copy
from collections.abc import Callable, Sequence
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from .processes import share_out

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


class HarnessModel(HFLM):
    """
    A model as lm-eval asks it.

    What is in a batch, and the seed that its samples are drawn from, do not depend on the number of processes, and so
    neither does an answer. lm-eval's own way deals rows out, and every process makes other batches of them.

    Args:
        model (`PreTrainedModel`): a causal model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer. It is copied.
        batch_size (`int`): sequences at a time.
        seed (`int`): of the samples.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, seed: int):
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        self.seed = seed

    def generate_until(self, requests: Sequence["Instance"], disable_tqdm: bool = False) -> list[str]:
        """Answer prompts: the longest first, those with the same settings together."""
        settings_and_length = [(str(request.args[1]), -len(request.args[0])) for request in requests]
        by_length = sorted(range(len(requests)), key=settings_and_length.__getitem__)
        return self._answer(super().generate_until, requests, [[index] for index in by_length], "generating")

    def loglikelihood(self, requests: Sequence["Instance"], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Compare completions: the longest prompt first, the completions of one prompt together."""
        by_length = sorted(range(len(requests)), key=lambda index: -len(requests[index].args[0]))
        prompts = [list(indices) for _, indices in groupby(by_length, key=lambda index: requests[index].args[0])]
        return self._answer(super().loglikelihood, requests, prompts, "comparing completions")

    def _answer(
        self,
        answer: Callable[..., list[Any]],
        requests: Sequence["Instance"],
        units: list[list[int]],
        description: str,
    ) -> list[Any]:
        """Answer requests in batches of so many units; a unit are the numbers of requests that stay together."""
        size = self.batch_size
        batches = [list(chain(*units[first : first + size])) for first in range(0, len(units), size)]

        def answer_batch(number: int) -> list[Any]:
            set_seed(self.seed + number)
            return answer([requests[index] for index in batches[number]], disable_tqdm=True)

        answers = share_out(answer_batch, len(batches), description)
        by_request = dict(zip(chain(*batches), chain(*answers), strict=True))
        return [by_request[index] for index in range(len(requests))]
