"""The launch files that are shipped: how accelerate starts a run on several devices, and what each of them holds."""

from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.table import Table

from ..inputs.files import describe_fault
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
            name = {"NO": "one device", "FSDP": "FSDP2"}.get(launch["distributed_type"], "DDP")
            if launch["distributed_type"] == "DEEPSPEED":
                name = f"ZeRO-{launch['deepspeed_config']['zero_stage']}"
            return cls(name, 1 if name == "one device" else num_processes or launch["num_processes"])
        except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"`{file}` is no launch file ({describe_fault(error)}). `accelerate config` writes one. Correct it, "
                "or pass the name of a shipped one."
            ) from error

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

        With P parameters of the base, N = A + B of the adapter in float32, and T trained ones (all of B while
        calibrating and with the `hook` backend, else the selected entries):

            weights = base_bytes * P,  adapter = 4 N,  gradients and optimizer = 12 T (AdamW's two moments),
            positions = 8 T (`packed`),  mask = B (`hook`)

        DeepSpeed in bfloat16: adapter = 2 N, gradients and optimizer = 14 T (with a float32 copy of what is trained).

        Args:
            counts (`ParameterCounts`): of the run.
            base_bytes (`float`): bytes a parameter of the base: 4 float32, 2 bfloat16.
            backend (`str`): `"packed"` or `"hook"`.
        """
        zero, sparse = self.name.startswith("ZeRO"), counts.sparsity > 0
        state_bytes = 14 if zero else 12
        trained = counts.selected if backend == "packed" else counts.lora_B
        parts = {
            "base weights": (base_bytes * counts.base, self.shards_weights),
            "adapter weights": ((2 if zero else 4) * counts.lora, self.shards_weights),
            "calibration: gradients, optimizer": (state_bytes * counts.lora_B * sparse, self.shards_state),
            "adaptation: gradients, optimizer": (state_bytes * trained, self.shards_state),
        }
        if sparse and backend == "packed":
            parts["adaptation: positions"] = (8 * counts.selected, False)
        elif sparse:
            parts["adaptation: mask"] = (counts.lora_B, self.name == "FSDP2")
        return {name: (size / (self.devices if share else 1), share) for name, (size, share) in parts.items()}

    def table(self, counts: ParameterCounts, base_bytes: float, backend: str) -> Table:
        """Return what is sharded and what a device holds as a table for the terminal."""
        where = self.name if self.devices == 1 else f"each of {self.devices} devices under {self.name}"
        table = Table(title=f"{where}, before activations and gathered layers", title_justify="left")
        table.add_column("GB")
        table.add_column("holds", justify="right")
        table.add_column("which is")
        for name, (size, share) in self.held(counts, base_bytes, backend).items():
            table.add_row(name, f"{size / 1e9:,.3f}", f"a share of 1/{self.devices}" if share else "whole")
        return table
