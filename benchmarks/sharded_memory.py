"""What a device holds at the peak of a step under FSDP2, on paper: Llama-3-8B and 70B on 8, 64 and 256 devices.

    python benchmarks/sharded_memory.py

No weight is allocated: all tensors are fake, and so are the processes but this one. The model is sharded as accelerate
does it, a decoder layer at a time, and two steps of the calibration run (all of B, `hook`), with activations
checkpointed and PyTorch's `FSDPMemTracker` around them. It counts parameters, gradients, optimizer state, gathered
layers and activations; the first step makes the optimizer's state, the second has the peak. The adaptation with
`hook` has the same, and the mask. Every decoder layer adds the same to a peak: it is tracked with 2 and with 3 layers,
and the rest is added up.
"""

import argparse
import copy

import torch
import torch.distributed as dist
from common import report
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from lori_trl.method.layers import lora_layers
from lori_trl.method.projections import freeze_projections
from lori_trl.method.sharding import mask_shards
from lori_trl.recipes.base_configs import KNOWN_CONFIGS
from lori_trl.training.counting import count_parameters
from lori_trl.training.parallel_engines import Engine

MODELS = {
    "8B": KNOWN_CONFIGS["meta-llama/Meta-Llama-3-8B"],
    "70B": LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = LoraConfig(r=32, lora_alpha=64, target_modules=PROJECTIONS)
# What a collective sends and receives over a ring, of a tensor that is b bytes when whole: (n - 1) / n * b a device.
COLLECTIVES = {
    "all-gather": (torch.ops.c10d._allgather_base_.default, 0),
    "reduce-scatter": (torch.ops.c10d._reduce_scatter_base_.default, 1),
}


class Traffic(TorchDispatchMode):
    """Add up the bytes that each collective gathers or reduces."""

    def __init__(self):
        super().__init__()
        self.bytes = dict.fromkeys(COLLECTIVES, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        for name, (collective, whole) in COLLECTIVES.items():
            if function is collective:
                self.bytes[name] += args[whole].numel() * args[whole].element_size()
        return function(*args, **(kwargs or {}))


def shard(config: LlamaConfig, mesh: DeviceMesh):
    """Make a bfloat16 model with a float32 adapter, as PEFT does, and shard it."""
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM._from_config(config, dtype=torch.bfloat16), LORA)
    model.get_base_model().activation_checkpointing_enable()
    model.enable_input_require_grads()
    freeze_projections(model, "default")
    policy = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)}
    llama = model.get_base_model()
    for layer in llama.model.layers:
        fully_shard(layer, **policy)
    fully_shard(llama.model.embed_tokens, **policy)
    fully_shard([llama.model.norm, llama.lm_head], reshard_after_forward=False, **policy)
    fully_shard(model, **policy)
    return model.to_empty(device="cpu").train()


def track(config: LlamaConfig, devices: int, batch: int, length: int) -> dict[str, float]:
    """Return the GB at the peak of the second step, by kind, and the GB that a step sends and receives."""
    dist.init_process_group("fake", rank=0, world_size=devices, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (devices,))
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = shard(config, mesh)
            weights = {path: lora.lora_B["default"].weight for path, lora in lora_layers(model, "default").items()}
            mask_shards(weights, {path: torch.ones(B.shape, dtype=torch.bool) for path, B in weights.items()})
            optimizer = torch.optim.AdamW(weights.values(), lr=1e-4)
            tokens = torch.randint(0, config.vocab_size, (batch, length))
            tracker = FSDPMemTracker(model, optimizer)
            tracker.track_inputs((tokens,))
            with tracker:
                for step in range(2):
                    traffic = Traffic()
                    with traffic:
                        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
                        optimizer.step()
                        optimizer.zero_grad()
                    if step == 0:
                        tracker.reset_mod_stats()
            peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    finally:
        dist.destroy_process_group()
    kinds = {f"peak, {str(kind).rpartition('.')[2]}": size / 1e9 for kind, size in peak.items()}
    sent = {f"sent, {name}": size * (devices - 1) / devices / 1e9 for name, size in traffic.bytes.items()}
    return kinds | sent


def track_all_layers(config: LlamaConfig, *sizes: int) -> dict[str, float]:
    """Return what [`track`] does, for all layers of a model."""
    shallow = copy.deepcopy(config)
    figures = []
    for shallow.num_hidden_layers in (2, 3):
        figures.append(track(shallow, *sizes))
    more = config.num_hidden_layers - 2
    return {kind: two + more * (figures[1][kind] - two) for kind, two in figures[0].items() if two}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--devices", nargs="+", type=int, default=[8, 64, 256])
    options = parser.parse_args()
    results = {"batch": options.batch, "length": options.length, "rank": LORA.r}
    for name in options.models:
        counts = count_parameters(MODELS[name], LORA, 0.9)
        for devices in options.devices:
            held = Engine("FSDP2", devices).held(counts, 2, "hook")
            formula = {part: size / 1e9 for part, (size, _) in held.items() if not part.startswith("adaptation: grad")}
            results[f"{name}, {devices} devices"] = {
                "formula_gb": formula,
                "tracked_gb": track_all_layers(MODELS[name], devices, options.batch, options.length),
            }
    report("sharded_memory", results)


if __name__ == "__main__":
    main()
