"""The verbs that train: `lori sft`, and one for each of TRL's other trainers that has its pair here."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it takes seconds to import
    from ..recipes.row_formats import RowKind


@dataclass(frozen=True)
class TrainingVerb:
    """What one of them has of its own. All else they share: [`~lori_trl.cli.sft`]."""

    name: str  # the word after `lori`, and a recipe's `trainer`
    pair: str  # what its trainer and configuration are called, between Lori and Trainer or Config
    purpose: str  # what it does, for `--help`
    example: str  # a call
    rows: str | None = None  # the kind of its rows, of `ROW_KINDS`; `None` for supervised training's
    task_type: str = "CAUSAL_LM"  # PEFT's name for what the adapter's model does
    generates: bool = False  # whether it generates answers, and needs rewards for them

    @property
    def program(self) -> str:
        """What it is called on the command line."""
        return "lori-sft" if self.name == "sft" else f"lori {self.name}"

    @property
    def row_kind(self) -> "RowKind | None":
        """The kind of its rows."""
        from ..recipes.row_formats import ROW_KINDS

        return None if self.rows is None else ROW_KINDS[self.rows]

    @property
    def trainer_class(self) -> Any:
        """Its trainer."""
        from ..training import sft_trainer, trainers

        return getattr(sft_trainer if self.name == "sft" else trainers, f"Lori{self.pair}Trainer")

    @property
    def config_class(self) -> Any:
        """The configuration of its runs."""
        from ..training.config import LoriSFTConfig

        return LoriSFTConfig if self.name == "sft" else self.trainer_class.config_class

    @property
    def script_class(self) -> Any:
        """Its arguments beside the run's and the model's."""
        from ..recipes.data import LoriRolloutArguments, LoriScriptArguments

        return LoriRolloutArguments if self.generates else LoriScriptArguments

    def text_field(self, args: Any) -> str:
        """Return the column of plain text that supervised training takes."""
        return vars(args).get("dataset_text_field", "text")


SFT = TrainingVerb(
    "sft",
    "SFT",
    "Train a LoRI adapter: calibrate, select the mask, adapt.",
    "lori-sft --recipe code_lori_s.yaml --output_dir code-lori-s --per_device_train_batch_size 8\n"
    "  lori-sft --recipe code_lori_s.yaml --accelerate_config ddp --num_processes 8 --per_device_train_batch_size 4 "
    "\\\n"
    "      --gradient_accumulation_steps 1 --output_dir code-lori-s     # 8 x 4 rows a step: the paper's 32\n"
    "  lori-sft --sequence safety.yaml then_code.yaml --output_dir safety-then-code     # task after task;\n"
    "      # what is forgotten is measured on each recipe's test rows, or on --held_out NAME=PATH ...",
)
_ON_AN_ADAPTER = "--model_name_or_path BASE --adapter_name_or_path code-lori-s --task_name {0} --output_dir {0}-lori-s"
_REWARDED = f"--reward_funcs my_rewards.is_short {_ON_AN_ADAPTER.format('short')}"
VERBS = {
    verb.name: verb
    for verb in (
        SFT,
        TrainingVerb(
            "dpo",
            "DPO",
            "Train a LoRI adapter to prefer some answers to others: direct preference optimization.",
            f"lori dpo --dataset_path preferences.jsonl {_ON_AN_ADAPTER.format('preferences')}",
            "preference",
        ),
        TrainingVerb(
            "kto",
            "KTO",
            "Train a LoRI adapter on answers that are marked as good or bad: Kahneman-Tversky optimization.",
            f"lori kto --dataset_path ratings.jsonl {_ON_AN_ADAPTER.format('ratings')}",
            "unpaired preference",
        ),
        TrainingVerb(
            "grpo",
            "GRPO",
            "Train a LoRI adapter by the rewards of its own answers: group relative policy optimization.",
            f"lori grpo --dataset_path prompts.jsonl {_REWARDED}",
            "prompt-only",
            generates=True,
        ),
        TrainingVerb(
            "rloo",
            "RLOO",
            "Train a LoRI adapter by the rewards of its own answers: REINFORCE leave-one-out.",
            f"lori rloo --dataset_path prompts.jsonl {_REWARDED}",
            "prompt-only",
            generates=True,
        ),
        TrainingVerb(
            "reward",
            "Reward",
            "Train a reward model, a LoRI adapter and a head, on answers that are preferred to others.",
            "lori reward --dataset_path preferences.jsonl --model_name_or_path BASE --output_dir reward-lori-s",
            "preference with a margin",
            task_type="SEQ_CLS",
        ),
    )
}
