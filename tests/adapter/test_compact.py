"""The compact form: small, exact, and suspicious of what it reads."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from files_by_hand import change_compact, change_record, change_tensors, read_tensors
from safetensors.torch import load_file
from tiny import make_llama, make_trainer, trained_adapter

from lori_trl import LoriMasks, cli, load_lori_adapter
from lori_trl.adapter import compact_file
from lori_trl.adapter.adapter_contents import Contents
from lori_trl.adapter.compact_file import read_compact, write_compact
from lori_trl.adapter.mask_files import MasksMetadata
from lori_trl.adapter.record import LoriRecord, read_record
from lori_trl.adapter.record_fields import Counts, TaskRecord
from lori_trl.compact import expand, export_compact
from lori_trl.method.layers import tensor_name
from lori_trl.method.projections import Projection, draw_projection, fingerprint

GOLDEN = Path(__file__).parents[1] / "golden"

RESTORED = ["adapter_config.json", "adapter_model.safetensors", "lori_config.json", "masks/code.safetensors"]


@pytest.fixture
def folder(tmp_path) -> Path:
    return shutil.copytree(trained_adapter(), tmp_path / "code-lori-s")


def same(mine: Path, other: Path) -> bool:
    """Compare files; PEFT writes target modules in any order."""
    if mine.suffix != ".json":
        return mine.read_bytes() == other.read_bytes()
    values = [json.loads(file.read_text()) for file in (mine, other)]
    for value in values:
        value.get("target_modules", []).sort()
    return values[0] == values[1]


def test_the_plain_files_come_back_byte_for_byte(folder, tmp_path):
    file = export_compact(folder, tmp_path / "code.safetensors")
    expand(file, tmp_path / "again")
    for name in [*RESTORED, "recipe.yaml"]:
        assert same(tmp_path / "again" / name, folder / name), name
    assert not {name for name in load_file(file) if "lora_A" in name}
    assert export_compact(folder, tmp_path / "twice").read_bytes() == file.read_bytes()
    with pytest.raises(FileExistsError, match="exists.*overwrite=True"):
        export_compact(tmp_path / "again", file)
    export_compact(tmp_path / "again", file, overwrite=True)


def test_it_loads_as_it_is(folder, tmp_path):
    file = export_compact(folder, tmp_path / "code.safetensors")
    model, plain = (load_lori_adapter(make_llama(), source) for source in (file, folder))
    assert model.lori_masks == plain.lori_masks
    assert LoriMasks.from_pretrained(file) == LoriMasks.from_pretrained(folder)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_entries_outside_every_mask_and_negative_zeros_are_kept(folder, tmp_path):
    state = read_tensors(folder / "adapter_model.safetensors")
    name = next(name for name in state if "lora_B" in name)
    state[name] = torch.randn_like(state[name])
    state[name][0] = -0.0
    change_tensors(folder, lambda tensors: tensors.update(state))
    expand(export_compact(folder, tmp_path / "file"), tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert torch.equal(again[name].view(torch.int32), state[name].view(torch.int32))


def test_several_tasks_and_a_projection_without_a_seed(folder, tmp_path):
    model = load_lori_adapter(make_llama(), folder, is_trainable=True)
    trainer = make_trainer(tmp_path / "two", model=model, task_name="safety")
    trainer.train()
    trainer.save_model()
    change_record(tmp_path / "two", lambda values: values["projection"].update(seed=None, init=None))
    file = export_compact(tmp_path / "two", tmp_path / "file")
    assert {name for name in load_file(file) if "lora_A" in name}
    expand(file, tmp_path / "again")
    for name in [*RESTORED, "masks/safety.safetensors"]:
        assert same(tmp_path / "again" / name, tmp_path / "two" / name), name


def test_values_can_be_rounded(folder, tmp_path):
    exact = export_compact(folder, tmp_path / "exact")
    rounded = export_compact(folder, tmp_path / "rounded", dtype=torch.bfloat16)
    saved = exact.stat().st_size - rounded.stat().st_size
    assert saved >= 2 * LoriMasks.from_pretrained(folder).num_selected - 16
    expand(rounded, tmp_path / "again")
    again, before = (load_file(place / "adapter_model.safetensors") for place in (tmp_path / "again", folder))
    for name in before:
        expected = before[name].bfloat16().float() if "lora_B" in name else before[name]
        assert torch.equal(again[name], expected)


def test_another_platforms_last_digits_are_accepted_and_no_more(folder, tmp_path, monkeypatch, caplog):
    file = export_compact(folder, tmp_path / "file")
    monkeypatch.setattr(compact_file, "draw_projection", lambda *a, **k: draw_projection(*a, **k) * (1 + 1e-7) + 1e-8)
    expand(file, tmp_path / "again")
    assert "other last digits" in caplog.text
    model = load_lori_adapter(make_llama(), tmp_path / "again")
    assert model.lori_masks["code"].projection.fingerprint == fingerprint_of(tmp_path / "again")
    monkeypatch.setattr(compact_file, "draw_projection", lambda *a, **k: draw_projection(*a, **k) + 1e-5)
    with pytest.raises(ValueError, match=r"differ from the stored ones by 1e-05"):
        expand(file, tmp_path / "third")
    assert not (tmp_path / "third").exists()


def fingerprint_of(folder: Path) -> str:
    state = load_file(folder / "adapter_model.safetensors")
    paths = {name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): name for name in state}
    return fingerprint({path: state[name] for path, name in paths.items() if "lora_A" in name})


def test_int8_has_a_scale_a_matrix(folder, tmp_path):
    expand(export_compact(folder, tmp_path / "file", dtype=torch.int8), tmp_path / "again")
    again, before = (load_file(place / "adapter_model.safetensors") for place in (tmp_path / "again", folder))
    for name, tensor in before.items():
        step = tensor.abs().max() / 127 if "lora_B" in name else 0.0
        assert ((again[name] - tensor).abs() <= 0.5001 * step).all() and again[name].dtype == tensor.dtype
    load_lori_adapter(make_llama(), tmp_path / "again")


def test_a_file_of_format_2_is_read_for_ever(tmp_path):
    expand(GOLDEN / "compact.safetensors", tmp_path / "again")
    folders = tmp_path / "again", GOLDEN / "adapter"
    again, before = (load_file(place / "adapter_model.safetensors") for place in folders)
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert LoriMasks.from_pretrained(GOLDEN / "compact.safetensors") == LoriMasks.from_pretrained(GOLDEN / "adapter")


# ---- the code --------------------------------------------------------------------------------------------------


def entropy(density: float) -> float:
    """Bits an entry of a random mask."""
    return -density * np.log2(density) - (1 - density) * np.log2(1 - density)


def contents_of(sets: list[np.ndarray], size: int) -> Contents:
    """An adapter whose mask has these positions, in modules of `size` entries of B."""
    masks, tensors = {}, {}
    for number, positions in enumerate(sets):
        masks[f"m{number:02}"] = torch.zeros(size, 1, dtype=torch.bool)
        masks[f"m{number:02}"][torch.from_numpy(positions)] = True
        tensors[tensor_name(f"m{number:02}", "lora_A")] = torch.zeros(1, 1)
        tensors[tensor_name(f"m{number:02}", "lora_B")] = masks[f"m{number:02}"].float()
    counts = Counts(lora=(size + 1) * len(sets), lora_B=size * len(sets), selected=None)
    record = LoriRecord(
        task="t", phase="adapting", variant="LoRI-S", sparsity=0.5, granularity="model", threshold=None,
        projection=Projection(None, None, "sha256:"), calibration=None, counts=counts,
        tasks=(TaskRecord("t", sum(map(len, sets))),), versions={},
    )  # fmt: skip
    config = {"r": 1, "lora_alpha": 1}
    return Contents(config, record, None, {"t": (masks, MasksMetadata("t"))}, tensors)


@pytest.mark.parametrize(
    ("densities", "above"),
    [([0.1] * 8, 1.04), ([0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.03], 1.12), ([0.1, 1.0, 0.0], 1.25)],
)
def test_a_mask_takes_hardly_more_than_its_entropy(densities, above, tmp_path):
    draw = np.random.default_rng(0)
    sets = [np.flatnonzero(draw.random(200_000) < density) for density in densities]
    write_compact(tmp_path / "file", contents_of(sets, 200_000))
    for mask, positions in zip(read_compact(tmp_path / "file").masks["t"][0].values(), sets, strict=True):
        assert np.array_equal(np.flatnonzero(mask.numpy()), positions)
    bits = 8 * load_file(tmp_path / "file")["task.t.gaps"].numel()
    assert bits < above * sum(200_000 * entropy(density) for density in densities if 0 < density < 1)


@pytest.mark.parametrize(
    "positions", [[[]], [[0]], [[999]], [list(range(1000))], [[], [3], []], [[0, 999], []], [[254, 509, 765, 999]]]
)
def test_the_code_is_exact_at_its_edges(positions, tmp_path):
    write_compact(tmp_path / "file", contents_of([np.array(each, dtype=np.int64) for each in positions], 1000))
    masks = read_compact(tmp_path / "file").masks["t"][0]
    assert [mask.flatten().nonzero().flatten().tolist() for mask in masks.values()] == positions


def test_llama_3_8b_fits_into_12_megabytes(tmp_path):
    """8 of its 32 layers, in a quarter of the bytes."""
    shapes = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096)}
    shapes |= {"gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096)}
    sizes = {f"model.layers.{i}.{name}_proj": shape for i in range(8) for name, shape in shapes.items()}
    A = {path: draw_projection(path, 32, columns, seed=1) for path, (columns, _) in sizes.items()}
    projection = Projection("gaussian", 1, fingerprint(A))
    torch.manual_seed(0)
    B = {path: torch.randn(rows, 32) * 1e-3 for path, (_, rows) in sizes.items()}
    masks = LoriMasks.select(B, 0.9, task="code", projection=projection)
    state = {f"base_model.model.{path}.lora_A.weight": weight for path, weight in A.items()}
    state |= {
        f"base_model.model.{path}.lora_B.weight": torch.where(masks[path], weight, 0.0) for path, weight in B.items()
    }
    record = replace(
        read_record(trained_adapter()),
        projection=projection,
        counts=Counts(sum(each.numel() for each in state.values()), masks.numel, masks.num_selected),
        tasks=(TaskRecord("code", masks.num_selected),),
    )
    config = json.loads((trained_adapter() / "adapter_config.json").read_text())
    contents = Contents(config, record, None, {"code": (dict(masks), masks.metadata)}, state)
    for dtype, most in ((torch.bfloat16, 3_000_000), (torch.int8, 1_900_000)):
        write_compact(tmp_path / "compact", contents, dtype)
        assert (tmp_path / "compact").stat().st_size <= most
    again = read_compact(tmp_path / "compact")
    assert again.tensors.keys() == state.keys()
    assert all(torch.equal(again.tensors[name], state[name]) for name in state if "lora_A" in name)


# ---- what it refuses -------------------------------------------------------------------------------------------


def grow(metadata: dict, rows: int) -> None:
    """Make a few bytes announce gigabytes, in the record too."""
    metadata["modules"] = {path: [rows, *rest] for path, (_, *rest) in metadata["modules"].items()}
    lora_B = sum(rows * rank for rows, rank, _ in metadata["modules"].values())
    lora_A = sum(rank * columns for _, rank, columns in metadata["modules"].values())
    metadata["lori_config"]["counts"].update(lora=lora_A + lora_B, lora_B=lora_B)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda metadata, tensors: metadata.update(format_version=3), "Upgrade"),
        (lambda metadata, tensors: metadata.update(format_version=1), "format_version=1"),
        (lambda metadata, tensors: metadata.pop("modules"), "not a readable compact adapter"),
        (lambda metadata, tensors: metadata["dtypes"].update(A="int8"), "dtypes"),
        (lambda metadata, tensors: metadata["lori_config"].update(task="../../x"), "task_name="),
        (lambda metadata, tensors: metadata["masks"].update({"../x": metadata["masks"]["code"]}), "compact adapter"),
        (lambda metadata, tensors: metadata["masks"]["code"].update(granularity="block"), "granularity"),
        (lambda metadata, tensors: metadata["masks"]["code"].update(projection={}), "compact adapter"),
        (lambda metadata, tensors: tensors.update(values=tensors["values"][1:]), "as many as the positions"),
        (lambda metadata, tensors: tensors.pop("task.code.gaps"), "not a readable compact adapter"),
        (lambda metadata, tensors: tensors.update({"task.code.counts": -tensors["task.code.counts"]}), "altered"),
        (lambda metadata, tensors: tensors["task.code.gaps"].fill_(255), "not a readable"),
        (lambda metadata, tensors: tensors.update(samples=tensors["samples"][1:]), "not a readable"),
        (lambda metadata, tensors: tensors.update(values=tensors["values"].view(-1, 1)), "as many as the positions"),
        (
            lambda metadata, tensors: metadata.update(modules={path: [1 << 40, 4, 4] for path in metadata["modules"]}),
            "where the record counts",
        ),
        (lambda metadata, tensors: grow(metadata, 1 << 24), "not believable"),
    ],
)
def test_an_altered_file_is_refused(folder, tmp_path, change, says):
    file = export_compact(folder, tmp_path / "file")
    change_compact(file, change)
    with pytest.raises(ValueError, match=says):
        expand(file, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_is_no_compact_file_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        expand(tmp_path / "nowhere", tmp_path / "again")
    with pytest.raises(ValueError, match="not a readable compact adapter"):
        expand(folder / "adapter_model.safetensors", tmp_path / "again")
    (tmp_path / "huge").write_bytes((100_000_000).to_bytes(8, "little") + b"{")
    with pytest.raises(ValueError, match="100 MB of metadata"):
        expand(tmp_path / "huge", tmp_path / "again")


def test_export_and_expand_on_the_command_line(folder, tmp_path, capsys):
    file, again = tmp_path / "code.safetensors", tmp_path / "again"
    assert cli.main(["export", "--compact", str(folder), str(file)]) == 0
    assert f"{file.stat().st_size:,} bytes" in capsys.readouterr().out
    assert cli.main(["expand", str(file), str(again)]) == 0
    assert (again / RESTORED[1]).read_bytes() == (folder / RESTORED[1]).read_bytes()
    with pytest.raises(SystemExit, match="2"):
        cli.main(["expand", str(folder / "recipe.yaml"), str(again)])
