"""What real users pass in: right, or refused before the first step, and never changed under their hands."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import Stop, lora_config, make_llama
from transformers import TrainerCallback

from lori_trl import LoriMasks, LoriSFTTrainer, load_lori_adapter
from lori_trl.adapter.memory import remembered
from lori_trl.adapter.record import read_record
from lori_trl.method.projections import projections
from lori_trl.training.optimizers import phase_optimizer

SAVING = {"save_strategy": "steps", "save_steps": 2}


# ---- what is passed in stays as it is ------------------------------------------------------------------------------


def test_a_config_serves_any_number_of_trainers(make_trainer, tmp_path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    before = copy.deepcopy(config.to_dict())
    trainer = make_trainer(peft_config=config)
    assert config.to_dict() == before and trainer.model.peft_config["default"] is not config


def test_arguments_and_callbacks_stay_as_they_are(model, rows, tokenizer, make_trainer):
    args, callbacks = make_trainer().args, [Stop("never")]
    before = dict(vars(args))
    trainer = LoriSFTTrainer(
        model, args, train_dataset=rows, processing_class=tokenizer, peft_config=lora_config(), callbacks=callbacks
    )
    trainer.train()
    assert vars(args) == before and len(callbacks) == 1 and rows.column_names == ["prompt", "completion"]


# ---- which adapter, which A ----------------------------------------------------------------------------------------


def test_adapters_of_one_model_have_masks_of_their_own(make_trainer, tmp_path):
    first = make_trainer(output_dir=tmp_path / "first")
    first.train()
    model = first.model
    model.add_adapter("b", lora_config())
    model.set_adapter("b")
    second = make_trainer(output_dir=tmp_path / "second", model=model, task_name="code", disjoint_masks=True)
    assert second.masks is None and not second.run.earlier_masks and second.projection == first.projection
    other = make_trainer(output_dir=tmp_path / "other", model=model, task_name="math")
    assert other.projection.seed != first.projection.seed
    other.train()
    other.save_model()
    assert list(load_lori_adapter(make_llama(), tmp_path / "other").lori_masks) == ["math"]
    assert list(remembered(model, "default")[0]) == ["code"] and list(remembered(model, "b")[0]) == ["math"]
    model.delete_adapter("b")
    model.add_adapter("b", lora_config())
    assert remembered(model, "b")[0] == {}


def test_an_adapter_whose_A_was_changed_is_refused(make_trainer, adapter_folder):
    model = load_lori_adapter(make_llama(), adapter_folder, is_trainable=True)
    next(iter(projections(model, "default").values())).mul_(1.5)
    with pytest.raises(ValueError, match="another A than the one that its tasks were trained on"):
        make_trainer(model=model, task_name="math")


def test_a_fresh_adapter_made_with_peft_gets_the_tasks_A(make_trainer, tmp_path):
    def peft_model():
        torch.manual_seed(7)
        return get_peft_model(make_llama(), lora_config())

    expected = make_trainer(output_dir=tmp_path / "0").projection
    one = make_trainer(output_dir=tmp_path / "1", model=peft_model())
    two = make_trainer(output_dir=tmp_path / "2", model=peft_model(), task_name="math", projection_seed=3)
    assert one.projection == expected and two.projection.seed == 3


def test_a_default_name_that_the_adapter_has_is_refused(make_trainer, tmp_path, rows):
    first = make_trainer(output_dir=tmp_path / "first", task_name=None)
    first.train()
    with pytest.raises(ValueError, match="`task_name` is not given, and the data's own name 'data-.*' is that of"):
        make_trainer(output_dir=tmp_path / "second", model=first.model, task_name=None)


@pytest.mark.parametrize("name", ["mlp", "layers"])
def test_names_by_which_tensors_would_be_lost_are_refused(make_trainer, name):
    model = get_peft_model(make_llama(), lora_config())
    model.add_adapter(name, lora_config())
    with pytest.raises(ValueError, match=f"The adapter's name '{name}' is a part of the names of the model's modules"):
        make_trainer(model=model)


def test_a_merged_adapter_is_refused(make_trainer, adapter_folder):
    model = load_lori_adapter(make_llama(), adapter_folder, is_trainable=True)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into the base model.*Call `model.unmerge_adapter\(\)` first"):
        make_trainer(model=model, task_name="math")


# ---- what is trained -----------------------------------------------------------------------------------------------


class GroupsByName(LoriSFTTrainer):
    """As LoRA+ does it."""

    def create_optimizer(self, model=None):
        B = [parameter for name, parameter in self.model.named_parameters() if "lora_B" in name]
        self.optimizer = torch.optim.AdamW([{"params": B, "lr": self.args.learning_rate}], weight_decay=0.0)
        return self.optimizer


def test_groups_that_miss_the_packed_values_are_refused(make_trainer, tmp_path):
    trainer = make_trainer(trainer_class=GroupsByName, sparse_backend="packed", calibration_method="random")
    with pytest.raises(ValueError, match="AdamW has .* of the trained parameters in no group.*sparse_backend='hook'"):
        trainer.train()
    hook = make_trainer(trainer_class=GroupsByName, sparse_backend="hook", output_dir=tmp_path / "hook")
    hook.train()
    plain = make_trainer(sparse_backend="hook", output_dir=tmp_path / "plain")
    plain.train()
    for path, weight in hook.weights.items():
        torch.testing.assert_close(weight, plain.weights[path], rtol=1e-4, atol=1e-6)  # one step is fused, one is not


def test_groups_made_by_hand_serve_both_phases(make_trainer, tmp_path):
    trainer = make_trainer(sparse_backend="hook", calibration_learning_rate=1e-3)
    kwargs = {"params": list(trainer.weights.values())}
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, kwargs)
    trainer.train()
    assert len(kwargs["params"]) == 14
    rates = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert {entry["learning_rate"] for entry in rates} == {5e-3}
    assert trainer.state.log_history[0]["calibration_learning_rate"] == 1e-3


def test_an_optimizer_with_a_rate_of_its_own_is_refused(make_trainer):
    trainer = make_trainer()
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 0.5})
    with pytest.raises(ValueError, match="has lr=0.5, and `learning_rate=0.005`.*Leave `lr` out"):
        trainer.train()
    assert phase_optimizer((torch.optim.SGD, {"lr": 0.5}), 0.1, 0.5)[1] == {"lr": 0.1}
    assert phase_optimizer((torch.optim.SGD, {"momentum": 0.9}), 0.1, 0.5)[1] == {"lr": 0.1, "momentum": 0.9}


@pytest.mark.parametrize("backend", ["auto", "hook", "packed"])
def test_muon_is_refused_by_its_name_before_the_calibration(make_trainer, backend):
    """Also where it is set after the trainer was made, with an explicit backend."""
    trainer = make_trainer(sparse_backend=backend)
    trainer.optimizer_cls_and_kwargs = (torch.optim.Muon, {})
    with pytest.raises(ValueError, match="The optimizer Muon moves entries that have no gradient"):
        trainer.train()
    assert trainer.phase == "new" and trainer.state.global_step == 0


def test_an_optimizer_that_is_set_later_decides_the_backend_too(make_trainer):
    trainer = make_trainer()
    assert trainer.args.sparse_backend == "packed"
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"params": list(trainer.weights.values())})
    trainer.train()
    assert trainer.args.sparse_backend == "hook"


def test_an_optimizer_that_moves_frozen_entries_is_named_after_its_first_step(make_trainer):
    class Orthogonal(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data += 1e-3 * (parameter.numel() > 48)  # more than it is tried on

    trainer = make_trainer(sparse_backend="hook", calibration_method="random")
    trainer.optimizer_cls_and_kwargs = (Orthogonal, {})
    with pytest.raises(RuntimeError, match="The optimizer Orthogonal moved frozen entries"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_an_adaptation_that_moves_nothing_is_no_run(make_trainer):
    with pytest.raises(RuntimeError, match="The adaptation moved no entry of B, with the optimizer AdamW at"):
        make_trainer(learning_rate=1e-60, calibration_method="random").train()


def test_the_fraction_of_rows_is_exact(make_trainer, rows):
    class Length(TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader, **kwargs):
            lengths.append(len(train_dataloader.dataset))

    lengths: list[int] = []
    hundred = rows.select([number % len(rows) for number in range(100)])
    make_trainer(train_dataset=hundred, calibration_fraction=0.29, callbacks=[Length()]).calibrate()
    assert lengths == [29]


def test_far_fewer_entries_than_asked_for_are_told(make_trainer, caplog):
    class Partial(LoriSFTTrainer):
        def _saliency(self):
            return {path: value * ("layers.0.self_attn.k" in path) for path, value in super()._saliency().items()}

    make_trainer(trainer_class=Partial, sparsity=0.5).calibrate()
    assert "asks for 1,024 entries of B, and only 64 moved in the calibration; 13 of 14 modules" in caplog.text


def test_masks_lie_on_the_cpu_wherever_they_were_selected(make_trainer, monkeypatch):
    select = LoriMasks.select.__func__

    class Elsewhere(torch.Tensor):
        """Stands in for a tensor on an accelerator."""

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    def selected(cls, *args, **kwargs):
        masks = select(cls, *args, **kwargs)
        return cls({path: mask.as_subclass(Elsewhere) for path, mask in masks.items()}, **vars(masks.metadata))

    monkeypatch.setattr(LoriMasks, "select", classmethod(selected))
    trainer = make_trainer(calibration_method="gradient")
    trainer.calibrate()
    assert all(type(mask) is torch.Tensor for mask in trainer.masks.values())


def test_samples_are_rows(make_trainer, rows):
    packed = make_trainer(packing=True, max_length=32, calibration_max_steps=40)
    packed.calibrate()
    assert len(packed.train_dataset) < len(rows) and packed.run.calibration.samples == len(rows)


# ---- resuming ------------------------------------------------------------------------------------------------------


def test_a_finished_calibration_under_another_path_is_adapted_whole(make_trainer, tmp_path, monkeypatch):
    whole = make_trainer(output_dir=tmp_path / "whole")
    whole.train()
    make_trainer().calibrate()
    monkeypatch.chdir(tmp_path)
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint="out/../out/calibration/")
    assert resumed.state.global_step == 4
    assert all(torch.equal(weight, whole.weights[path]) for path, weight in resumed.weights.items())


@pytest.mark.parametrize("phase", ["calibrating", "adapting"])
@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"max_grad_norm": 0.5}, "max_grad_norm its default, this run has 0.5"),
        ({"seed": 1}, "seed its default, this run has 1"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size 4, this run has 2"),
        ({"peft_config": lora_config(lora_alpha=16)}, "lora_alpha 8, this run has 16"),
        ({"optim": "sgd"}, "optim its default, this run has sgd"),
    ],
)
def test_another_run_is_no_resume(make_trainer, phase, changes, difference):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(callbacks=[Stop(phase)], projection_seed=3, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match=f"was trained with {difference}"):
        make_trainer(projection_seed=3, **changes).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_an_optimizer_is_told_and_an_output_dir_is_none(make_trainer, tmp_path, caplog):
    trainer = make_trainer(save_only_model=True, **SAVING)
    trainer.train()
    trainer.save_model()
    resumed = make_trainer(save_only_model=True, **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert "has no optimizer state" in caplog.text and "will not be that of an undisturbed run" in caplog.text
    for folder in (tmp_path / "out", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="is no checkpoint: it has no trainer_state.json.*or `True`"):
            make_trainer(**SAVING).train(resume_from_checkpoint=str(folder))


def test_a_longer_run_is_the_same_run(make_trainer, tmp_path):
    make_trainer(**SAVING).train()
    longer = make_trainer(max_steps=6, **SAVING)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 6


# ---- before the calibration ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, ValueError, "makes no schedule.*Pass them as `lr_scheduler_kw"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, ValueError, "makes no schedule"),
        ({"calibration_sparsities": [0.5, 0.9999999]}, ValueError, "`calibration_sparsities=0.9999999` with"),
        ({"report_to": "comet_ml"}, ImportError, "`report_to='comet_ml'` is not installed.*install the tracker"),
    ],
)
def test_what_would_fail_after_the_calibration_fails_before(make_trainer, changes, error, message):
    with pytest.raises(error, match=message):
        make_trainer(**changes)


def test_a_numpy_number_is_a_number(make_trainer, tmp_path):
    trainer = make_trainer(sparsity=np.float32(0.9), learning_rate=np.float64(5e-3))
    trainer.train()
    trainer.save_model()
    assert read_record(tmp_path / "out").sparsity == 0.9 and type(trainer.args.sparsity) is float


def test_an_output_that_cannot_be_written_is_noticed_first(make_trainer, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file. An adapter is written to a folder"):
        make_trainer(output_dir=tmp_path / "file")
