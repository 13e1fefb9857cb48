"""Rows as a model will see them: what the trainer itself makes of them, and which of their tokens bear loss."""

import copy
import tempfile
from dataclasses import dataclass
from itertools import groupby, islice

from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig

from .config import LoriSFTConfig
from .sft_trainer import LoriSFTTrainer

_NOT_THE_DATA = {"activation_offloading", "learning_rate", "model_init_kwargs"}


@dataclass(frozen=True)
class PreparedRow:
    """A row after chat template, tokenization, truncation and packing."""

    pieces: list[tuple[str, bool]]  # its text in order, and whether the tokens of a piece bear loss
    num_tokens: int  # tokens
    num_with_loss: int  # tokens that bear loss. The first one never does: nothing predicts it


def preview_rows(
    rows: Dataset | IterableDataset, args: LoriSFTConfig, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[PreparedRow]:
    """
    Prepare the first rows as [`LoriSFTTrainer`] does, without the base model.

    Args:
        rows (`Dataset` or `IterableDataset`): the training data.
        args ([`LoriSFTConfig`]): of the run.
        tokenizer (`PreTrainedTokenizerBase`): the base model's.
        count (`int`): how many rows; with `packing`, how many packed ones.

    Returns:
        `list[PreparedRow]`: at most `count`.
    """
    if not args.packing:
        rows = rows.take(count)
    data_fields = SFTConfig.__annotations__.keys() - _NOT_THE_DATA
    with tempfile.TemporaryDirectory() as folder:
        config = LoriSFTConfig(
            folder,
            task_name="preview",
            sparsity=0.0,
            seed=args.seed,
            report_to="none",
            **{name: copy.copy(getattr(args, name)) for name in data_fields},
        )
        trainer = LoriSFTTrainer(
            _stand_in(tokenizer),
            config,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=1, target_modules=["q_proj"]),
        )
        batches = [trainer.data_collator([row]) for row in islice(trainer.train_dataset, count)]
    return [_prepared(tokenizer, batch["input_ids"][0].tolist(), batch["labels"][0].tolist()) for batch in batches]


def _stand_in(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Make a model of next to no size. A trainer must have one; of it, the data see the vocabulary alone."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))


def _prepared(tokenizer: PreTrainedTokenizerBase, input_ids: list[int], labels: list[int]) -> PreparedRow:
    with_loss = [False, *(label != -100 for label in labels[1:])]
    groups = groupby(zip(input_ids, with_loss, strict=True), key=lambda token: token[1])
    pieces = [(tokenizer.decode([token for token, _ in group]), bears_loss) for bears_loss, group in groups]
    return PreparedRow(pieces, len(input_ids), sum(with_loss))
