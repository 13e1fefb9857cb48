"""Time of one training step on SmolLM2-135M, 4 x 128 tokens, r = 32, seven projections, AdamW, float32.

    python benchmarks/step_time.py [--rounds 15] [--dropout 0.0]

Peers, interleaved in one process: the model with everything frozen (forward and input gradients), PEFT LoRA, the
calibration's step (A frozen, all of B trained), and at sparsity 0.9 the hook and the packed backend.
"""

import argparse

import torch
from common import PROJECTIONS, interleaved, report, summary
from peft import LoraConfig, get_peft_model
from quickstart import smollm2
from transformers import AutoModelForCausalLM

from lori_trl import LoriMasks
from lori_trl.method.layers import lora_layers
from lori_trl.method.projections import init_projections
from lori_trl.method.sparse import sparse_training


def make_step(kind: str, tokens: torch.Tensor, dropout: float):
    """Return a function that makes one training step of a kind, and the context that keeps it packed."""
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).train()
    model.config.use_cache = False
    context, optimizer = None, None
    if kind == "frozen":
        model.requires_grad_(False)
    else:
        config = LoraConfig(r=32, lora_alpha=64, lora_dropout=dropout, target_modules=PROJECTIONS)
        model = get_peft_model(model, config)
        if kind != "peft_lora":
            init_projections(model, "default", seed=0)
        if kind == "dense":
            context = sparse_training(model, "default", None)
        if kind in ("hook", "packed"):
            layers = lora_layers(model, "default")
            generator = torch.Generator().manual_seed(0)
            shapes = {path: layer.lora_B["default"].weight.shape for path, layer in layers.items()}
            saliency = {path: torch.rand(shape, generator=generator) for path, shape in shapes.items()}
            context = sparse_training(model, "default", LoriMasks.select(saliency, 0.9), kind)
        if context is not None:
            context.__enter__()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0)
    model.get_input_embeddings().register_forward_hook(lambda _, x, y: y.requires_grad_())

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step, context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dropout", type=float, default=0.0)
    options = parser.parse_args()
    tokens = torch.randint(0, 49152, (4, 128), generator=torch.Generator().manual_seed(0))
    kinds = ["frozen", "peft_lora", "dense", "hook", "packed"]
    made = {kind: make_step(kind, tokens, options.dropout) for kind in kinds}
    seconds = interleaved({kind: step for kind, (step, _) in made.items()}, options.rounds)
    results = {"dropout": options.dropout, "seconds": {kind: summary(times) for kind, times in seconds.items()}}
    median = {kind: figures["median"] for kind, figures in results["seconds"].items()}
    results["packed / peft_lora"] = median["packed"] / median["peft_lora"]
    results["dense / peft_lora"] = median["dense"] / median["peft_lora"]
    results["hook / peft_lora"] = median["hook"] / median["peft_lora"]
    extra = {kind: median[kind] - median["frozen"] for kind in kinds}
    results["extra over frozen: packed / peft_lora"] = extra["packed"] / extra["peft_lora"]
    results["over frozen"] = {kind: median[kind] / median["frozen"] for kind in kinds}
    report(f"step_time_dropout_{options.dropout}", results)


if __name__ == "__main__":
    main()
