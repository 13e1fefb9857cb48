"""What must hold of every run, whatever it is combined with: five invariants, checked from outside."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import TrainerCallback

from lori_trl.method.dense_parameters import dense_parameters
from lori_trl.method.projections import draw_projection, fingerprint, projections
from lori_trl.method.sparsity import num_to_select

TOKENS = torch.arange(3, 33).view(2, 15)


def values_of(tensors) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


class Witness(TrainerCallback):
    """Keeps B, and what is trained densely, as they are when a phase begins and ends."""

    def __init__(self, trainer):
        self.trainer, self.seen = trainer, {}
        trainer.add_callback(self)

    def note(self, moment):
        dense = dense_parameters(self.trainer.model, "default")
        self.seen[self.trainer.phase, moment] = values_of(self.trainer.weights), values_of(dense)

    def on_train_begin(self, args, state, control, **kwargs):
        self.note("begin")

    def on_train_end(self, args, state, control, **kwargs):
        self.note("end")


def base_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """What of a model is neither the adapter nor trained densely, by PEFT's names."""
    adapter = ("lora_", "modules_to_save", "trainable_tokens", "sparse_")
    return {name: tensor for name, tensor in model.state_dict().items() if not any(part in name for part in adapter)}


def top_k(saliency: dict[str, torch.Tensor], sparsity: float) -> dict[str, torch.Tensor]:
    """The K largest entries over all modules, by a plain stable sort."""
    flat = torch.cat([saliency[path].abs().float().flatten() for path in sorted(saliency)])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.sort(descending=True, stable=True).indices[: num_to_select(sparsity, flat.numel())]] = True
    chosen &= flat > 0
    parts = chosen.split([saliency[path].numel() for path in sorted(saliency)])
    return {path: part.view_as(saliency[path]) for path, part in zip(sorted(saliency), parts, strict=True)}


def check_trained(trainer):
    """B moved on the mask and nowhere else; A did not."""
    moved = 0
    for path, weight in trainer.weights.items():
        B = weight.detach().cpu()
        assert torch.equal(B[~trainer.masks[path]], trainer.run.initial_weights[path][~trainer.masks[path]])
        assert torch.isfinite(B).all()
        moved += int((B != trainer.run.initial_weights[path]).sum())
    assert moved > 0.8 * trainer.masks.num_selected
    assert fingerprint(projections(trainer.model, "default")) == trainer.projection.fingerprint


def check_run(trainer, base, *, inputs=None, tolerance: float = 0.0) -> None:
    """
    Train, save, and check the five invariants of a fresh adapter.

    Args:
        trainer ([`LoriTrainerMixin`]): before its first step, with masks over the whole model.
        base (`PreTrainedModel`): another copy of the base model, for plain PEFT to load the adapter on.
        inputs (`dict`, *optional*): the model inputs to compare logits on; by default some tokens.
        tolerance (`float`, *optional*): absolute, of the logits where they can't be equal.
    """
    witness, before = Witness(trainer), values_of(base_weights(trainer.model))
    A = {path: layer.lora_A["default"].weight.detach().clone() for path, layer in trainer.lora_layers.items()}
    drawn = {path: draw_projection(path, *a.shape, seed=trainer.projection.seed).to(a.dtype) for path, a in A.items()}
    trainer.train()
    trainer.save_model()

    # 1. A is what the seed says, and A and the base model are bit-identical.
    for path, layer in trainer.lora_layers.items():
        assert torch.equal(layer.lora_A["default"].weight.cpu(), drawn[path]), path
    after = base_weights(trainer.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name].cpu(), tensor) for name, tensor in before.items())

    # 2. B outside the mask is bit-identical, and inside it was trained.
    moved = 0
    for path, weight in trainer.weights.items():
        B, B0, mask = weight.detach().cpu(), trainer.run.initial_weights[path], trainer.masks[path]
        assert torch.equal(B[~mask], B0[~mask]), path
        moved += int((B != B0).sum())
    assert moved > 0.5 * trainer.masks.num_selected

    # 3. The mask is a plain top-K of the calibrated |B - B0|.
    (B0, dense0), (B1, _) = witness.seen["calibrating", "begin"], witness.seen["calibrating", "end"]
    expected = top_k({path: B1[path] - B0[path] for path in B0}, trainer.args.sparsity)
    assert all(torch.equal(trainer.masks[path], mask) for path, mask in expected.items())

    # 4. B is exactly B0 when the adaptation begins, and so is whatever is trained besides.
    B2, dense2 = witness.seen["adapting", "begin"]
    assert all(torch.equal(B2[path], trainer.run.initial_weights[path]) for path in B2)
    assert dense0.keys() == dense2.keys() and all(torch.equal(dense2[name], value) for name, value in dense0.items())

    # 5. Plain PEFT computes the same logits from the folder.
    plain = PeftModel.from_pretrained(base, str(Path(trainer.args.output_dir))).eval()
    inputs = inputs or {"input_ids": TOKENS}
    with torch.no_grad():
        there = {name: value.to(trainer.model.device, copy=True) for name, value in inputs.items()}
        expected = trainer.model.eval()(**there).logits.cpu()
        torch.testing.assert_close(plain(**inputs).logits, expected, rtol=1e-4, atol=max(tolerance, 1e-5))
