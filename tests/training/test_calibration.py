"""Masks without a dense run: from gradients, and by chance. B stays B0, and the mask is what plain arithmetic says."""

import copy

import pytest
import torch
from peft import get_peft_model
from tiny import RecordingTrainer, lora_config, make_llama
from torch.nn import functional as F
from transformers import TrainerCallback

from lori_trl import LoriMasks, load_lori_adapter
from lori_trl.adapter.record import read_record
from lori_trl.adapter.record_fields import Calibration
from lori_trl.method.layers import lora_layers
from lori_trl.method.projections import derive_projection_seed, init_projections
from lori_trl.method.saliency import GradientAgreement, random_saliency
from lori_trl.method.sparsity import num_to_select


class GradientTrainer(RecordingTrainer):
    """Sees to it that B is not moved by any step."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.phase == "calibrating":
            B0 = self.run.initial_weights
            assert all(torch.equal(weight.cpu(), B0[path]) for path, weight in self.weights.items())
        return loss


def agreement(model, weights, batches):
    """|sum g| / sqrt(sum g^2) in plain PyTorch: module path -> saliency."""
    gradients = []
    for batch in batches:
        model.zero_grad()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100).backward()
        gradients.append({path: weight.grad.clone() for path, weight in weights.items()})
    stacked = {path: torch.stack([gradient[path] for gradient in gradients]) for path in weights}
    return {path: (g.sum(0).abs() / g.square().sum(0).sqrt()).nan_to_num(0) for path, g in stacked.items()}


def largest(saliency, share):
    flat = torch.cat([saliency[path].flatten() for path in sorted(saliency)])
    return flat.topk(num_to_select(1 - share, flat.numel())).values.min()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradient_selects_where_the_batches_agree(make_trainer, llama, accumulation):
    trainer = make_trainer(
        trainer_class=GradientTrainer,
        calibration_method="gradient",
        calibration_max_steps=5,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        weight_decay=0.1,
    )
    trainer.calibrate()
    batches = trainer.batches["calibrating"]
    assert len(batches) == 5 * accumulation
    if accumulation > 1:
        batches = [
            {name: torch.cat([a[name], b[name]]) for name in a}
            for a, b in zip(batches[::2], batches[1::2], strict=True)
        ]

    plain = get_peft_model(copy.deepcopy(llama).train(), lora_config())
    init_projections(plain, "default", seed=trainer.projection.seed)
    weights = {path: layer.lora_B["default"].weight for path, layer in lora_layers(plain, "default").items()}
    saliency = agreement(plain, weights, batches)
    assert trainer.masks == LoriMasks.select(saliency, 0.9)
    threshold = largest(saliency, 0.1)
    assert all((saliency[path] >= threshold)[mask].all() for path, mask in trainer.masks.items())
    assert trainer.masks.num_selected == num_to_select(0.9, trainer.masks.numel)
    assert trainer.masks.threshold == pytest.approx(threshold.item(), rel=1e-4)
    assert trainer.run.calibration.method == "gradient" and trainer.run.calibration.steps == 5


def test_the_adaptation_after_gradient_is_an_ordinary_one(make_trainer, tmp_path):
    trainer = make_trainer(calibration_method="gradient")
    trainer.train()
    given = make_trainer(output_dir=tmp_path / "given", mask_name_or_path=str(tmp_path / "out" / "calibration"))
    given.train()
    assert all(torch.equal(given.weights[path], weight) for path, weight in trainer.weights.items())
    assert any(weight.any() for weight in trainer.weights.values())
    assert "gradients of 4 batches" in " ".join((tmp_path / "out" / "calibration" / "README.md").read_text().split())


@pytest.mark.parametrize("method", ["gradient", "random"])
def test_a_second_task_leaves_the_first_alone(make_trainer, tmp_path, method):
    first = make_trainer(calibration_method=method, mask_granularity="matrix")
    first.train()
    first.save_model()
    model = load_lori_adapter(make_llama(), tmp_path / "out", is_trainable=True)
    second = make_trainer(
        model, tmp_path / "second", trainer_class=GradientTrainer, task_name="math", calibration_method=method,
        disjoint_masks=True,
    )  # fmt: skip
    second.train()
    assert (second.masks & first.masks).num_selected == 0
    assert second.masks.num_selected == num_to_select(0.9, second.masks.numel)
    for path, weight in second.weights.items():
        before = first.weights[path].detach()
        assert torch.equal(weight[~second.masks[path]], before[~second.masks[path]])
        assert before[first.masks[path]].any() or not first.masks[path].any()


def test_gradient_resumes_where_it_was(make_trainer, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    config = {"calibration_method": "gradient", "calibration_max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(output_dir=tmp_path / "whole", **config)
    whole.calibrate()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(callbacks=[Stop()], **config).calibrate()
    resumed = make_trainer(trainer_class=RecordingTrainer, **config)
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.batches["calibrating"]) == 3
    assert resumed.masks == whole.masks and resumed.masks.threshold == whole.masks.threshold
    with pytest.raises(ValueError, match="calibration_method gradient, this run has its default"):
        make_trainer(save_strategy="no").train(resume_from_checkpoint=True)


def test_gradient_has_a_length_of_its_own(make_trainer):
    args = make_trainer(calibration_method="gradient", calibration_max_steps=-1, max_steps=500).args
    assert args.for_calibration().max_steps == 8 and args.max_steps == 500
    with pytest.raises(ValueError, match="calibration_max_steps=1"):
        make_trainer(calibration_method="gradient", calibration_max_steps=1)


def test_random_needs_no_calibration(make_trainer, tmp_path):
    trainer = make_trainer(trainer_class=RecordingTrainer, calibration_method="random", mask_granularity="matrix")
    assert trainer.masks.task == "code" and not (tmp_path / "out" / "calibration").exists()
    seed = derive_projection_seed(trainer.args.seed, "code")
    drawn = {path: random_saliency(path, weight.shape, seed=seed) for path, weight in trainer.weights.items()}
    assert trainer.masks == LoriMasks.select(drawn, 0.9, "matrix")
    for mask in trainer.masks.values():
        assert mask.sum() == num_to_select(0.9, mask.numel())
    trainer.train()
    assert trainer.batches["calibrating"] == [] and len(trainer.batches["adapting"]) == 4
    trainer.save_model()
    assert read_record(tmp_path / "out").calibration == Calibration(method="random", seed=seed)
    assert f"drawn at random from seed {seed}" in (tmp_path / "out" / "README.md").read_text()


def test_random_masks_of_two_tasks_are_independent(make_trainer):
    code, again, math, other = (
        make_trainer(calibration_method="random", task_name=task, seed=seed, sparsity=0.5).masks
        for task, seed in (("code", 0), ("code", 0), ("math", 0), ("code", 1))
    )
    assert code == again
    assert code.overlap(math) == pytest.approx(0.5, abs=0.05) and code.overlap(other) == pytest.approx(0.5, abs=0.05)


def test_random_has_one_sparsity(make_trainer):
    with pytest.raises(ValueError, match="calibration_sparsities"):
        make_trainer(calibration_method="random", calibration_sparsities=[0.5])


def test_a_parameter_without_gradients_is_not_salient():
    used, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = GradientAgreement([used, unused])
    used.grad = torch.tensor([1.0, 0.0])
    optimizer.step()
    assert optimizer.saliency(used).tolist() == [1.0, 0.0] and optimizer.saliency(unused).tolist() == [0.0, 0.0]


def test_given_masks_that_know_no_A(make_trainer, tmp_path):
    """The authors' files, and masks that were made by hand."""
    masks = make_trainer(calibration_method="random").masks
    file = LoriMasks(masks, task="code", sparsity=0.9).save_pretrained(tmp_path / "given")
    assert make_trainer(mask_name_or_path=str(file)).masks == masks


# ---- float16's scaler: a stand-in on the CPU, where accelerate makes none ------------------------------------------


class Scales(TrainerCallback):
    """Notes the scale at which each phase begins, and the steps that were skipped."""

    def __init__(self, trainer, scale):
        self.trainer, self.begun, self.skipped = trainer, [], 0
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1)
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun.append(self.trainer.accelerator.scaler.get_scale())

    def on_step_end(self, args, state, control, **kwargs):
        self.skipped += self.trainer.accelerator.optimizer_step_was_skipped


def test_the_adaptation_begins_with_a_scale_of_its_own(make_trainer):
    trainer = make_trainer(max_grad_norm=0.0)
    scales = Scales(trainer, 2.0**10)
    trainer.train()
    assert scales.begun == [2.0**10, 2.0**10] and trainer.accelerator.scaler.get_scale() == 2.0**14


@pytest.mark.parametrize("backend", ["packed", "hook"])
def test_steps_that_the_scaler_skips_are_not_seen(make_trainer, backend):
    trainer = make_trainer(
        calibration_method="gradient", calibration_max_steps=12, max_grad_norm=0.0, sparse_backend=backend
    )
    scales = Scales(trainer, 2.0**70)
    trainer.calibrate()
    assert 0 < scales.skipped < 10
    assert trainer.run.calibration.steps == 12 - scales.skipped
    assert trainer.run.calibration.samples == min(4 * trainer.run.calibration.steps, 32)


def test_a_calibration_whose_every_step_is_skipped_is_refused(make_trainer):
    trainer = make_trainer(calibration_method="gradient", calibration_max_steps=2, max_grad_norm=0.0)
    Scales(trainer, 2.0**127)
    with pytest.raises(ValueError, match="saw the gradients of 0 batches in 2 steps.*in bfloat16"):
        trainer.calibrate()
