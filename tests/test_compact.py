"""The compact form: small, exact, and suspicious of what it reads."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_llama, make_trainer, trained_adapter

import lori_trl.compact
from lori_trl import LoriMasks, cli, load_lori_adapter
from lori_trl.compact import _decode, _encode, expand, export_compact
from lori_trl.masks import COMPACT_FORMAT
from lori_trl.projections import draw_projection, fingerprint

RESTORED = ["adapter_config.json", "adapter_model.safetensors", "lori_config.json", "masks/code.safetensors"]


@pytest.fixture
def folder(tmp_path) -> Path:
    return shutil.copytree(trained_adapter(), tmp_path / "code-lori-s")


def rewrite(file: Path, change) -> None:
    """Change a compact file's metadata and tensors."""
    with safe_open(file, framework="pt") as opened:
        metadata = json.loads(opened.metadata()[COMPACT_FORMAT])
    tensors = load_file(file)
    change(metadata, tensors)
    save_file(tensors, file, metadata={COMPACT_FORMAT: json.dumps(metadata)})


def test_the_plain_files_come_back_byte_for_byte(folder, tmp_path):
    file = export_compact(folder, tmp_path / "code.safetensors")
    expand(file, tmp_path / "again")
    for name in [*RESTORED, "recipe.yaml"]:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name
    assert not {name for name in load_file(file) if "lora_A" in name}
    assert export_compact(folder, tmp_path / "twice").read_bytes() == file.read_bytes()


def test_it_loads_as_it_is(folder, tmp_path):
    file = export_compact(folder, tmp_path / "code.safetensors")
    model, plain = (load_lori_adapter(make_llama(), source) for source in (file, folder))
    assert model.lori_masks == plain.lori_masks
    assert LoriMasks.from_pretrained(file) == LoriMasks.from_pretrained(folder)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_entries_outside_every_mask_and_negative_zeros_are_kept(folder, tmp_path):
    state = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in state if "lora_B" in name)
    state[name] = torch.randn_like(state[name])
    state[name][0] = -0.0
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    expand(export_compact(folder, tmp_path / "file"), tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert torch.equal(again[name].view(torch.int32), state[name].view(torch.int32))


def test_several_tasks_and_a_projection_without_a_seed(folder, tmp_path):
    model = load_lori_adapter(make_llama(), folder, is_trainable=True)
    trainer = make_trainer(tmp_path / "two", model=model, task_name="safety")
    trainer.train()
    trainer.save_model()
    config = json.loads((tmp_path / "two" / "lori_config.json").read_text())
    config["projection"]["seed"] = config["projection"]["init"] = None
    (tmp_path / "two" / "lori_config.json").write_text(json.dumps(config, indent=2) + "\n")
    file = export_compact(tmp_path / "two", tmp_path / "file")
    assert {name for name in load_file(file) if "lora_A" in name}
    expand(file, tmp_path / "again")
    for name in [*RESTORED, "masks/safety.safetensors"]:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


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
    monkeypatch.setattr(
        lori_trl.compact, "draw_projection", lambda *a, **k: draw_projection(*a, **k) * (1 + 1e-7) + 1e-8
    )
    expand(file, tmp_path / "again")
    assert "other last digits" in caplog.text
    model = load_lori_adapter(make_llama(), tmp_path / "again")
    assert model.lori_masks["code"].projection["fingerprint"] == fingerprint_of(tmp_path / "again")
    monkeypatch.setattr(lori_trl.compact, "draw_projection", lambda *a, **k: draw_projection(*a, **k) + 1e-5)
    with pytest.raises(ValueError, match=r"differ from the stored ones by 1e-05"):
        expand(file, tmp_path / "third")
    assert not (tmp_path / "third").exists()


def fingerprint_of(folder: Path) -> str:
    state = load_file(folder / "adapter_model.safetensors")
    paths = {name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): name for name in state}
    return fingerprint({path: state[name] for path, name in paths.items() if "lora_A" in name})


# ---- the code --------------------------------------------------------------------------------------------------


def entropy(density: float) -> float:
    """Bits an entry of a random mask."""
    return -density * np.log2(density) - (1 - density) * np.log2(1 - density)


@pytest.mark.parametrize(
    ("densities", "above"),
    [([0.1] * 8, 1.03), ([0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.03], 1.06), ([0.001, 0.9, 1.0, 0.0], 1.05)],
)
def test_a_mask_takes_hardly_more_than_its_entropy(densities, above):
    draw = np.random.default_rng(0)
    modules = {f"m{i}": [1000, 200, 1] for i in range(len(densities))}
    sets = [np.flatnonzero(draw.random(200_000) < density) for density in densities]
    coded = {f"x.{name}": torch.from_numpy(array) for name, array in _encode(sets, [200_000] * len(sets)).items()}
    for mine, theirs in zip(_decode(coded, "x", modules), sets, strict=True):
        assert np.array_equal(mine, theirs)
    bits = 8 * sum(tensor.numel() * tensor.element_size() for tensor in coded.values())
    assert bits < above * sum(200_000 * entropy(density) for density in densities if 0 < density < 1)


@pytest.mark.parametrize("positions", [[[]], [[0]], [[9]], [list(range(10))], [[], [3], []], [[0, 9], []]])
def test_the_code_is_exact_at_its_edges(positions):
    sets = [np.array(where, dtype=np.int64) for where in positions]
    coded = {f"x.{name}": torch.from_numpy(array) for name, array in _encode(sets, [10] * len(sets)).items()}
    decoded = _decode(coded, "x", {f"m{i}": [5, 2, 1] for i in range(len(sets))})
    assert [where.tolist() for where in decoded] == positions


@pytest.mark.slow
def test_llama_3_8b_fits_into_12_megabytes(tmp_path):
    shapes = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096)}
    shapes |= {"gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096)}
    sizes = {f"model.layers.{i}.{name}_proj": shape for i in range(32) for name, shape in shapes.items()}
    A = {path: draw_projection(path, 32, columns, seed=1) for path, (columns, _) in sizes.items()}
    projection = {"init": "gaussian", "seed": 1, "fingerprint": fingerprint(A)}
    torch.manual_seed(0)
    B = {path: torch.randn(rows, 32) * 1e-3 for path, (_, rows) in sizes.items()}
    masks = LoriMasks.select(B, 0.9, task="code", projection=projection)
    state = {f"base_model.model.{path}.lora_A.weight": weight for path, weight in A.items()}
    state |= {
        f"base_model.model.{path}.lora_B.weight": torch.where(masks[path], weight, 0.0) for path, weight in B.items()
    }
    plain = tmp_path / "plain"
    masks.save_pretrained(plain)
    save_file(state, plain / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((trained_adapter() / "lori_config.json").read_text()) | {"projection": projection}
    (plain / "lori_config.json").write_text(json.dumps(config))
    shutil.copy(trained_adapter() / "adapter_config.json", plain)
    file = export_compact(plain, tmp_path / "compact", dtype=torch.bfloat16)
    assert (plain / "adapter_model.safetensors").stat().st_size > 335_000_000
    assert file.stat().st_size <= 12_000_000
    expand(file, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], state[name]) for name in state if "lora_A" in name)
    print(f"{file.stat().st_size:,} bytes")


# ---- what it refuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda metadata, tensors: metadata.update(format_version=2), "Upgrade"),
        (lambda metadata, tensors: metadata.pop("modules"), "not a readable compact adapter"),
        (lambda metadata, tensors: metadata["dtypes"].update(A="int8"), "dtypes"),
        (lambda metadata, tensors: metadata["lori_config"].update(task="../../x"), "task_name="),
        (lambda metadata, tensors: metadata["masks"].update({"../x": metadata["masks"]["code"]}), "compact adapter"),
        (lambda metadata, tensors: tensors.update(values=tensors["values"][1:]), "as many as the positions"),
        (lambda metadata, tensors: tensors.pop("task.code.unary"), "not a readable compact adapter"),
        (lambda metadata, tensors: tensors.update({"task.code.counts": -tensors["task.code.counts"]}), "altered"),
        (lambda metadata, tensors: tensors["task.code.unary"].fill_(255), "altered|outside"),
        (lambda metadata, tensors: tensors.update(samples=tensors["samples"][1:]), "not a readable"),
        (
            lambda metadata, tensors: metadata.update(modules={path: [1 << 40, 4, 4] for path in metadata["modules"]}),
            "not believable",
        ),
    ],
)
def test_an_altered_file_is_refused(folder, tmp_path, change, says):
    file = export_compact(folder, tmp_path / "file")
    rewrite(file, change)
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
