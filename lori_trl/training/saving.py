"""What a Trainer saves and loads, as LoRI does it: adapters whole, with their masks and record, and no pickle."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..adapter.record import LoriRecord
from ..adapter.record_fields import Counts
from ..adapter.write import save_lori_adapter
from ..method.dense_parameters import dense_counts
from ..method.projections import freeze_projections
from ..method.sharding import adapter_state, full_shape
from ..method.sparse import fold_values, refresh_values, values_in_state_dict
from .card_facts import CardFacts
from .checkpoints import check_same_optimizer, deepspeed_checkpoints_as_data
from .run import LoriRun

if TYPE_CHECKING:  # what the mixin is mixed into
    from transformers import Trainer as AnyTrainer
else:
    AnyTrainer = object


class AdapterSaves(AnyTrainer):
    """
    The part of a LoRI trainer that saves and loads.

    Attributes:
        run ([`LoriRun`]): the run's state.
        card_facts ([`CardFacts`]): what the card says of the run.
        recipe (`dict` or `None`): saved beside the adapter as `recipe.yaml`.
    """

    args: Any
    optimizer: Any
    run: LoriRun
    card_facts: CardFacts
    recipe: dict[str, Any] | None

    @property
    def record(self) -> LoriRecord:
        """What is known of this run so far."""
        run, masks = self.run, self.run.masks
        lora_A = sum(full_shape(layer.lora_A[run.adapter_name].weight).numel() for layer in run.lora_layers.values())
        lora_B = sum(full_shape(weight).numel() for weight in run.weights.values())
        return LoriRecord.of_run(
            task=run.task,
            phase=run.phase,
            sparsity=self.args.sparsity if masks is None else masks.sparsity,
            granularity=self.args.mask_granularity if masks is None else masks.granularity,
            threshold=None if masks is None else masks.threshold,
            projection=run.projection,
            calibration=run.calibration,
            counts=Counts(
                lora_A + lora_B,
                lora_B,
                None if masks is None else masks.num_selected,
                dense_counts(self.model, run.adapter_name) or None,
            ),
            selected={task: masks.num_selected for task, masks in run.all_masks.items()},
            columns=run.columns,
            earlier=run.earlier_tasks,
            training=replace(self.card_facts.training, run=run.id),
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter. Where the model is sharded, that alone is gathered, and not the base model with it."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir, adapter_state(self.model, self.run.adapter_name, keep=self.args.should_save))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the adapter whole or not at all. The arguments are not pickled beside it: they may hold a token."""
        if self.args.should_save:
            save_lori_adapter(
                output_dir or self.args.output_dir,
                self.accelerator.unwrap_model(self.model),
                self.run.adapter_name,
                record=self.record,
                masks=self.run.all_masks,
                state_dict=state_dict,
                processing_class=self.processing_class,
                recipe=self.recipe,
                moments=self.run.moments,
            )

    def create_model_card(self, *args: Any, dataset_name: str | None = None, **kwargs: Any) -> None:
        """
        Write LoRI's card in place of TRL's, with the adapter, in `output_dir`. Its facts come from the run.

        TRL calls this before every checkpoint, too. Those bring their own card: nothing is saved twice then.
        """
        self.card_facts.name_dataset(dataset_name)
        if not self.is_in_train:
            self.save_model(_internal_call=True)

    @contextmanager
    def _engine_checkpoint(self) -> Iterator[None]:
        """Let an engine's own checkpoint, which holds what is trained, hold the packed values, and run no code."""
        with values_in_state_dict(self.model, self.run.adapter_name), ExitStack() as stack:
            if self.is_deepspeed_enabled:
                stack.enter_context(deepspeed_checkpoints_as_data())
            yield

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._engine_checkpoint():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            check_same_optimizer(Path(checkpoint), self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(*args, **kwargs)
        self._take_over_loaded_adapter()

    def _load_best_model(self) -> None:
        with self._engine_checkpoint():
            super()._load_best_model()
        self._take_over_loaded_adapter()

    def _take_over_loaded_adapter(self) -> None:
        freeze_projections(self.model, self.run.adapter_name)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # they load the values, and B without them
            fold_values(self.model, self.run.adapter_name)
        else:
            refresh_values(self.model, self.run.adapter_name)
