"""What test_engines.py starts on two ranks: `accelerate launch ... run.py ENGINE FOLDER REFERENCES`."""

import os
import sys
import time
from pathlib import Path

import deepspeed
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from cases import RUNS, make_trainer


def allow_cpus(engine: str) -> None:
    """
    Let accelerate shard over CPUs, and DeepSpeed start on them.

    `AcceleratorState` takes FSDP only where the processes are of one of the accelerators in its list; that of the CPU
    is not among them, though gloo can do all that is needed. So the processes say here that they are GPUs', with
    gloo for a backend; ACCELERATE_TORCH_DEVICE=cpu puts every tensor on the CPU. DeepSpeed would first compile an
    operator that exchanges CPU tensors through shared memory.
    """
    if engine in ("ddp", "fsdp2"):
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def run(engine: str, name: str, folder: Path, references: Path) -> None:
    trainer = make_trainer(name, folder / name, references)
    if engine == "zero3":  # no matrix of this model is large enough to be sharded by itself
        settings = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        settings["stage3_param_persistence_threshold"] = 0
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    engine, folder, references = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    allow_cpus(engine)
    for name in sys.argv[4:] or RUNS[engine]:
        start = time.time()
        run(engine, name, folder, references)
        print(f"{name}: {time.time() - start:.1f} s", flush=True)
    dist.barrier()
    if dist.get_rank() == 0:
        Path(folder, "passed").touch()
    os._exit(0)  # gloo's threads may outlive the interpreter
