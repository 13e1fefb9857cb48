"""Adapters' files changed by hand, with checksums that fit: so that tests reach what lies behind these."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from lori_trl.adapter.record import LoriRecord
from lori_trl.adapter.record_fields import Counts, TaskRecord
from lori_trl.adapter.safetensors import hash_tensor


def read_tensors(file: Path) -> dict:
    """Read a file that will be written anew: older safetensors write into the very file that `load_file` maps."""
    return load(file.read_bytes())


def change_record(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the values of a `lori_config.json`."""
    file = folder / "lori_config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(seal(values), indent=2) + "\n")


def seal(values: dict) -> dict:
    """Put a fitting checksum behind a record's values."""
    values = {name: value for name, value in values.items() if name != "sha256"}
    return {**values, "sha256": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()}


def change_config(folder: Path, **changes) -> None:
    """Change an `adapter_config.json`."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the tensors of an adapter, and the record with them."""
    file = folder / "adapter_model.safetensors"
    tensors = read_tensors(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    hashes = {name: hash_tensor(tensor) for name, tensor in sorted(tensors.items())}
    change_record(folder, lambda values: values.update(tensors=hashes))


def change_compact(file: Path, change: Callable[[dict, dict], object]) -> None:
    """Change a compact file's metadata and tensors, in place."""
    metadata, tensors = _read_compact(file)
    change(metadata, tensors)
    _write_compact(file, metadata, tensors, fits=True)


def mutate_compact(file: Path, mutate: Callable[[dict], object], fits: bool) -> None:
    """Put what `mutate` returns in the place of a compact file's metadata; its checksums fit or are the old ones."""
    metadata, tensors = _read_compact(file)
    _write_compact(file, mutate(metadata), tensors, fits)


def _read_compact(file: Path) -> tuple[dict, dict]:
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["lori_compact"]), read_tensors(file)


def _write_compact(file: Path, metadata: object, tensors: dict, fits: bool) -> None:
    if fits and isinstance(metadata, dict):
        if isinstance(metadata.get("lori_config"), dict):
            metadata["lori_config"] = seal(metadata["lori_config"])
        metadata.pop("sha256", None)
        digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
        for name in sorted(tensors):
            digest.update(f"{name} {hash_tensor(tensors[name])}\n".encode())
        metadata["sha256"] = digest.hexdigest()
    save_file(tensors, file, metadata={"lori_compact": json.dumps(metadata)})


def mutate_masks(file: Path, mutate: Callable[[dict], object], fits: bool) -> None:
    """Put what `mutate` returns in the place of a mask file's metadata; its checksum fits or is the old one."""
    with safe_open(file, framework="pt") as opened:
        values = json.loads(opened.metadata()["lori_masks"])
    packed = read_tensors(file)
    values = mutate(values)
    if fits and isinstance(values, dict):
        values.pop("sha256", None)
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
        for path in sorted(packed):
            digest.update(path.encode() + packed[path].numpy().tobytes())
        values["sha256"] = digest.hexdigest()
    save_file(packed, file, metadata={"lori_masks": json.dumps(values)})


def write_record(folder: Path, masks: list, projection) -> None:
    """Write the record of an adapter whose other files are there: A, B and masks."""
    tensors = load_file(folder / "adapter_model.safetensors")
    lora_B = sum(tensor.numel() for name, tensor in tensors.items() if ".lora_B." in name)
    record = LoriRecord(
        task=masks[-1].task,
        phase="adapting",
        variant="LoRI-S",
        sparsity=masks[-1].sparsity,
        granularity=masks[-1].granularity,
        threshold=None,
        projection=projection,
        calibration=None,
        counts=Counts(lora=sum(map(torch.numel, tensors.values())), lora_B=lora_B, selected=masks[-1].num_selected),
        tasks=tuple(TaskRecord(mask.task, mask.num_selected) for mask in masks),
        versions={},
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    sealed = record.sealed(config, {name: hash_tensor(tensor) for name, tensor in tensors.items()})
    (folder / "lori_config.json").write_text(sealed.to_json())
