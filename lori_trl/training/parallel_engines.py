"""What spreads a run over devices: the launch files that are shipped, what each engine holds, and what it can't do."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import PeftModel
from rich.table import Table
from torch import Tensor

from ..inputs.files import describe_fault
from ..method.sharding import engine_dtype
from .config import LoriArguments
from .counting import ParameterCounts

_FOLDER = Path(__file__).parent / "accelerate_configs"
_NAMES_OF_TRL = {"multi_gpu": "ddp", "single_gpu": "single"}


def find_launch_file(name_or_path: str) -> Path:
    """
    Find a launch file: a path, or the name of a shipped one, TRL's names for them too.

    Raises:
        `FileNotFoundError`: neither exists.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    shipped = {file.stem: file for file in sorted(_FOLDER.glob("*.yaml"))}
    name = _NAMES_OF_TRL.get(name_or_path, name_or_path)
    if name not in shipped:
        raise FileNotFoundError(
            f"`--accelerate_config {name_or_path}` is neither a file nor a shipped launch file. Shipped are "
            f"{', '.join(shipped)}. Pass one of these, or a file that `accelerate config` wrote."
        )
    return shipped[name]


@dataclass
class Engine:
    """
    What spreads a run over devices.

    Args:
        name (`str`): `"one device"`, `"DDP"`, `"FSDP2"`, `"ZeRO-2"` or `"ZeRO-3"`.
        devices (`int`): over how many.
    """

    name: str
    devices: int

    @classmethod
    def from_launch_file(cls, file: Path, num_processes: int | None = None) -> "Engine":
        """
        Read a launch file; `num_processes` overrides its number of devices.

        Raises:
            `ValueError`: it is none.
        """
        try:
            launch = yaml.safe_load(file.read_text(encoding="utf-8"))
            kind = launch["distributed_type"]
            name = _engine_name(kind, launch["deepspeed_config"]["zero_stage"] if kind == "DEEPSPEED" else None)
            return cls(name, 1 if name == "one device" else num_processes or launch["num_processes"])
        except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"`{file}` is no launch file ({describe_fault(error)}). `accelerate config` writes one. Correct it, "
                "or pass the name of a shipped one."
            ) from error

    @classmethod
    def of(cls, accelerator: Accelerator) -> "Engine":
        """Return the engine of a run that has begun."""
        plugin = accelerator.state.deepspeed_plugin
        stage = None if plugin is None else plugin.zero_stage
        return cls(_engine_name(accelerator.distributed_type.value, stage), accelerator.num_processes)

    @property
    def shards_weights(self) -> bool:
        return self.name in ("FSDP2", "ZeRO-3")

    @property
    def shards_state(self) -> bool:
        """Whether gradients and optimizer state are sharded."""
        return self.shards_weights or self.name == "ZeRO-2"

    def held(self, counts: ParameterCounts, base_bytes: float, backend: str) -> dict[str, tuple[float, bool]]:
        """
        Return what a device holds before activations and gathered layers: part -> bytes, and whether it is a share.

        With P parameters of the base, N = A + B of the adapter in float32, D that are trained besides B, and T that
        are trained on the mask (all of B while calibrating and with `hook`, else the selected entries):

            weights = base_bytes * P,  adapter = 4 (N + D),  gradients and AdamW's two moments = 12 (T + D),
            values and their positions = 4 T + 8 T (`packed`),  mask = B (`hook`)

        DeepSpeed in bfloat16: adapter = 2 (N + D), values = 2 T, gradients and moments = 14 (T + D), with a float32
        copy of what is trained.

        Args:
            counts ([`ParameterCounts`]): of the run.
            base_bytes (`float`): bytes a parameter of the base: 4 float32, 2 bfloat16, 0.56 NF4.
            backend (`str`): `"packed"` or `"hook"`.
        """
        weight_bytes, state_bytes = self._bytes()
        parts: dict[str, tuple[float, bool]] = {
            "base weights": (base_bytes * counts.base, self.shards_weights),
            "adapter weights": (weight_bytes * (counts.lora + counts.dense), self.shards_weights),
        }
        if counts.calibrated:
            all_of_B = state_bytes * (counts.lora_B + counts.dense)
            parts["calibration: gradients, optimizer"] = (all_of_B, self.shards_state)
        for name, (size, share) in self._of_adaptation(counts.lora_B, counts.selected, counts.dense, backend).items():
            parts[f"adaptation: {name}"] = (size, share)
        return {name: (self._here(*part), part[1]) for name, part in parts.items()}

    def adaptation_bytes(self, density: float, backend: str) -> float:
        """Return what a device holds for an entry of B in the adaptation, in bytes, where a share of B is trained."""
        return sum(self._here(*part) for part in self._of_adaptation(1, density, 0, backend).values())

    def _bytes(self) -> tuple[int, int]:
        """Return the bytes of a weight of the adapter, and of the gradient and optimizer state of a trained one."""
        return (2, 14) if self.name.startswith("ZeRO") else (4, 12)

    def _of_adaptation(self, lora_B: int, selected: float, dense: int, backend: str) -> dict[str, tuple[float, bool]]:
        """Return what the adaptation holds over all devices: part -> bytes, and whether they share it."""
        weight_bytes, state_bytes = self._bytes()
        trained = selected if backend == "packed" else lora_B
        parts: dict[str, tuple[float, bool]] = {
            "gradients, optimizer": (state_bytes * (trained + dense), self.shards_state)
        }
        if selected < lora_B and backend == "packed":
            parts["values"] = (weight_bytes * selected, self.shards_weights)
            parts["positions"] = (8 * selected, False)
        elif selected < lora_B:
            parts["mask"] = (lora_B, self.name == "FSDP2")
        return parts

    def _here(self, size: float, is_share: bool) -> float:
        return size / self.devices if is_share else size

    def table(self, counts: ParameterCounts, base_bytes: float, backend: str) -> Table:
        """Return what is sharded, what a device holds, and its peak as a table for the terminal."""
        where = self.name if self.devices == 1 else f"each of {self.devices} devices under {self.name}"
        table = Table(title=f"{where}, before activations and gathered layers", title_justify="left")
        table.add_column("GB")
        table.add_column("holds", justify="right")
        table.add_column("which is")
        held = self.held(counts, base_bytes, backend)
        for name, (size, share) in held.items():
            table.add_row(name, f"{size / 1e9:,.3f}", f"a share of 1/{self.devices}" if share else "whole")
        phases = ("calibration", "adaptation")
        in_phase = {phase: sum(size for name, (size, _) in held.items() if name.startswith(phase)) for phase in phases}
        highest = max(phases, key=lambda phase: in_phase[phase])
        weights = sum(size for name, (size, _) in held.items() if name.endswith(" weights"))
        table.add_section()
        table.add_row(f"at the peak, in the {highest}", f"{(weights + in_phase[highest]) / 1e9:,.3f}", "")
        return table


def _engine_name(distributed_type: str, zero_stage: int | None) -> str:
    if distributed_type == "DEEPSPEED":
        return f"ZeRO-{zero_stage}"
    return {"NO": "one device", "FSDP": "FSDP2"}.get(distributed_type, "DDP")


def check_engine(
    accelerator: Accelerator,
    model: PeftModel,
    args: LoriArguments,
    *,
    calibrate: bool,
    initial_weights: Mapping[str, Tensor],
) -> None:
    """
    Refuse, before training, what the engine of a run can't do.

    Args:
        accelerator (`Accelerator`): knows the engine.
        model (`PeftModel`): what is trained.
        args ([`LoriArguments`]): the run's arguments.
        calibrate (`bool`): whether both phases are ahead.
        initial_weights (`Mapping[str, Tensor]`): module path -> B before training.

    Raises:
        `ValueError`: with what to do instead.
    """
    if accelerator.parallelism_config is not None:
        _check_mesh(accelerator.parallelism_config)
    if accelerator.distributed_type == DistributedType.FSDP:
        _check_fsdp(accelerator.state, packed_later=calibrate and args.sparse_backend == "packed")
        _check_head(model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _check_zero(accelerator.state, args, calibrate)
        _check_rounding(accelerator, initial_weights)


def _check_mesh(config: ParallelismConfig) -> None:
    if config.total_size > config.dp_shard_size:
        raise ValueError(
            "The launch file's `parallelism_config` splits the devices in more ways than one. Allowed is sharding "
            "over all of them, `parallelism_config_dp_shard_size`. Take the others out."
        )


def _check_fsdp(state: AcceleratorState, packed_later: bool) -> None:
    if state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(
            "`fsdp_version: 1` flattens a layer's parameters into one, frozen and trained ones together. Allowed is "
            "2. Pass `--accelerate_config fsdp2`, or set `fsdp_version: 2` in your launch file."
        )
    if state.fsdp_plugin.activation_checkpointing:
        raise ValueError(
            "`fsdp_activation_checkpointing: true` in the launch file would wrap the layers anew in each phase. "
            "Allowed is false. Set it so, and `activation_checkpointing=True` in the trainer's arguments."
        )
    if packed_later:
        raise ValueError(
            "`sparse_backend='packed'` without masks: FSDP2 shards the parameters that are there when training "
            "begins, and packed values come to be after the calibration. Allowed with FSDP2 is 'hook'. Pass "
            "`sparse_backend='hook'`, or the masks of an earlier calibration as `mask_name_or_path`."
        )


def _check_head(model: PeftModel) -> None:
    head = model.get_output_embeddings()
    if head is not None and any(weight.requires_grad for weight in head.parameters()):
        raise ValueError(
            "The output embeddings are trained, by `modules_to_save` or `trainable_token_indices`. TRL 1.16 reads "
            "their weight whole, and under FSDP2 nothing adds up its gradient over the devices. Allowed there are "
            "other modules. Pass an adapter without them, or use DDP or DeepSpeed."
        )


def _check_zero(state: AcceleratorState, args: LoriArguments, calibrate: bool) -> None:
    if state.deepspeed_plugin.zero_stage == 3 and args.sparse_backend == "packed":
        raise ValueError(
            "`sparse_backend='packed'` reads B outside of its own module, where ZeRO-3 keeps it partitioned. Allowed "
            "with ZeRO-3 is 'hook'. Pass `sparse_backend='hook'`, or use FSDP2 or ZeRO-2."
        )
    if calibrate and args.calibration_method == "gradient":
        raise ValueError(
            "`calibration_method='gradient'` looks at the gradients of every matrix, and DeepSpeed hands its "
            "optimizer flat parts of them. Allowed with DeepSpeed are 'train' and 'random'. Pass one of these, or use "
            "FSDP2."
        )


def _check_rounding(accelerator: Accelerator, initial_weights: Mapping[str, Tensor]) -> None:
    dtype = engine_dtype(accelerator)
    if any((B.to(dtype) != B).any() for B in initial_weights.values()):
        raise ValueError(
            f"DeepSpeed would round the adapter to {dtype}, and with it the entries of earlier tasks. Allowed is an "
            "adapter that is in this type already, or training in float32. Use FSDP2, which leaves the adapter in "
            "float32, or pass `--mixed_precision no`."
        )
