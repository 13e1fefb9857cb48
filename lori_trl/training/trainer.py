"""Algorithm 1: draw A, calibrate all of B, select the mask, set B back, adapt on the mask."""

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from ..adapter.masks import LoriMasks
from ..adapter.record_fields import Calibration, TaskRecord
from ..method.dense_parameters import dense_parameters, set_back, show_bias_of_tied_head
from ..method.layers import VALUES, lora_layers
from ..method.lora_options import check_variants, for_language_part
from ..method.projections import (
    CONTRASTIVE,
    Projection,
    derive_projection_seed,
    freeze_projections,
    init_projections,
)
from ..method.saliency import GradientAgreement, random_saliency
from ..method.sharding import assign, change, engine_dtype, gather, mask_shards, to_cpu
from ..method.sparse import fold_values, sparse_training
from .activations import init_from_activations, protected_names, take_over_projection
from .base_model import keep_4bit_layers
from .callbacks import PhaseCallback, calibration_callbacks, calibration_figures, counters_set_back, swapped
from .card_facts import CardFacts
from .checkpoints import Found, begin_run, check_same_run, find_run, logged_before, note_run
from .checks import check_arguments, check_selection, check_trained
from .config import LoriArguments
from .hub_pushes import HubPushes
from .parallel_engines import check_engine
from .run import LoriRun
from .saving import AdapterSaves
from .trackers import Trackers
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
        args, rows, peft_config = given["args"], given["train_dataset"], given.get("peft_config")
        if peft_config is not None and have_images(rows):
            given["peft_config"] = for_language_part(peft_config)
        task = args.task_name or name_of_data(rows)
        given_masks = None
        if args.mask_name_or_path:
            given_masks = LoriMasks.from_pretrained(args.mask_name_or_path, revision=args.mask_revision)

        super().__init__(**given)

        self.run = self._begin_with_adapter(task)
        self.recipe = None
        # Algorithm 1, lines 1 to 5: A is drawn once, for both phases, and B is zero; a continued adapter keeps both.
        self.run.projection = self._keep_A() if peft_config is None else self._make_A(given_masks, given)
        check_trained(self.model, self.run.adapter_name, self.run.weights, args)
        if args.disjoint_masks:
            self.run.keep_disjoint(args.sparsity, args.mask_granularity)
        self._take_masks(given_masks)
        check_selection(self.run.masks, self.run.weights, args.sparsity, args.mask_granularity)
        self.card_facts = CardFacts(self.model.get_base_model(), rows, self._tag_names)
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
        with self._training_on_a_mask():
            output = super().train(found.checkpoint("adapting"), **kwargs)
        self._check_frozen_entries()
        self._leave_tasks_on_model()
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
            saliency = self._saliency()
            samples = self._samples_seen(output.global_step)
        run.calibration = Calibration(
            method=args.calibration_method,
            learning_rate=args.calibration_learning_rate if args.calibration_method == "train" else None,
            steps=output.global_step,
            samples=samples,
            loss=output.training_loss,
        )
        run.calibration_log = self.state.log_history
        if not any(values.any() for values in saliency.values()):
            raise ValueError(
                f"The calibration moved nothing in {output.global_step} steps at `calibration_learning_rate="
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
        return {path: change(weight, self.run.initial_weights[path]) for path, weight in self.weights.items()}

    def _select(self, saliency: dict[str, Tensor], sparsity: float, task: str) -> LoriMasks:
        """Select the entries of largest saliency, of those that are feasible."""
        taken = None if self.run.feasible is None else ~self.run.feasible
        granularity = self.args.mask_granularity
        return LoriMasks.select(saliency, sparsity, granularity, taken, task=task, projection=self.run.projection)

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

    def _samples_seen(self, steps: int) -> int | None:
        """Count the rows that the steps have seen, each once; None for a stream."""
        if not isinstance(self.train_dataset, Dataset):
            return None
        return min(len(self.train_dataset), steps * self.get_total_train_batch_size(self.args))

    # ---- what holds while a phase lasts ------------------------------------------------------------------------

    @contextmanager
    def _calibration(self) -> Iterator[None]:
        """Let the trainer be the calibration's. At the end, also after an error, all is as it was before."""
        args, rows, optimizer = self.args.for_calibration(), self.train_dataset, self.optimizer_cls_and_kwargs
        if args.calibration_fraction < 1:
            count = max(1, int(args.calibration_fraction * len(rows)))
            rows = rows.shuffle(seed=args.seed).select(range(count))
        if args.calibration_method == "gradient":
            optimizer = GradientAgreement, {}
        with ExitStack() as stack:
            # What begins first ends last: B is set back when nothing looks at it any more (line 14).
            stack.callback(self._set_B_back)
            stack.enter_context(set_back(self.model, self.run.adapter_name))
            stack.enter_context(counters_set_back(self, self.run.trainer_attributes))
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
        self.run.shard_hooks += mask_shards(self.weights, self.run.trained_masks)
        fold_values(self.model, self.run.adapter_name)  # DeepSpeed may have loaded a checkpoint
        log = self.state.log_history
        if self.phase == "adapting" and not any("calibration_loss" in entry for entry in log):
            log[:0] = self.run.calibration_log
        return prepared

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Exempt B from weight decay: it would pull the entries outside the mask towards zero."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if ".lora_B." not in name and f".{VALUES}." not in name]

    def _set_B_back(self) -> None:
        for path, weight in self.weights.items():
            assign(weight, self.run.initial_weights[path])

    def _check_frozen_entries(self) -> None:
        """Raise if an entry outside the mask, or A, is not what it was: the method's promise, checked on every run."""
        run = self.run
        moved = [
            path
            for path, weight in run.weights.items()
            if gather(change(weight, run.initial_weights[path])).cpu()[~run.masks[path]].any()  # type: ignore[index]
        ]
        if moved or run.fingerprint(engine_dtype(self.accelerator)) != run.projection.fingerprint:
            raise RuntimeError(
                f"`optim={self.args.optim.value}` moved frozen entries of {', '.join(moved[:3]) or 'A'}. LoRI needs "
                "an optimizer that leaves entries without a gradient alone. Use e.g. `optim='adamw_torch'`."
            )

    # ---- the adapter: its tasks, A and masks -------------------------------------------------------------------

    def _begin_with_adapter(self, task: str) -> LoriRun:
        """Take stock of the adapter that is trained: its layers, its B0, and the tasks that it has."""
        adapter_name = self.model.active_adapters[0]
        layers = lora_layers(self.model, adapter_name)
        check_variants(layers, adapter_name)
        keep_4bit_layers(self.model)
        show_bias_of_tied_head(self.model)
        masks = dict(vars(self.model).get("lori_masks", {}))
        tasks = [TaskRecord.from_dict(each) for each in vars(self.model).get("lori_tasks", [])]
        return LoriRun(
            task,
            adapter_name,
            layers,
            earlier_masks={name: masks[name] for name in masks if name != task},
            earlier_tasks=[each for each in tasks if each.task in masks and each.task != task],
            trainer_attributes=frozenset(vars(self)),
            masks=masks.get(task),
        )

    def _leave_tasks_on_model(self) -> None:
        """Tell the model which tasks it has, so that the next trainer on it knows them."""
        self.model.lori_masks = self.run.all_masks
        self.model.lori_tasks = [task.to_dict() for task in self.record.history]

    def _make_A(self, masks: LoriMasks | None, given: Mapping[str, Any]) -> Projection:
        """Make A anew for a fresh adapter: the one that given masks were calibrated on, or the task's own."""
        if self.args.projection_init == CONTRASTIVE:
            return self._make_A_from_activations(given)
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
            seed = derive_projection_seed(self.args.seed, self.run.task)
        init_projections(self.model, self.run.adapter_name, seed=seed, init=init)
        return Projection(init, seed, self.run.fingerprint(engine_dtype(self.accelerator)))

    def _make_A_from_activations(self, given: Mapping[str, Any]) -> Projection:
        init_from_activations(
            self.model,
            self.run.adapter_name,
            given["train_dataset"],
            self.args,
            accelerator=self.accelerator,
            processing_class=self.processing_class,
            formatting_func=given.get("formatting_func"),
        )
        fingerprint = self.run.fingerprint(engine_dtype(self.accelerator))
        return Projection(CONTRASTIVE, None, fingerprint, protected_names(self.args))

    def _keep_A(self) -> Projection:
        """Keep the A of an adapter that is continued; where it came from is known if `lori_trl` loaded it."""
        run = self.run
        freeze_projections(self.model, run.adapter_name)
        if not run.all_masks and any(weight.any() for weight in run.weights.values()):
            logger.warning(
                "The adapter is trained and has no task on record: which entries of B belong to what is not known. If "
                "it is a LoRI adapter, load it with `load_lori_adapter`, which brings its masks and history."
            )
        fingerprint = run.fingerprint(engine_dtype(self.accelerator))
        for masks in run.all_masks.values():
            if masks.projection is not None and masks.projection.fingerprint == fingerprint:
                return masks.projection
        return Projection(None, None, fingerprint)

    def _take_masks(self, given: LoriMasks | None) -> None:
        """Take the masks that need no calibration: given ones, the task's own, all of B, or random ones."""
        run, args = self.run, self.args
        if given is not None:
            run.adopt(given)
        elif run.masks is not None:
            logger.info(f"The adapter has task {run.task!r} already: it goes on with its own masks.")
        elif args.sparsity == 0:
            everything = {path: torch.ones(weight.shape, dtype=torch.bool) for path, weight in run.weights.items()}
            run.masks = LoriMasks(everything, task=run.task, sparsity=0.0, projection=run.projection)
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
        own = replace(run.projection, fingerprint=found.record.projection.fingerprint)
        if own.init == CONTRASTIVE and own == found.record.projection:  # no seed draws this A again
            take_over_projection(self.model, run.adapter_name, found.folder)
            run.projection = own
        check_same_run(found.folder, found.record, self.record, self.args)
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
