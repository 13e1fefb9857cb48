"""What test_engines.py starts on two ranks: `accelerate launch ... run.py ENGINE FOLDER REFERENCES [PHASE]`.

With a phase, it makes the run that is killed in that phase. Without one, it makes all runs, and that one to its end.
"""

import gc
import os
import signal
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from cases import REFUSED, RUNS, make_trainer
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from transformers import TrainerCallback, training_args

from lori_trl import LoriSFTTrainer
from lori_trl.adapter import write
from lori_trl.method.selection import select_largest


def allow_cpus(engine: str) -> None:
    """
    Let accelerate shard over CPUs, and DeepSpeed start on them.

    `AcceleratorState` takes FSDP only where the processes belong to one of the accelerators in its list. The CPU is
    not among them, though gloo can do all that is needed. So the processes say here that they are GPUs', with gloo for
    a backend; ACCELERATE_TORCH_DEVICE=cpu puts every tensor on the CPU. DDP has an option for CPUs. DeepSpeed would
    first compile an operator that exchanges tensors through shared memory, and transformers wants a GPU for bfloat16.
    """
    if engine == "ddp":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif engine == "fsdp2":
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    else:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        training_args.is_torch_bf16_gpu_available = lambda: True


class Interrupted(Exception):
    pass


class End(TrainerCallback):
    """End a run after the third step of a phase: by a function."""

    def __init__(self, trainer: LoriSFTTrainer, phase: str, function):
        self.trainer, self.phase, self.function = trainer, phase, function

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.phase == self.phase and state.global_step == 3:
            self.function()


def interrupt() -> None:
    raise Interrupted


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def make(engine: str, name: str, folder: Path, references: Path) -> LoriSFTTrainer:
    trainer = make_trainer(name, folder, references)
    if engine == "zero3":  # no matrix of this model is so large that it would be sharded by itself
        settings = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        settings["stage3_param_persistence_threshold"] = 0
    return trainer


def run(engine: str, name: str, folder: Path, references: Path) -> None:
    if name.startswith("interrupted"):
        for phase in ("calibrating", "adapting"):
            trainer = make(engine, name, folder, references)
            if phase == "adapting" or trainer.masks is None:
                trainer.add_callback(End(trainer, phase, interrupt))
                try:
                    trainer.train(resume_from_checkpoint=any(folder.glob("**/trainer_state.json")))
                except Interrupted:
                    dist.barrier()
    trainer = make(engine, name, folder, references)
    trainer.train(resume_from_checkpoint=name.startswith(("interrupted", "killed")))
    trainer.save_model()


def run_to_be_killed(engine: str, folder: Path, references: Path, phase: str) -> None:
    trainer = make(engine, "killed", folder, references)
    trainer.add_callback(End(trainer, phase, kill))
    trainer.train(resume_from_checkpoint=any(folder.glob("**/trainer_state.json")))


class Code:
    """What runs when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def resume_from_code(engine: str, folder: Path, references: Path) -> None:
    """DeepSpeed's checkpoints are read as data: what is pickled in one is not run."""
    if dist.get_rank() == 0:
        for file in folder.glob("checkpoint-*/global_step*/*.pt"):
            torch.save({"module": Code(folder / "has_run")}, file)
    dist.barrier()
    try:
        make(engine, "interrupted", folder, references).train(resume_from_checkpoint=True)
    except ValueError as error:
        assert "names code that reading it would run" in str(error) and not (folder / "has_run").exists()
    else:
        raise AssertionError("the checkpoint was taken")


def refuse(engine: str, name: str, words: str, folder: Path, references: Path) -> None:
    """What can't be done is refused before training, with what to do instead."""
    try:
        make(engine, name, folder, references).train()
    except ValueError as error:
        assert words in str(error) and "Pass" in str(error)
    else:
        raise AssertionError(f"{engine} took {name}")


def select_from_shards() -> None:
    """Selection from shards equals that from whole tensors: ties, zeros, exclusion and uneven rows."""
    mesh = init_device_mesh("cpu", (2,))
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        whole = {f"m{i}": torch.randint(-3, 4, (5 + i, 3), generator=generator).float() for i in range(4)}
        exclude = {name: torch.rand(t.shape, generator=generator) < 0.2 for name, t in whole.items()}
        k = int(torch.randint(1, 60, (), generator=generator))
        sharded = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in whole.items()}
        expected, expected_threshold = select_largest(whole, k, exclude)
        masks, threshold = select_largest(sharded, k, exclude)
        assert threshold == expected_threshold
        assert all(torch.equal(masks[name], expected[name]) for name in whole), (seed, k)


if __name__ == "__main__":
    engine, folder, references, *phase = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:]
    allow_cpus(engine)
    # What takes longer than these short runs: pictures, and looking for garbage in all that was imported.
    write.draw_density = lambda *_: False
    gc.freeze()
    if phase:
        run_to_be_killed(engine, folder / "killed", references, *phase)
    else:
        for name in RUNS[engine]:
            run(engine, name, folder / name, references)
        for name, words in REFUSED[engine].items():
            refuse(engine, name, words, folder / name, references)
        if engine.startswith("zero"):
            resume_from_code(engine, folder / "interrupted", references)
        select_from_shards()
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "passed").touch()
    os._exit(0)  # gloo's threads may outlive the interpreter
