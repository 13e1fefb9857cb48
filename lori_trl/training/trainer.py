"""The method: calibrate all of B, select the entries that matter, set B back, adapt on those alone."""

import copy
import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PreTrainedModel, ProgressCallback, TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer

from ..adapter.masks import LoriMasks
from ..adapter.record import LoriRecord, read_record
from ..adapter.record_fields import Calibration, Counts, TaskRecord
from ..adapter.write import save_lori_adapter
from ..continual import feasible_entries, tasks_that_fit
from ..method.dense_parameters import dense_counts, dense_parameters, set_back, show_bias_of_tied_head
from ..method.layers import VALUES, lora_layers
from ..method.lora_options import check_variants, for_language_part
from ..method.projections import (
    CONTRASTIVE,
    Fingerprint,
    Projection,
    derive_projection_seed,
    freeze_projections,
    init_projections,
)
from ..method.saliency import GradientAgreement, random_saliency
from ..method.sharding import adapter_state, assign, change, engine_dtype, full_shape, gather, mask_shards
from ..method.sparse import fold_values, refresh_values, sparse_training, values_in_state_dict
from ..method.sparsity import num_to_select
from ..recipes.tasks import kept_positions
from .activations import init_from_activations, protected_names, take_over_projection
from .base_model import keep_4bit_layers
from .card_facts import CardFacts, hyperparameters
from .checkpoints import begin_run, deepspeed_checkpoints_as_data, find_checkpoint, note_run
from .checks import check_arguments, check_selection, check_trained
from .config import LoriArguments, LoriSFTConfig
from .hub_pushes import HubPushes
from .parallel_engines import check_engine
from .trackers import Trackers
from .training_rows import have_images, name_of_data

logger = get_logger(__name__)

# What TRL's trainers keep beside the Trainer's own state: counters, figures not yet logged, generated rollouts. Each
# phase begins with its own.
_STATE_OF_A_PHASE = {
    "_buffered_inputs",
    "_last_loaded_step",
    "_logs",
    "_metrics",
    "_pending_extra_logs",
    "_pending_metrics",
    "_step",
    "_total_train_tokens",
}


class LoriTrainerMixin(HubPushes):
    """
    Train LoRI adapters with any TRL trainer: `class LoriDPOTrainer(LoriTrainerMixin, DPOTrainer)`.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            The base model, or one with an adapter to continue: its A is kept, its B is where training starts, and
            every entry outside the new mask stays as it is. A task that the adapter has already keeps its masks.
        *positional (`Any`):
            The TRL trainer's own arguments, in its own order.
        **named (`Any`):
            The same by name. Of these, `args` is a [`LoriArguments`], e.g. [`LoriSFTConfig`], and `peft_config` a
            `LoraConfig`: the adapter to make on a base model. With image rows and no `target_modules`, it goes on the
            linear layers of the language part.

    Attributes:
        masks ([`LoriMasks`] or `None`): which entries of B are trained; `None` before calibration.
        phase (`str`): `"calibration"` or `"adaptation"`.
        recipe (`dict` or `None`): saved beside the adapter as `recipe.yaml`; set by the command line.

    Raises:
        `ValueError`: the adapter is no plain LoRA, nothing of it can be trained, something would be trained and not
            saved, the rows are no text, no entry would be selected, or given masks do not fit.
        `TypeError`: `args` has no LoRI fields.

    Source: paper section 2.1 and Algorithm 1.
    """

    args: LoriArguments
    model_wrapped: Any
    optimizer: Any
    optimizer_cls_and_kwargs: Any
    train_dataset: Any
    config_class: type[LoriArguments] | None = None  # of the arguments, where none are passed

    def __init__(self, model: str | PreTrainedModel | PeftModel, *positional: Any, **named: Any):
        given = inspect.signature(super().__init__).bind(model, *positional, **named).arguments
        if given.get("args") is None and self.config_class is not None:
            given["args"] = self.config_class()
        check_arguments(given)
        args, rows, peft_config = given["args"], given["train_dataset"], given.get("peft_config")
        if peft_config is not None and have_images(rows):
            given["peft_config"] = for_language_part(peft_config)
        self.task_name = args.task_name or name_of_data(rows)
        given_masks = None
        if args.mask_name_or_path:
            given_masks = LoriMasks.from_pretrained(args.mask_name_or_path, revision=args.mask_revision)

        super().__init__(**given)

        self.trackers = Trackers(self, given.get("callbacks") or ())
        self.run_name = args.run_name
        self.phase = "adaptation"
        self.recipe: dict[str, Any] | None = None
        self.run: str | None = None
        self.calibration: Calibration | None = None
        self.calibration_log: list[dict[str, Any]] = []
        self.adapter_name = self.model.active_adapters[0]
        self.lora_layers = lora_layers(self.model, self.adapter_name)
        check_variants(self.lora_layers, self.adapter_name)
        keep_4bit_layers(self.model)
        show_bias_of_tied_head(self.model)
        self.earlier_masks: dict[str, LoriMasks] = dict(vars(self.model).get("lori_masks", {}))
        self.earlier_tasks = [TaskRecord.from_dict(task) for task in vars(self.model).get("lori_tasks", [])]
        self.projection = self._keep_projection() if peft_config is None else self._init_projection(given_masks, given)
        check_trained(self.model, self.adapter_name, self.weights, self.args)
        self.initial_weights = {path: weight.detach().to("cpu", copy=True) for path, weight in self.weights.items()}
        self._fresh_state = {name: copy.deepcopy(vars(self)[name]) for name in _STATE_OF_A_PHASE & vars(self).keys()}

        self.masks: LoriMasks | None = self.earlier_masks.pop(self.task_name, None)
        self.earlier_tasks = [record for record in self.earlier_tasks if record.task in self.earlier_masks]
        self.feasible = self._feasible_entries() if self.args.disjoint_masks else None
        if given_masks is not None:
            self.masks = self._adopt(given_masks)
        elif self.masks is not None:
            logger.info(f"The adapter has task {self.task_name!r} already: it goes on with its own masks.")
        elif self.args.sparsity == 0:
            everything = {path: torch.ones(weight.shape, dtype=torch.bool) for path, weight in self.weights.items()}
            self.masks = LoriMasks(everything, task=self.task_name, sparsity=0.0, projection=self.projection)
        elif self.args.calibration_method == "random":
            self.masks = self._draw_masks()
        check_selection(self.masks, self.weights, self.args.sparsity, self.args.mask_granularity)
        self.card_facts = CardFacts(self.model.get_base_model(), rows, self._tag_names)
        self.add_callback(self.card_facts)
        self.callback_handler.callbacks.insert(0, _PhaseCallback(self))

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """B: module path -> lora_B's weight `(out_features, rank)`."""
        return {path: layer.lora_B[self.adapter_name].weight for path, layer in self.lora_layers.items()}

    # ---- the phases --------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """
        Train the adapter: calibrate unless there is a mask already, then adapt on the mask.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint of either phase, or `True` for the last complete one in `output_dir`. A finished
                calibration is never run again.
            **kwargs:
                Other arguments of the trainer's `train`.

        Returns:
            `TrainOutput`: of the adaptation; the calibration's metrics are in it with the prefix `calibration_`.

        Raises:
            `ValueError`: the calibration moved nothing, or the checkpoint belongs to another run.
            `RuntimeError`: the optimizer moved frozen entries.
        """
        phase, checkpoint = self._resume_phase(resume_from_checkpoint)
        self._begin_run()
        check_engine(
            self.accelerator,
            self.model,
            self.args,
            calibrate=self.masks is None,
            initial_weights=self.initial_weights,
        )
        metrics = self.calibrate(checkpoint if phase == "calibration" else None) if self.masks is None else {}
        if self.calibration is not None and self.calibration.method != "random":
            self._name_tracked_run(self.args)
        set_seed(self.args.seed)  # the adaptation is the same with and without a calibration before it
        with self._sparse_training(self.masks):
            output = super().train(checkpoint if phase == "adaptation" else None, **kwargs)
        self._check_frozen_entries()
        output.metrics.update(metrics)
        self._leave_record()
        return output

    def calibrate(self, resume_from_checkpoint: str | None = None) -> dict[str, float]:
        """
        Train all of B, select the mask by |B - B0|, and set B back to B0. With `calibration_method="gradient"` B stays
        B0, and what is selected is where the gradients of the batches agree in sign. With `disjoint_masks`, only what
        no earlier task has is trained and selected from.

        Args:
            resume_from_checkpoint (`str`, *optional*): a checkpoint of the calibration.

        Returns:
            `dict[str, float]`: the calibration's metrics, prefixed with `calibration_`.

        Source: Algorithm 1, lines 6 to 15; LoRAF, Algorithm 1, lines 3 to 8. B0 is zero for a fresh adapter, and the
        saliency then the paper's |B|.
        """
        if self.masks is not None:
            raise ValueError(
                f"`calibrate()` was called, but task {self.task_name!r} has its mask already. A task is calibrated "
                "once. Go on with `train()`, or make a new trainer."
            )
        self._begin_run()
        set_seed(self.args.seed)
        with self._calibration():
            with self._sparse_training(self.feasible):
                output = super().train(resume_from_checkpoint)
                saliency = self._saliency()
            self.calibration = Calibration(
                method=self.args.calibration_method,
                learning_rate=self.args.learning_rate if self.args.calibration_method == "train" else None,
                steps=output.global_step,
                samples=self._samples_seen(output.global_step),
                loss=output.training_loss,
            )
            self.calibration_log = self.state.log_history
        if not any(values.any() for values in saliency.values()):
            raise ValueError(
                f"The calibration moved nothing in {self.calibration.steps} steps at `calibration_learning_rate="
                f"{self.args.calibration_learning_rate}`, `calibration_method={self.args.calibration_method!r}`. A "
                "mask is selected by how far B moved, or by its gradients. Raise the rate or the number of steps, and "
                "check that the rows have completions to learn from."
            )

        self.masks = self._select(saliency, self.args.sparsity, self.task_name)
        folder = self.args.for_calibration().output_dir
        self.save_model(folder, _internal_call=True)
        if self.args.should_save:
            self.state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))
        for sparsity in self.args.calibration_sparsities or ():
            more = self._select(saliency, sparsity, f"{self.task_name}-{sparsity}")
            if self.args.should_save:
                more.save_pretrained(folder)
        return output.metrics  # named calibration_... by _PhaseCallback when they were logged

    def _samples_seen(self, steps: int) -> int | None:
        """Count the rows that the steps have seen, each once; None for a stream."""
        if not isinstance(self.train_dataset, Dataset):
            return None
        return min(len(self.train_dataset), steps * self.get_total_train_batch_size(self.args))

    def _saliency(self) -> dict[str, Tensor]:
        """Return what the calibration that has just ended says of B's entries."""
        if self.args.calibration_method == "gradient":
            optimizer = self.optimizer.optimizer  # accelerate's wrapper holds it
            return {path: optimizer.saliency(weight) for path, weight in self.weights.items()}
        return {path: change(weight, self.initial_weights[path]) for path, weight in self.weights.items()}

    def _draw_masks(self) -> LoriMasks:
        """Draw masks at random, from the run's seed and the task's name: no calibration, and no file is needed."""
        seed = derive_projection_seed(self.args.seed, self.task_name)
        self.calibration = Calibration(method="random", seed=seed)
        saliency = {path: random_saliency(path, weight.shape, seed=seed) for path, weight in self.weights.items()}
        return self._select(saliency, self.args.sparsity, self.task_name)

    def _select(self, saliency: dict[str, Tensor], sparsity: float, task: str) -> LoriMasks:
        taken = None if self.feasible is None else ~self.feasible
        granularity = self.args.mask_granularity
        return LoriMasks.select(saliency, sparsity, granularity, taken, task=task, projection=self.projection)

    @contextmanager
    def _sparse_training(self, masks: LoriMasks | None) -> Iterator[None]:
        """Restrict training to a mask, with an optimizer and a wrapping of the model that know the new parameters."""
        self.optimizer = self.lr_scheduler = None
        if self.is_deepspeed_enabled and self.model_wrapped is not self.model:
            self.model_wrapped.destroy()  # an engine is made for one optimizer; what ZeRO-3 has sharded stays sharded
        self.model_wrapped, self.trained_masks = self.model, masks
        self.__dict__.update(copy.deepcopy(self._fresh_state))
        with sparse_training(self.model, self.adapter_name, masks, self.args.sparse_backend), ExitStack() as stack:
            self.phase_end = stack
            yield

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, DataLoader]:
        """Mask the gradients of the shards, too, once FSDP2 has made them. It does so in a run's first phase."""
        with self._engine_checkpoint():
            prepared = super()._prepare_for_training(*args, **kwargs)
        for hook in mask_shards(self.weights, self.trained_masks):
            self.phase_end.callback(hook.remove)
        fold_values(self.model, self.adapter_name)  # DeepSpeed may have loaded a checkpoint
        return prepared

    @contextmanager
    def _calibration(self):
        """Swap in the calibration's arguments and rows. At the end, also after an error, all is as it was before."""
        args, rows, optimizer = self.args, self.train_dataset, self.optimizer_cls_and_kwargs
        callbacks = self.callback_handler.callbacks
        self.phase, self.args = "calibration", args.for_calibration()
        if args.calibration_method == "gradient":
            self.optimizer_cls_and_kwargs = (GradientAgreement, {})
        if args.calibration_fraction < 1:
            count = max(1, int(args.calibration_fraction * len(rows)))
            self.train_dataset = rows.shuffle(seed=args.seed).select(range(count))
        try:
            with set_back(self.model, self.adapter_name), self.trackers.apart(args) as trackers:
                self._name_tracked_run(args)
                self.callback_handler.callbacks = [
                    trackers.get(each, each) for each in callbacks if not isinstance(each, EarlyStoppingCallback)
                ]
                yield
        finally:
            self._reset_weights()
            self.phase, self.args, self.train_dataset = "adaptation", args, rows
            self.optimizer_cls_and_kwargs = optimizer
            self.callback_handler.callbacks = callbacks

    def _name_tracked_run(self, args: LoriArguments) -> None:
        """Name the run that TensorBoard, MLflow and others begin in this phase after it."""
        name = f"{self.run_name or f'{self.task_name}-{str(self.run)[:8]}'}-{self.phase}"
        self.trackers.name_run(self.args, os.path.join(args.output_dir, "runs"), name)

    def _leave_record(self) -> None:
        """Tell the model which tasks it has, so that the next trainer on it knows them."""
        self.model.lori_masks = self._all_masks()
        self.model.lori_tasks = [task.to_dict() for task in self.record.history]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Exempt B from weight decay: it would pull the entries outside the mask towards zero."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if ".lora_B." not in name and f".{VALUES}." not in name]

    def _reset_weights(self) -> None:
        for path, weight in self.weights.items():
            assign(weight, self.initial_weights[path])

    def _check_frozen_entries(self) -> None:
        """Raise if an entry outside the mask, or A, is not what it was: the method's promise, checked on every run."""
        moved = [
            path
            for path, weight in self.weights.items()
            if gather(change(weight, self.initial_weights[path])).cpu()[~self.masks[path]].any()  # type: ignore[index]
        ]
        if moved or self._fingerprint() != self.projection.fingerprint:
            raise RuntimeError(
                f"`optim={self.args.optim.value}` moved frozen entries of {', '.join(moved[:3]) or 'A'}. LoRI needs "
                "an optimizer that leaves entries without a gradient alone. Use e.g. `optim='adamw_torch'`."
            )

    # ---- the adapter -------------------------------------------------------------------------------------------

    def _init_projection(self, masks: LoriMasks | None, given: Mapping[str, Any]) -> Projection:
        """Make A anew for a fresh adapter: the one that given masks were calibrated on, or the task's own."""
        if self.args.projection_init == CONTRASTIVE:
            return self._init_from_activations(given)
        known = (masks.projection if masks is not None else None) or Projection(None, None, "")
        if known.init == CONTRASTIVE:
            raise ValueError(
                f"`projection_init={self.args.projection_init!r}`, but the given masks were calibrated on a "
                "contrastive A, which no seed draws. Allowed is 'contrastive' with the same rows. Pass that and the "
                "`protect` of the run that the masks come from."
            )
        init = known.init or self.args.projection_init
        seed = known.seed if self.args.projection_seed is None else self.args.projection_seed
        if seed is None:
            seed = derive_projection_seed(self.args.seed, self.task_name)
        init_projections(self.model, self.adapter_name, seed=seed, init=init)
        return Projection(init, seed, self._fingerprint())

    def _init_from_activations(self, given: Mapping[str, Any]) -> Projection:
        init_from_activations(
            self.model,
            self.adapter_name,
            given["train_dataset"],
            self.args,
            accelerator=self.accelerator,
            processing_class=self.processing_class,
            formatting_func=given.get("formatting_func"),
        )
        return Projection(CONTRASTIVE, None, self._fingerprint(), protected_names(self.args))

    def _keep_projection(self) -> Projection:
        """Keep the A of an adapter that is continued; where it came from is known if `lori_trl` loaded it."""
        freeze_projections(self.model, self.adapter_name)
        if not self.earlier_masks and any(weight.any() for weight in self.weights.values()):
            logger.warning(
                "The adapter is trained and has no task on record: which entries of B belong to what is not known. If "
                "it is a LoRI adapter, load it with `load_lori_adapter`, which brings its masks and history."
            )
        found = self._fingerprint()
        for masks in self.earlier_masks.values():
            if masks.projection is not None and masks.projection.fingerprint == found:
                return masks.projection
        return Projection(None, None, found)

    def _fingerprint(self) -> str:
        """Fingerprint A as the engine holds it."""
        dtype, taken = engine_dtype(self.accelerator), Fingerprint()
        for path, layer in self.lora_layers.items():
            taken.add(path, gather(layer.lora_A[self.adapter_name].weight).to(dtype))
        return str(taken)

    def _feasible_entries(self) -> LoriMasks | None:
        """Return the entries that no earlier task has; None where all are free. Raise if this task does not fit."""
        feasible = feasible_entries({path: weight.shape for path, weight in self.weights.items()}, self.earlier_masks)
        owned = ~feasible if self.masks is None else self.masks | ~feasible
        if any((weight != 0)[~owned[path]].any() for path, weight in self.initial_weights.items()):
            raise ValueError(
                "`disjoint_masks=True`, but this adapter has trained entries of B that belong to no task on record. "
                "Every task's entries must be known. Load the adapter with `load_lori_adapter`, which brings its "
                "masks, or leave `disjoint_masks` unset."
            )
        sparsity, granularity = self.args.sparsity, self.args.mask_granularity
        if self.masks is None and not tasks_that_fit(feasible, sparsity, granularity):
            raise ValueError(
                f"`sparsity={sparsity}`, `mask_granularity={granularity!r}`, `disjoint_masks=True`: the task needs "
                f"{num_to_select(sparsity, feasible.numel):,} of {feasible.numel:,} entries of B, and "
                f"{', '.join(self.earlier_masks)} left {feasible.num_selected:,} free. Over the whole model, a "
                f"sparsity from {1 - feasible.density:.6f} on fits. Raise `sparsity`, begin another adapter, or leave "
                "`disjoint_masks` unset."
            )
        return feasible if self.earlier_masks else None

    def _adopt(self, masks: LoriMasks) -> LoriMasks:
        """Take masks from a file as this task's."""
        masks.check_shapes({path: weight.shape for path, weight in self.weights.items()})
        if self.masks is not None and masks != self.masks:
            raise ValueError(
                f"`task_name={self.task_name!r}`: the adapter has this task with other masks than those given. A task "
                "has one set of masks. Leave `mask_name_or_path` unset to go on with it, or give the task a new name."
            )
        if self.feasible is not None and (masks - self.feasible).num_selected:
            raise ValueError(
                f"`disjoint_masks=True`, but {(masks - self.feasible).num_selected:,} entries of the given masks "
                f"belong to {', '.join(self.earlier_masks)}. Disjoint masks share none. Leave `mask_name_or_path` "
                "unset to calibrate on what is free, or leave `disjoint_masks` unset."
            )
        own, given = self.projection, masks.projection
        if given is None or given.fingerprint != own.fingerprint and not own.same_draw(given):
            logger.warning(
                "The masks were not calibrated on this adapter's A, so their entries stand for other random "
                "directions. To calibrate on this adapter, leave `mask_name_or_path` unset; for a fresh adapter, "
                "leave `projection_seed` unset, which takes the masks' own A."
            )
        return LoriMasks(
            masks,
            task=self.task_name,
            sparsity=masks.sparsity,
            granularity=masks.granularity,
            threshold=masks.threshold,
            projection=masks.projection,
        )

    @property
    def record(self) -> LoriRecord:
        """What is known of this run so far."""
        lora_A = sum(full_shape(layer.lora_A[self.adapter_name].weight).numel() for layer in self.lora_layers.values())
        lora_B = sum(full_shape(weight).numel() for weight in self.weights.values())
        masks = self.masks
        return LoriRecord.of_run(
            task=self.task_name,
            phase=self.phase,
            sparsity=self.args.sparsity if masks is None else masks.sparsity,
            granularity=self.args.mask_granularity if masks is None else masks.granularity,
            threshold=None if masks is None else masks.threshold,
            projection=self.projection,
            calibration=self.calibration,
            counts=Counts(
                lora_A + lora_B,
                lora_B,
                None if masks is None else masks.num_selected,
                dense_counts(self.model, self.adapter_name) or None,
            ),
            selected={task: masks.num_selected for task, masks in self._all_masks().items()},
            earlier=self.earlier_tasks,
            training=replace(self.card_facts.training, run=self.run),
        )

    def _all_masks(self) -> dict[str, LoriMasks]:
        own = {} if self.masks is None else {self.task_name: self.masks}
        return {**self.earlier_masks, **own}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter. Where the model is sharded, that alone is gathered, and not the base model with it."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir, adapter_state(self.model, self.adapter_name, keep=self.args.should_save))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the adapter whole or not at all. The arguments are not pickled beside it: they may hold a token."""
        if self.args.should_save:
            save_lori_adapter(
                output_dir or self.args.output_dir,
                self.accelerator.unwrap_model(self.model),
                self.adapter_name,
                record=self.record,
                masks=self._all_masks(),
                state_dict=state_dict,
                processing_class=self.processing_class,
                recipe=self.recipe,
            )

    def create_model_card(self, *args: Any, dataset_name: str | None = None, **kwargs: Any) -> None:
        """
        Write LoRI's card in place of TRL's, with the adapter, in `output_dir`. Its facts come from the run.

        TRL calls this before every checkpoint, too. Those bring their own card: nothing is saved twice then.
        """
        self.card_facts.name_dataset(dataset_name)
        if not self.is_in_train:
            self.save_model(_internal_call=True)

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def _resume_phase(self, resume_from_checkpoint: str | bool | None) -> tuple[str | None, str | None]:
        """Find where to resume: (phase, checkpoint). Takes over the masks of a calibration that is done."""
        if not resume_from_checkpoint:
            return None, None
        calibration_dir = Path(self.args.for_calibration().output_dir)
        if resume_from_checkpoint is True:
            folder = find_checkpoint(Path(self.args.output_dir), calibration_dir, self.task_name)
        else:
            folder = Path(resume_from_checkpoint)
        record = self._check_same_run(folder)
        self.run = record.training.run if record.training is not None else None
        if record.phase == "adaptation":
            self._resume_masks(folder, record)
        if folder != calibration_dir:
            return record.phase, str(folder)
        if (state := folder / TRAINER_STATE_NAME).is_file():
            self.calibration_log = TrainerState.load_from_json(str(state)).log_history
        if dense_parameters(self.model, self.adapter_name):
            self._load_from_checkpoint(str(folder))  # as they were when the calibration began
        return None, None

    def _begin_run(self) -> None:
        """Give a run that begins an identity, and note in its folder which run goes on there."""
        if not self.args.should_save:
            return
        output_dir = Path(self.args.output_dir)
        if self.run is None:
            self.run = begin_run(output_dir, Path(self.args.for_calibration().output_dir))
        else:
            note_run(output_dir, self.run)

    def _check_same_run(self, folder: Path) -> LoriRecord:
        """Return a checkpoint's record; raise if it is not of a run like this one."""
        earlier = read_record(folder)
        own = replace(self.projection, fingerprint=earlier.projection.fingerprint)
        if own.init == CONTRASTIVE and own == earlier.projection:
            take_over_projection(self.model, self.adapter_name, folder)
            self.projection = earlier.projection
        values = hyperparameters(self.args)
        training = replace(self.card_facts.training, hyperparameters=values, world_size=self.args.world_size)
        replace(self.record, training=training).check_same_run(earlier, folder)
        return earlier

    def _resume_masks(self, folder: Path, record: LoriRecord) -> None:
        self.calibration = record.calibration
        self.masks = self._adopt(LoriMasks.from_pretrained(folder, task=self.task_name))

    @contextmanager
    def _engine_checkpoint(self) -> Iterator[None]:
        """Let an engine's own checkpoint, which holds what is trained, hold the packed values, and run no code."""
        with values_in_state_dict(self.model, self.adapter_name), ExitStack() as stack:
            if self.is_deepspeed_enabled:
                stack.enter_context(deepspeed_checkpoints_as_data())
            yield

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._engine_checkpoint():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(*args, **kwargs)
        self._take_over_loaded_adapter()

    def _load_best_model(self) -> None:
        with self._engine_checkpoint():
            super()._load_best_model()
        self._take_over_loaded_adapter()

    def _take_over_loaded_adapter(self) -> None:
        freeze_projections(self.model, self.adapter_name)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # they load the values, and B without them
            fold_values(self.model, self.adapter_name)
        else:
            refresh_values(self.model, self.adapter_name)


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

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """Truncate as `truncation_mode="keep_prompt_end"` says; TRL knows the other modes."""
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


class _PhaseCallback(TrainerCallback):
    """
    Keep B current, name the phase on the progress bar, and log the calibration's figures under names of its own.

    It comes first in line, so that the other callbacks see all of it.
    """

    def __init__(self, trainer: LoriTrainerMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.phase == "adaptation" and not any("calibration_loss" in entry for entry in state.log_history):
            state.log_history[:0] = self.trainer.calibration_log

    def on_optimizer_step(self, args, state, control, **kwargs):
        fold_values(self.trainer.model, self.trainer.adapter_name)

    def on_epoch_begin(self, args, state, control, **kwargs):
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.set_description(self.trainer.phase)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.trainer.phase == "calibration":
            for figures in (logs, state.log_history[-1]):
                for name in figures.keys() - {"step"}:
                    figures[f"calibration_{name}"] = figures.pop(name)


def _truncate_row(row: dict[str, Any], max_length: int, bos: int | None, eos: int | None) -> dict[str, list[int]]:
    """Truncate a tokenized prompt-completion row. Its completion is what TRL marked or gave labels."""
    in_completion = row.get("completion_mask") or [label != -100 for label in row["labels"]]
    prompt_length = in_completion.index(True) if any(in_completion) else len(in_completion)
    kept = kept_positions(row["input_ids"], prompt_length, max_length, bos, eos)
    return {column: [row[column][position] for position in kept] for column in ("input_ids", "labels")}
