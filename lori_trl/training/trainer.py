"""Algorithm 1: draw A, calibrate all of B, select the mask, set B back, adapt on the mask."""

import copy
import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from ..adapter.masks import LoriMasks
from ..adapter.memory import remember
from ..adapter.record_fields import Calibration
from ..method.dense_parameters import dense_parameters, set_back
from ..method.growth import columns_of, widened
from ..method.layers import VALUES
from ..method.lora_options import for_language_part
from ..method.projections import Projection, derive_projection_seed
from ..method.saliency import GradientAgreement, random_saliency
from ..method.sharding import assign, change, engine_dtype, mask_shards, to_cpu
from ..method.sparse import fold_values, sparse_training
from .activations import Activations, take_over_projection
from .callbacks import PhaseCallback, calibration_callbacks, calibration_figures, counters_set_back, swapped
from .card_facts import CardFacts
from .checkpoints import Found, begin_run, check_same_run, find_run, logged_before, note_run
from .checks import check_arguments, check_selected, check_selection, check_task, check_trained, is_fresh
from .config import LoriArguments
from .counting import share_of_rows
from .growth import grow_adapter
from .hub_pushes import HubPushes, ready_repository
from .initial_A import keep_A, make_A
from .optimizers import (
    check_all_is_optimized,
    check_frozen_entries,
    check_something_moved,
    phase_optimizer,
)
from .parallel_engines import Engine, check_engine
from .run import begin_with_adapter
from .run_settings import what_is_given
from .saving import AdapterSaves
from .seen import rows_seen, steps_seen
from .sparse_backend import settled_backend
from .trackers import Trackers
from .trained_values import trained_values, undo_cast
from .training_rows import have_images, name_of_data

logger = get_logger(__name__)


class LoriTrainerMixin(AdapterSaves, HubPushes):
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
        run ([`LoriRun`]): the run's state: the adapter's A, B0, masks and tasks, and how far the run is.
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
        given |= self.rows_as_trained(given)
        # What the caller passed in is copied: TRL, PEFT and the phases change arguments and configs in place.
        args = given["args"] = copy.copy(given["args"])
        for name, value in vars(args).items():
            setattr(args, name, copy.copy(value) if isinstance(value, (dict, list)) else value)
        rows, peft_config = given["train_dataset"], copy.deepcopy(given.get("peft_config"))
        if peft_config is not None:
            given["peft_config"] = for_language_part(peft_config) if have_images(rows) else peft_config
        task = args.task_name or name_of_data(rows)
        check_task(task, args, model)
        fresh = peft_config is not None or is_fresh(given["model"])
        given_masks = None
        if args.mask_name_or_path:
            given_masks = LoriMasks.from_pretrained(args.mask_name_or_path, revision=args.mask_revision)

        if args.push_to_hub and args.process_index == 0:
            self.repository = ready_repository(args)
        before = trained_values(model) if isinstance(model, PeftModel) else None

        super().__init__(**given)

        undo_cast(self.model, self.model.active_adapters[0], before, to_float32=not self.is_deepspeed_enabled)
        self.run = begin_with_adapter(self.model, task, trainer_attributes=frozenset(vars(self)))
        self.recipe = None
        # Algorithm 1, lines 1 to 5: A is drawn once, for both phases, and B is zero; a continued adapter keeps both.
        # So it does where it is grown, and gets new rows and columns beside its own.
        engine = {"accelerator": self.accelerator, "processing_class": self.processing_class}
        if args.grow is not None:
            self.run = grow_adapter(self.model, self.run, args, **engine, given=given)
        elif fresh:
            self.run.projection = make_A(self.model, self.run, args, given_masks, **engine, given=given)
        else:
            self.run.projection = keep_A(self.model, self.run, self.accelerator)
        if args.save_moments:
            self.run.moments = Activations(self.model, self.run.adapter_name, given, args, **engine).moments()
        check_trained(self.model, self.run.adapter_name, self.run.weights, args)
        if args.disjoint_masks and args.grow is None:  # new columns are disjoint from all that was there
            self.run.keep_disjoint(args.sparsity, args.mask_granularity)
        self._take_masks(given_masks)
        more = args.calibration_sparsities or ()
        check_selection(self.run.masks, self.run.own_weights, args.sparsity, args.mask_granularity, more)
        # Now, and not when masks are selected: a run that was killed then has the same backend when it goes on.
        self.backend_asked = self.args.sparse_backend
        self._settle_backend()
        base = self.model.get_base_model()
        rewards = vars(self).get("reward_func_names")  # of GRPO and RLOO
        decisive = what_is_given(base, self.processing_class, reward_funcs=rewards)
        self.card_facts = CardFacts(base, rows, self._tag_names, decisive)
        self.trackers = Trackers(self, given.get("callbacks") or ())
        self.add_callback(self.card_facts)
        self.callback_handler.callbacks.insert(0, PhaseCallback(self))

    @staticmethod
    def rows_as_trained(given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments that hold rows which the TRL trainer would misread, as it takes them right."""
        return {}

    @property
    def masks(self) -> LoriMasks | None:
        """Which entries of B are trained; `None` before the calibration."""
        return self.run.masks

    @property
    def phase(self) -> str:
        """How far the run is: `"new"`, `"calibrating"`, `"calibrated"` or `"adapting"`."""
        return self.run.phase

    @property
    def task_name(self) -> str:
        """The task that is trained."""
        return self.run.task

    @property
    def lora_layers(self) -> dict[str, LoraLayer]:
        """Module path -> PEFT's layer."""
        return self.run.lora_layers

    @property
    def projection(self) -> Projection:
        """Which A the adapter has."""
        return self.run.projection

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """B: module path -> lora_B's weight `(out_features, rank)`."""
        return self.run.weights

    # ---- Algorithm 1 -------------------------------------------------------------------------------------------

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
        run = self.run
        self.card_facts.optimizer = self.optimizer_cls_and_kwargs
        if self.optimizer_cls_and_kwargs is not self.backend_is_for:  # it was set after the trainer was made
            self._settle_backend()
        found = find_run(resume_from_checkpoint, self.args, run.task)
        self._take_over(found)
        self._note_run()
        check_engine(
            self.accelerator,
            self.model,
            self.args,
            calibrate=run.masks is None,
            initial_weights=run.initial_weights,
        )
        # Lines 6 to 15, where the mask is not there yet.
        metrics = self.calibrate(found.checkpoint("calibrating")) if run.masks is None else {}

        # Lines 16 to 20. The seed makes the adaptation the same with and without a calibration before it.
        run.phase = "adapting"
        if run.calibration is not None and run.calibration.method != "random":
            self.trackers.name_run(self.args, run, "adaptation")
        set_seed(self.args.seed)
        rate = self.args.learning_rate
        optimizer = phase_optimizer(self.optimizer_cls_and_kwargs, rate, rate)
        with swapped(self, optimizer_cls_and_kwargs=optimizer), self._training_on_a_mask():
            output = super().train(found.checkpoint("adapting"), **kwargs)
        self.check_frozen_entries()
        check_something_moved(run, self.optimizer, rate)
        tasks = [task.to_dict() for task in self.record.history]
        remember(self.model, run.adapter_name, run.all_masks, tasks, run.fingerprint())
        output.metrics.update(metrics)
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
        args, run = self.args, self.run
        if run.masks is not None:
            raise ValueError(
                f"`calibrate()` was called, but task {run.task!r} has its mask already. A task is calibrated "
                "once. Go on with `train()`, or make a new trainer."
            )
        self._note_run()
        set_seed(args.seed)
        with self._calibration():
            output = super().train(resume_from_checkpoint)  # lines 6 to 10
            saliency, steps = self._saliency(), steps_seen(self.args, self.optimizer, output.global_step)
            taken = steps * self.get_total_train_batch_size(self.args)
            samples = rows_seen(self.args, self.train_dataset, taken, self.card_facts.rows)
        run.calibration = Calibration(
            method=args.calibration_method,
            learning_rate=args.calibration_learning_rate if args.calibration_method == "train" else None,
            steps=steps,
            samples=samples,
            loss=output.training_loss,
        )
        run.calibration_log = self.state.log_history
        if not any(values.any() for values in saliency.values()):
            raise ValueError(
                f"The calibration moved nothing in {steps} steps at `calibration_learning_rate="
                f"{args.calibration_learning_rate}`, `calibration_method={args.calibration_method!r}`. A "
                "mask is selected by how far B moved, or by its gradients. Raise the rate or the number of steps, and "
                "check that the rows have completions to learn from."
            )

        run.masks, run.phase = self._select(saliency, args.sparsity, run.task), "calibrated"  # lines 11 to 13
        self._save_calibration(saliency)
        return calibration_figures(output.metrics)

    def _saliency(self) -> dict[str, Tensor]:
        """Return what the calibration that has just ended says of B's entries."""
        if self.args.calibration_method == "gradient":
            optimizer = self.optimizer.optimizer  # accelerate's wrapper holds it
            return {path: to_cpu(optimizer.saliency(weight)) for path, weight in self.weights.items()}
        before, engine = self.run.initial_weights, self.is_deepspeed_enabled
        return {path: change(weight, before[path], with_deepspeed=engine) for path, weight in self.weights.items()}

    def _select(self, saliency: dict[str, Tensor], sparsity: float, task: str) -> LoriMasks:
        """Select the entries of largest saliency, of those that are feasible: of the task's own columns of B."""
        columns, granularity = self.run.columns, self.args.mask_granularity
        taken = None if self.run.feasible is None else columns_of(~self.run.feasible, columns)
        own = columns_of(saliency, columns)
        masks = LoriMasks.select(own, sparsity, granularity, taken, task=task, projection=self.run.projection)
        check_selected(masks, sparsity, granularity)
        entries = {path: mask.cpu() for path, mask in masks.items()}  # as from a file
        if columns is not None:
            entries = widened(entries, columns[1], start=columns[0])
        return LoriMasks(entries, **vars(masks.metadata))

    def _save_calibration(self, saliency: dict[str, Tensor]) -> None:
        """Save masks, record and log where [`find_run`] looks for them, and masks of more sparsities if asked for."""
        folder = self.args.for_calibration().output_dir
        self.save_model(folder, _internal_call=True)
        if self.args.should_save:
            self.state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))
        for sparsity in self.args.calibration_sparsities or ():
            more = self._select(saliency, sparsity, f"{self.run.task}-{sparsity}")
            if self.args.should_save:
                more.save_pretrained(folder)

    # ---- what holds while a phase lasts ------------------------------------------------------------------------

    @contextmanager
    def _calibration(self) -> Iterator[None]:
        """Let the trainer be the calibration's. At the end, also after an error, all is as it was before."""
        args, rows = self.args.for_calibration(), self.train_dataset
        optimizer = phase_optimizer(self.optimizer_cls_and_kwargs, args.learning_rate, self.args.learning_rate)
        if args.calibration_fraction < 1:
            rows = rows.shuffle(seed=args.seed).select(range(share_of_rows(len(rows), args.calibration_fraction)))
        if args.calibration_method == "gradient":
            optimizer = GradientAgreement, {}
        with ExitStack() as stack:
            # What begins first ends last: B is set back when nothing looks at it any more (line 14).
            stack.callback(self._set_B_back)
            stack.enter_context(set_back(self.model, self.run.adapter_name))
            stack.enter_context(counters_set_back(self, self.run.trainer_attributes))
            if (scaler := self.accelerator.scaler) is not None:  # float16's: the adaptation begins with its own scale
                stack.callback(scaler.load_state_dict, scaler.state_dict())
            trackers = stack.enter_context(self.trackers.for_the_calibration(self.args))
            stack.enter_context(calibration_callbacks(self, trackers))
            stack.enter_context(swapped(self.run, phase="calibrating"))
            self.trackers.name_run(args, self.run, "calibration", folder=self.args.output_dir)
            stack.enter_context(swapped(self, args=args, train_dataset=rows, optimizer_cls_and_kwargs=optimizer))
            stack.enter_context(self._training_on_a_mask())
            yield

    @contextmanager
    def _training_on_a_mask(self) -> Iterator[None]:
        """Train what the phase may train, with an optimizer and a wrapping of the model that know these parameters."""
        run = self.run
        self.optimizer = self.lr_scheduler = None
        if self.is_deepspeed_enabled and self.model_wrapped is not self.model:
            self.model_wrapped.destroy()  # an engine is made for one optimizer; what ZeRO-3 has sharded stays sharded
        self.model_wrapped = self.model
        with sparse_training(self.model, run.adapter_name, run.trained_masks, self.args.sparse_backend):
            try:
                yield
            finally:
                while run.shard_hooks:
                    run.shard_hooks.pop().remove()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, DataLoader]:
        """Mask the gradients of FSDP2's shards, once they are made, and let the log begin with the calibration's."""
        with self._engine_checkpoint():
            prepared = super()._prepare_for_training(*args, **kwargs)
        if not self.is_deepspeed_enabled:  # its optimizer has flat copies
            check_all_is_optimized(self.model.named_parameters(), self.optimizer)
        self.run.shard_hooks += mask_shards(self.weights, self.run.trained_masks)
        fold_values(self.model, self.run.adapter_name)  # DeepSpeed may have loaded a checkpoint
        log = self.state.log_history
        if self.phase == "adapting" and not any("calibration_loss" in entry for entry in log):
            log[:0] = self.run.calibration_log
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Take no further step where a phase that is resumed has all of its steps: the Trainer would take one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Exempt B from weight decay: it would pull the entries outside the mask towards zero."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if ".lora_B." not in name and f".{VALUES}." not in name]

    def _set_B_back(self) -> None:
        for path, weight in self.weights.items():
            assign(weight, self.run.initial_weights[path])

    def check_frozen_entries(self) -> None:
        """Check the method's promise: see [`~lori_trl.training.optimizers.check_frozen_entries`]."""
        check_frozen_entries(self.run, self.optimizer, engine_dtype(self.accelerator))

    # ---- the adapter: its tasks, A and masks -------------------------------------------------------------------

    def _settle_backend(self) -> None:
        """Choose the backend by the optimizer, and refuse one that LoRI can't train with."""
        self.backend_is_for = self.optimizer_cls_and_kwargs
        optimizer = self.backend_is_for or self.get_optimizer_cls_and_kwargs(self.args, self.model)
        args, masks = self.args, self.run.masks  # the constructor's copy
        args.sparse_backend = self.backend_asked
        args.sparse_backend = settled_backend(args, Engine.of(self.accelerator), masks, optimizer)

    def _take_masks(self, given: LoriMasks | None) -> None:
        """Take the masks that need no calibration: given ones, the task's own, all of B, or random ones."""
        run, args = self.run, self.args
        if given is not None:
            run.adopt(given)
        elif run.masks is not None:
            logger.info(f"The adapter has task {run.task!r} already: it goes on with its own masks.")
        elif args.sparsity == 0:
            everything = {path: torch.ones(weight.shape, dtype=torch.bool) for path, weight in run.weights.items()}
            new = run.feasible if args.grow is not None else None
            run.masks = LoriMasks(new or everything, task=run.task, sparsity=0.0, projection=run.projection)
        elif args.calibration_method == "random":
            seed = derive_projection_seed(args.seed, run.task)
            run.calibration = Calibration(method="random", seed=seed)
            saliency = {path: random_saliency(path, weight.shape, seed=seed) for path, weight in run.weights.items()}
            run.masks = self._select(saliency, args.sparsity, run.task)

    # ---- which run this is -------------------------------------------------------------------------------------

    def _take_over(self, found: Found) -> None:
        """Go on from what an earlier run has left: its identity, and from the calibration's end on its masks."""
        run = self.run
        if found.record is None or found.folder is None:
            return
        on_record = found.record.projection
        if run.projection.is_stored and run.projection.before_its_making() == on_record.before_its_making():
            take_over_projection(self.model, run.adapter_name, found.folder)  # no seed draws this A again
            run.rename_A(on_record)
        adapter_config = self.model.peft_config[run.adapter_name]
        check_same_run(found.folder, found.record, self.record, self.args, self.card_facts, adapter_config)
        run.id = found.record.training.run if found.record.training is not None else None
        if found.phase in ("calibrated", "adapting"):
            run.calibration = found.record.calibration
            run.adopt(LoriMasks.from_pretrained(found.folder, task=run.task))
        if found.phase == "calibrated":
            run.calibration_log = logged_before(found.folder)
            if dense_parameters(self.model, run.adapter_name):
                self._load_from_checkpoint(str(found.folder))  # as they were when the calibration began

    def _note_run(self) -> None:
        """Give a run that begins an identity, and note in its folder which run goes on there."""
        if not self.args.should_save:
            return
        if self.run.id is None:
            self.run.id = begin_run(self.args)
        else:
            note_run(self.args, self.run.id)
