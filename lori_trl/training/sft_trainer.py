"""LoRI for supervised fine-tuning, with TRL's [`~trl.SFTTrainer`]."""

import copy
from collections.abc import Mapping
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from trl import SFTTrainer

from .config import LoriSFTConfig
from .tokenizer_checks import check_tokenizer
from .trainer import LoriTrainerMixin
from .training_rows import kept_positions, sft_rows


class LoriSFTTrainer(LoriTrainerMixin, SFTTrainer):
    """
    Supervised fine-tuning of LoRI adapters: [`LoriTrainerMixin`] on TRL's [`~trl.SFTTrainer`].

    ```python
    from datasets import load_dataset
    from lori_trl import LoriSFTConfig, LoriSFTTrainer
    from peft import LoraConfig

    trainer = LoriSFTTrainer(
        model="Qwen/Qwen3-0.6B",
        args=LoriSFTConfig(task_name="code", sparsity=0.9),
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "sft", "lori"]
    config_class = LoriSFTConfig

    @staticmethod
    def rows_as_trained(given: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out the columns of other formats, and give ShareGPT's messages their roles."""
        if given.get("formatting_func") is not None:
            return {}
        text_field, taken = given["args"].dataset_text_field, {}
        for name in ("train_dataset", "eval_dataset"):
            if isinstance(rows := given.get(name), dict):
                taken[name] = {key: sft_rows(each, text_field, key) for key, each in rows.items()}
            elif rows is not None:
                taken[name] = sft_rows(rows, text_field, name)
        return taken

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """Check rows and template; truncate as `truncation_mode="keep_prompt_end"` says; TRL knows the other modes."""
        if formatting_func is None:
            names = {"text_field": args.dataset_text_field, "chat_template": self.chat_template}
            check_tokenizer(dataset, processing_class, f"{dataset_name}_dataset", **names)
        if args.truncation_mode != "keep_prompt_end":
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        first = next(iter(dataset))
        ours = "prompt" in first and "input_ids" not in first and formatting_func is None and not packing
        trl_args = copy.copy(args)
        trl_args.truncation_mode = "keep_start"
        if ours:
            trl_args.max_length = None
        dataset = super()._prepare_dataset(dataset, processing_class, trl_args, packing, formatting_func, dataset_name)
        if not ours or args.max_length is None:
            return dataset
        kwargs = {"num_proc": args.dataset_num_proc, "desc": f"Truncating {dataset_name} dataset"}
        state = PartialState()
        with state.main_process_first(), state.local_main_process_first():  # a cache may be each node's own
            return dataset.map(
                _truncate_row,
                fn_kwargs={
                    "max_length": args.max_length,
                    "bos": self._tokenizer.bos_token_id,
                    "eos": self._tokenizer.eos_token_id,
                },
                **(kwargs if isinstance(dataset, Dataset) else {}),
            )


def _truncate_row(row: dict[str, Any], max_length: int, bos: int | None, eos: int | None) -> dict[str, list[int]]:
    """Truncate a tokenized prompt-completion row. Its completion is what TRL marked or gave labels."""
    in_completion = row.get("completion_mask") or [label != -100 for label in row["labels"]]
    prompt_length = in_completion.index(True) if any(in_completion) else len(in_completion)
    kept = kept_positions(row["input_ids"], prompt_length, max_length, bos, eos)
    return {column: [row[column][position] for position in kept] for column in ("input_ids", "labels")}
