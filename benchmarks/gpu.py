"""
Time and memory of one training step at the shapes of Llama-3, with random weights: nothing is downloaded.

    python benchmarks/gpu.py [--shapes 1B 3B 8B] [--batch 8] [--length 512] [--compile] [--rounds 10]
    python benchmarks/gpu.py --device cpu --shapes tiny --batch 2 --length 16 --rounds 2

Peers: the model with everything frozen (forward and input gradients), PEFT LoRA, the calibration's step (A frozen, all
of B trained), and at sparsity 0.9 the hook and the packed backend. r = 32, seven projections, AdamW, bfloat16 weights
and float32 B. The clock is the device's own. `--compile` measures each of them compiled, too. The operators that take
most of the packed step are listed. It ends in one JSON in benchmarks/results/ and a table beside it, for docs/.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
from common import PROJECTIONS, RESULTS, report
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from lori_trl import LoriMasks
from lori_trl.method.layers import lora_layers
from lori_trl.method.projections import init_projections
from lori_trl.method.sparse import sparse_training

KINDS = ("frozen", "peft_lora", "dense", "hook", "packed")
# Of the configs on the Hub: hidden size, intermediate size, layers, heads, key-value heads, vocabulary.
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 256),
    "1B": (2048, 8192, 16, 32, 8, 128256),
    "3B": (3072, 8192, 28, 24, 8, 128256),
    "8B": (4096, 14336, 32, 32, 8, 128256),
}


def make_base(shape: str, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(**dict(zip((*names, "vocab_size"), SHAPES[shape], strict=True)), use_cache=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)


class Clock:
    """Milliseconds and peak bytes of a function on a device: by its own events where it has them."""

    def __init__(self, device: torch.device):
        self.device, self.module = device, getattr(torch, device.type, None)

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            self.module.synchronize()

    def time(self, run: Callable[[], None]) -> float:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end)
        self.synchronize()
        begin = time.perf_counter()
        run()
        self.synchronize()
        return 1000 * (time.perf_counter() - begin)

    def peak(self) -> int | None:
        return self.module.max_memory_allocated() if self.device.type == "cuda" else None

    def forget(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def measure(kind: str, shape: str, options: argparse.Namespace, compiled: bool) -> dict:
    """Build one contestant, warm it up, time it, and let it go: an 8B model stands in memory once."""
    device, clock = torch.device(options.device), Clock(torch.device(options.device))
    clock.forget()
    torch.manual_seed(0)
    model = make_base(shape, device, options.dtype)
    context = None
    if kind == "frozen":
        model.requires_grad_(False)
    else:
        model = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, target_modules=PROJECTIONS))
        if kind != "peft_lora":
            init_projections(model, "default", seed=0)
            masks = None
            if kind != "dense":
                layers = lora_layers(model, "default")
                draw = torch.Generator().manual_seed(0)
                sizes = {path: layer.lora_B["default"].weight.shape for path, layer in layers.items()}
                masks = LoriMasks.select({path: torch.rand(size, generator=draw) for path, size in sizes.items()}, 0.9)
            context = sparse_training(model, "default", masks, "hook" if kind == "hook" else "packed")
            context.__enter__()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0) if trained else None
    if options.activation_checkpointing:
        model.gradient_checkpointing_enable()
    model.get_input_embeddings().register_forward_hook(lambda _, x, y: y.requires_grad_())
    run = torch.compile(model) if compiled else model
    tokens = torch.randint(SHAPES[shape][-1], (options.batch, options.length), device=device)

    def step() -> None:
        run(input_ids=tokens, labels=tokens).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(3):
        step()
    times = sorted(clock.time(step) for _ in range(options.rounds))
    found = {
        "milliseconds": {"median": statistics.median(times), "least": times[0], "most": times[-1]},
        "peak_bytes": clock.peak(),
        "trained": sum(parameter.numel() for parameter in trained),
    }
    if kind == "packed" and not compiled:
        found["operators"] = operators(step, device)
    if context is not None:
        context.__exit__(None, None, None)
    return found


def operators(step: Callable[[], None], device: torch.device) -> list[dict]:
    """Return the twelve operators that take most of a step, in milliseconds of the device's."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiled:
        step()
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    longest = sorted(profiled.key_averages(), key=lambda each: -getattr(each, own))[:12]
    return [{"name": each.key, "calls": each.count, "milliseconds": getattr(each, own) / 1000} for each in longest]


def attempt(kind: str, shape: str, options: argparse.Namespace, compiled: bool) -> dict:
    """Measure, or say that the memory did not suffice: such a row is a result, too."""
    try:
        return measure(kind, shape, options, compiled)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).split(". ")[0]}


def table(results: dict) -> str:
    """Return the figures as a table in Markdown."""
    lines = ["| shape | step | ms, median | peak GB | trained |", "| --- | --- | ---: | ---: | ---: |"]
    for name, each in results["steps"].items():
        shape, _, step = name.partition(" ")
        if "out_of_memory" in each:
            lines.append(f"| {shape} | {step} | out of memory | | |")
            continue
        peak = "" if each["peak_bytes"] is None else f"{each['peak_bytes'] / 1e9:.1f}"
        lines.append(f"| {shape} | {step} | {each['milliseconds']['median']:.1f} | {peak} | {each['trained']:,} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = torch.accelerator.current_accelerator()
    parser.add_argument("--device", default=str(there or "cpu"))
    parser.add_argument("--shapes", nargs="+", default=["1B", "3B", "8B"], choices=SHAPES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16", type=lambda name: getattr(torch, name))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--name", default="gpu", help="of the files in benchmarks/results")
    options = parser.parse_args()
    steps = {}
    for shape in options.shapes:
        for compiled in (False, True) if options.compile else (False,):
            for kind in KINDS:
                name = f"{shape} {kind}{' compiled' if compiled else ''}"
                steps[name] = attempt(kind, shape, options, compiled)
    device = torch.device(options.device)
    results = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "settings": {name: str(value) for name, value in vars(options).items()},
        "steps": steps,
    }
    report(options.name, results)
    text = table(results)
    print(text)
    (RESULTS / f"{options.name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
