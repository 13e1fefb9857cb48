"""Exact mask of 44 million entries: B of Llama-3-8B, r = 32, 224 matrices, float32.

    python benchmarks/selection.py [--rounds 15] [--busy 0]

Peer, interleaved in one process: `torch.topk` over the concatenation, and the masks made from its threshold. `--busy`
says how many other processes are at work meanwhile.
"""

import argparse
import multiprocessing
import resource

import torch
from common import interleaved, report, summary

from lori_trl import LoriMasks

SHAPES = {
    "self_attn.q_proj": 4096,
    "self_attn.k_proj": 1024,
    "self_attn.v_proj": 1024,
    "self_attn.o_proj": 4096,
    "mlp.gate_proj": 14336,
    "mlp.up_proj": 14336,
    "mlp.down_proj": 4096,
}
SPARSITY = 0.9


def make_B() -> dict[str, torch.Tensor]:
    """Return random B, scaled differently by layer, as calibration leaves them."""
    generator = torch.Generator().manual_seed(0)
    B = {}
    for layer in range(32):
        for name, out_features in SHAPES.items():
            tensor = torch.empty(out_features, 32).normal_(generator=generator)
            B[f"model.layers.{layer}.{name}"] = tensor.mul_(1e-4 * (1 + layer / 16))
    return B


def by_topk(B: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Do it the usual way."""
    flat = torch.cat([tensor.abs().flatten() for tensor in B.values()])
    threshold = torch.topk(flat, flat.numel() // 10, sorted=False).values.min()
    return {path: tensor.abs() >= threshold for path, tensor in B.items()}


def work() -> None:
    """Multiply matrices for ever, with one thread."""
    torch.set_num_threads(1)
    matrix = torch.rand(512, 512)
    while True:
        matrix @ matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--busy", type=int, default=0)
    options = parser.parse_args()
    B = make_B()
    B_bytes = sum(4 * tensor.numel() for tensor in B.values())
    LoriMasks.select({"warm.up": torch.rand(2000, 300)}, SPARSITY)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    masks = LoriMasks.select(B, SPARSITY)
    on_top = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    expected = by_topk(B)
    equal = all(torch.equal(masks[path], expected[path]) for path in B)
    runs = {"lori_trl": lambda: LoriMasks.select(B, SPARSITY), "topk": lambda: by_topk(B)}
    others = [multiprocessing.get_context("spawn").Process(target=work, daemon=True) for _ in range(options.busy)]
    for other in others:
        other.start()
    seconds = {name: summary(times) for name, times in interleaved(runs, options.rounds).items()}
    results = {
        "entries": masks.numel,
        "selected": masks.num_selected,
        "equal to topk's masks": equal,
        "seconds": seconds,
        "lori_trl / topk": seconds["lori_trl"]["median"] / seconds["topk"]["median"],
        "other processes at work": options.busy,
        "peak memory on top of B / bytes of B": on_top / B_bytes,
    }
    report(f"selection_busy_{options.busy}" if options.busy else "selection", results)


if __name__ == "__main__":
    main()
