"""Masks: algebra, statistics, files."""

import json
from pathlib import Path

import pytest
import torch
from files_by_hand import read_tensors, seal
from safetensors import safe_open
from safetensors.torch import save_file

from lori_trl import LoriMasks
from lori_trl.method.projections import Projection

GOLDEN = Path(__file__).parents[1] / "golden"
PATHS = [f"model.layers.{layer}.{module}" for layer in (0, 10) for module in ("self_attn.q_proj", "mlp.up_proj")]


def random_masks(seed=0, density=0.3, **metadata) -> LoriMasks:
    generator = torch.Generator().manual_seed(seed)
    return LoriMasks({path: torch.rand(9, 5, generator=generator) < density for path in PATHS}, **metadata)


def test_mapping_is_sorted_and_free_of_prefixes():
    masks = LoriMasks({f"base_model.model.{path}.lora_B.default.weight": torch.ones(2, 1) > 0 for path in PATHS[::-1]})
    assert list(masks) == sorted(PATHS) and len(masks) == 4
    assert masks[PATHS[0]].dtype == torch.bool
    with pytest.raises(KeyError):
        masks["model.layers.7.q_proj"]


def test_select_trains_exactly_k():
    torch.manual_seed(0)
    saliency = {path: torch.randn(25, 10) for path in PATHS}
    masks = LoriMasks.select(saliency, 0.9)
    assert masks.num_selected == 100 and masks.numel == 1000 and masks.density == 0.1
    assert masks.threshold == min(saliency[path][masks[path]].abs().min().item() for path in PATHS)


@pytest.mark.parametrize(
    ("granularity", "pools"), [("model", 1), ("module", 2), ("projection", 3), ("layer", 2), ("matrix", 6)]
)
def test_every_pool_of_a_granularity_gets_its_share(granularity, pools):
    torch.manual_seed(0)
    paths = [
        f"model.layers.{layer}.{name}"
        for layer in (0, 10)
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
    ]
    saliency = {path: torch.rand(10, 5) * (1 + index) for index, path in enumerate(paths)}
    masks = LoriMasks.select(saliency, 0.8, granularity)
    keys = {
        "model": lambda path: 0,
        "module": lambda path: path.split(".")[3],
        "projection": lambda path: path.split(".")[4],
        "layer": lambda path: path.split(".")[2],
        "matrix": lambda path: path,
    }
    groups = {}
    for path in paths:
        groups.setdefault(keys[granularity](path), []).append(path)
    assert len(groups) == pools
    for members in groups.values():
        flat = torch.cat([saliency[path].flatten() for path in sorted(members)])
        chosen = torch.cat([masks[path].flatten() for path in sorted(members)])
        assert chosen.sum() == flat.numel() // 5 and flat[chosen].min() > flat[~chosen].max()


def test_unknown_granularity():
    with pytest.raises(ValueError, match="Allowed are model, module, projection, layer, matrix"):
        LoriMasks.select({"a": torch.ones(2, 2)}, 0.5, "block")


def test_excluded_entries_are_no_candidates():
    saliency = {path: torch.rand(8, 4) for path in PATHS}
    taken = LoriMasks.select(saliency, 0.75)
    next_masks = LoriMasks.select(saliency, 0.75, exclude=taken)
    assert next_masks.num_selected == taken.num_selected and taken.overlap(next_masks) == 0


@pytest.mark.parametrize(("sparsity", "error"), [(1.0, ValueError), (-0.1, ValueError), ("0.9", TypeError)])
def test_sparsity_outside_the_range_is_refused(sparsity, error):
    with pytest.raises(error, match=r"Pass a fraction"):
        LoriMasks.select({"a": torch.ones(2, 2)}, sparsity)


def test_an_empty_selection_is_refused():
    with pytest.raises(ValueError, match="Nothing was selected: of 4 entries.*lower `sparsity`"):
        LoriMasks.select({"a": torch.zeros(2, 2)}, 0.5)


def test_algebra_follows_the_sets():
    a, b = random_masks(1), random_masks(2)
    for path in PATHS:
        assert torch.equal((a & b)[path], a[path] & b[path])
        assert torch.equal((a | b)[path], a[path] | b[path])
        assert torch.equal((a - b)[path], a[path] & ~b[path])
        assert torch.equal((~a)[path], ~a[path])
    assert (a | ~a).density == 1.0 and (a & ~a).density == 0.0
    assert a == random_masks(1, task="other name") and a != b and a != "masks"
    assert a.overlap(a) == 1.0 and a.overlap(~a) == 0.0
    assert a.overlap(b) == (a & b).num_selected / a.num_selected


def test_statistics():
    masks = LoriMasks(
        {
            "model.layers.2.self_attn.q_proj": torch.tensor([[True, False]]),
            "model.layers.2.mlp.up_proj": torch.tensor([[True, True], [False, False]]),
            "model.layers.10.self_attn.q_proj": torch.tensor([[False, False]]),
            "lm_head": torch.tensor([[True]]),
        }
    )
    assert masks.by_layer() == {-1: 1.0, 2: 0.5, 10: 0.0}
    assert list(masks.by_layer()) == [-1, 2, 10]
    assert masks.by_projection() == {"lm_head": 1.0, "q_proj": 0.25, "up_proj": 0.5}


def test_masks_that_do_not_fit_are_named():
    masks = random_masks(task="code")
    shapes = {path: (9, 5) for path in PATHS}
    masks.check_shapes(shapes)
    with pytest.raises(ValueError, match=r"'code'.*in 1 modules: lm_head has no mask\. Masks fit.*Use the masks"):
        masks.check_shapes({**shapes, "lm_head": (3, 3)})
    with pytest.raises(ValueError, match=r"q_proj has a mask \(9, 5\) for lora_B \(9, 8\)"):
        masks.check_shapes(dict.fromkeys(PATHS, (9, 8)))
    with pytest.raises(ValueError, match="has a mask but no adapter"):
        masks.check_shapes({PATHS[0]: (9, 5)})


def test_wrong_tensors_are_refused():
    with pytest.raises(TypeError, match="Masks are torch.bool"):
        LoriMasks({"a": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"`a` has shape \(2,\)"):
        LoriMasks({"a": torch.ones(2) > 0})


def test_round_trip(tmp_path):
    projection = Projection("gaussian", 7, "sha256:00")
    masks = random_masks(task="code", sparsity=0.7, threshold=0.25, projection=projection)
    file = masks.save_pretrained(tmp_path)
    assert file == tmp_path / "masks" / "code.safetensors"
    for source in (tmp_path, tmp_path / "masks", file):
        loaded = LoriMasks.from_pretrained(source)
        assert loaded == masks
        for name in ("task", "sparsity", "granularity", "threshold", "projection"):
            assert getattr(loaded, name) == getattr(masks, name)
    assert [path.name for path in file.parent.iterdir()] == ["code.safetensors"]


def test_one_bit_an_entry(tmp_path):
    masks = LoriMasks({f"layers.{i}.q_proj": torch.rand(1024, 32) < 0.1 for i in range(40)}, task="big")
    size = masks.save_pretrained(tmp_path).stat().st_size
    assert size / masks.numel <= 0.129  # the header weighs more here than in a real model


def test_several_tasks_in_a_folder(tmp_path):
    random_masks(1, task="old").save_pretrained(tmp_path)
    random_masks(2, task="new").save_pretrained(tmp_path)
    assert LoriMasks.from_pretrained(tmp_path).task == "new"  # the newest file, where nothing is on record
    record = json.loads((GOLDEN / "adapter" / "lori_config.json").read_text()) | {"task": "old"}
    (tmp_path / "lori_config.json").write_text(json.dumps(seal(record)))
    assert LoriMasks.from_pretrained(tmp_path).task == "old"
    assert LoriMasks.from_pretrained(tmp_path, task="new") == random_masks(2)
    with pytest.raises(FileNotFoundError, match="no masks of task 'none'. It has those of new, old"):
        LoriMasks.from_pretrained(tmp_path, task="none")


def test_what_is_missing_or_broken_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no masks"):
        LoriMasks.from_pretrained(tmp_path / "nowhere")
    file = random_masks(task="code", sparsity=0.3).save_pretrained(tmp_path)
    whole = file.read_bytes()
    for broken in (whole[:-3], whole[:40], b"", whole[:-1] + bytes([whole[-1] ^ 1]), whole.replace(b"0.3", b"0.4")):
        assert broken != whole
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="(no readable|not a readable|unreadable).*Fetch or save it again"):
            LoriMasks.from_pretrained(file)
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="is not a readable mask file"):
        LoriMasks.from_pretrained(file)


def test_altered_metadata_is_found(tmp_path):
    file = random_masks(task="code", sparsity=0.7).save_pretrained(tmp_path)
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), read_tensors(file)
    save_file(tensors, file, metadata={"lori_masks": metadata["lori_masks"].replace("0.7", "0.8")})
    with pytest.raises(ValueError, match="do not match their checksum"):
        LoriMasks.from_pretrained(file)
    for version, says in ((99, "format_version 99.*Upgrade"), (1, "format_version=1")):
        other = json.loads(metadata["lori_masks"]) | {"format_version": version}
        save_file(tensors, file, metadata={"lori_masks": json.dumps(other)})
        with pytest.raises(ValueError, match=says):
            LoriMasks.from_pretrained(file)


@pytest.mark.parametrize("task", [None, "", "a/b", "../x", "-x", "a b", "x" * 97, "a\n"])
def test_a_task_that_cannot_name_a_file_is_refused(task, tmp_path):
    with pytest.raises(ValueError, match="cannot name a file"):
        random_masks(task=task).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_format_2_loads_for_ever():
    masks = LoriMasks.from_pretrained(GOLDEN / "masks.safetensors")
    assert masks == random_masks(5) and masks.task == "golden" and masks.sparsity == 0.7
    assert masks.projection == Projection("gaussian", 7, "sha256:00")
