"""What TRL's trainers do with the Hub, as LoRI does it: whole commits, no optimizer state, no run lost to a push."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from huggingface_hub import CommitInfo
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..adapter.push import MEMORY, logged, push_in_background, push_lori_to_hub
from ..hub.commit import make_repo

logger = get_logger(__name__)

if TYPE_CHECKING:  # what the mixin is mixed into
    from transformers import Trainer as AnyTrainer
else:
    AnyTrainer = object


def ready_repository(args: TrainingArguments, *, token: str | None = None, private: bool | None = None) -> str:
    """
    Make a run's repository, and look whether its token may write there: before a model is loaded.

    Args:
        args (`TrainingArguments`): the run's.
        token, private: by default the `hub_...` fields of the arguments.

    Returns:
        `str`: its full name. Where the Hub does not answer, the name as it is: every push tries again.

    Raises:
        `PermissionError`: there is no token, or one that may not write there.
        `ValueError`: the repository's name is none.
    """
    name = _asked_name(args)
    try:
        return make_repo(
            name,
            private=args.hub_private_repo if private is None else private,
            token=token or args.hub_token,
        )
    except RuntimeError as error:  # it may answer when the adapter is there
        logger.error(f"The repository for the adapter could not be made, training goes on: {error}")
        return name


def _asked_name(args: TrainingArguments) -> str:
    """Return the repository's name as the run asks for it: by default that of the output's folder."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


class HubPushes(AnyTrainer):
    """
    The Hub's part of a LoRI trainer.

    Attributes:
        card_facts ([`CardFacts`]): told the data set's name, for the card.
        repository (`str` or `None`): what [`ready_repository`] made before the model was loaded.
    """

    card_facts: Any
    repository: str | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository before training begins: see [`ready_repository`]."""
        self.push_in_progress = None
        self.hub_model_id = self.repository or _asked_name(self.args)
        if self.repository is None and self.is_world_process_zero():
            self.hub_model_id = ready_repository(self.args, token=token, private=private)

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        dataset_name: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo | None:
        """
        Push the adapter as [`push_lori_to_hub`] does. A failure is logged, for the run is worth more than its push.

        Args:
            commit_message, token, revision, private: as there; by default the `hub_...` fields of the arguments.
            blocking (`bool`, *optional*): has no effect; the push is done when the method returns.
            dataset_name (`str`, *optional*): the data set's name on the Hub, for the card.
            **kwargs: what TRL's card takes besides; not looked at.

        Returns:
            `CommitInfo` or `None`: the commit; `None` after a failure and on the other processes.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.card_facts.name_dataset(dataset_name)
        self._finish_current_push()
        with logged("The push failed; the adapter is saved, and `lori push` can push it later"):
            return push_lori_to_hub(
                self,
                self.hub_model_id or _asked_name(self.args),
                private=self.args.hub_private_repo if private is None else private,
                revision=revision or self.args.hub_revision,
                commit_message=commit_message,
                token=token or self.args.hub_token,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint's adapter in the background. No strategy pushes optimizer states."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not self.args.hub_always_push:
                return
            self._finish_current_push()  # one commit after the other
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        with logged("The push of a checkpoint failed, training goes on"):
            job = push_in_background(
                checkpoint_folder,
                Path(self.args.output_dir, MEMORY),
                self.hub_model_id,
                private=self.args.hub_private_repo,
                revision=self.args.hub_revision,
                commit_message=f"Training in progress, step {self.state.global_step}",
                token=self.args.hub_token,
            )
            self.push_in_progress = PushInProgress([job])
