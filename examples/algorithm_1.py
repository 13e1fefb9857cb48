"""LoRI's Algorithm 1 in plain PyTorch: no PEFT, no TRL, none of this package.

    python examples/algorithm_1.py

A test holds that `LoriSFTTrainer` computes the same losses, the same mask and the same B. The page docs/method.md goes
through it line by line.
"""

import torch
from torch.nn import functional as F


def algorithm_1(model, A, scaling, calibration, adaptation, sparsity, rates, Optimizer):
    """
    Train one task. `A`: layer's name -> (rank, in_features); `calibration`, `adaptation`: batches of `input_ids`,
    `attention_mask` and `labels`; `rates`: the learning rate of each phase. Returns the mask, B and all losses.
    """
    layers = {name: layer for name, layer in model.named_modules() if name in A}
    # Line 3: B starts at zero, so that the model starts as the base model.
    B = {name: torch.zeros(layer.weight.shape[0], len(A[name]), requires_grad=True) for name, layer in layers.items()}
    # Equation 1: y = W x + scaling * B A x. W and A are frozen.
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, x, y, name=name: y + x[0] @ A[name].T @ B[name].T * scaling)

    def train(batches, rate, masks=None):
        optimizer, losses = Optimizer(B.values(), rate), []
        for batch in batches:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            for name in B if masks else ():
                B[name].grad *= masks[name]  # line 18: only the mask's entries move
            optimizer.step()
            losses.append(loss.item())
        return losses

    # Lines 6 to 10: calibrate, which trains all of B.
    losses = train(calibration, rates[0])
    # Lines 11 to 13, equation 2: over the whole model, keep the (1 - sparsity) share of entries that are largest.
    sizes = torch.cat([B[name].detach().abs().flatten() for name in sorted(B)])
    kept = sizes.sort(descending=True, stable=True).indices[: int((1 - sparsity) * len(sizes) + 1e-6)]
    chosen = torch.zeros(len(sizes), dtype=torch.bool).index_fill(0, kept, True)
    parts = chosen.split([B[name].numel() for name in sorted(B)])
    masks = {name: part.view_as(B[name]) for name, part in zip(sorted(B), parts, strict=True)}
    # Line 14: B goes back to zero.
    for name in B:
        B[name].data.zero_()
    # Lines 16 to 20: adapt, on the mask alone.
    losses += train(adaptation, rates[1], masks)
    return masks, {name: b.detach() for name, b in B.items()}, losses


if __name__ == "__main__":
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).requires_grad_(False)
    A = {  # line 3: A is drawn once, and never trained
        name: torch.randn(4, layer.in_features) / (3 * layer.in_features) ** 0.5
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }
    ids = torch.arange(64).repeat(8, 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    masks, B, losses = algorithm_1(model, A, 2.0, [batch] * 10, [batch] * 20, 0.9, (0.01, 0.05), torch.optim.AdamW)
    trained = sum(int(mask.sum()) for mask in masks.values())
    print(f"calibration: loss {losses[0]:.3f} -> {losses[9]:.3f}")
    print(f"mask: {trained:,} of {sum(b.numel() for b in B.values()):,} entries of B")
    print(f"adaptation: loss {losses[10]:.3f} -> {losses[-1]:.3f}")
