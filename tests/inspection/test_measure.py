"""Interference in numbers: against dense computations, and against chance."""

import json
import math
from pathlib import Path

import pytest
import torch
from files_by_hand import read_tensors
from hub_server import HubServer, client_of
from inspection.adapters import ALPHA, cosine, dense, matrices, random_masks, write
from safetensors.torch import save_file

from lori_trl.compact import export_compact
from lori_trl.inspection import inspect_adapters, inspection_sections


def test_cosines_and_norms_are_those_of_dense_deltas(tmp_path):
    weights, others = matrices(1), matrices(2, rank=7)
    folders = [write(tmp_path / "a", weights), write(tmp_path / "b", others, use_rslora=True)]
    inspection = inspect_adapters(folders)
    first, second = dense(weights), dense(others, ALPHA / math.sqrt(7))
    for task, deltas in zip(inspection.tasks, (first, second), strict=True):
        norm = math.sqrt(sum(float(delta.square().sum()) for delta in deltas.values()))
        assert task.norm == pytest.approx(norm, rel=1e-6)
        for (layer, name), cell in task.cells.items():
            (path,) = [path for path in deltas if f"layers.{layer}." in path and path.endswith(name)]
            assert cell.norm == pytest.approx(float(deltas[path].norm()), rel=1e-6)
    (pair,) = inspection.pairs
    assert pair.cosine == pytest.approx(cosine(first, second), abs=1e-6)
    assert list(pair.cosine_by_layer) == [0, 1, 2]
    for layer, found in pair.cosine_by_layer.items():
        assert found == pytest.approx(cosine(first, second, layer), abs=1e-6)
    assert pair.overlap is None and not pair.same_A


def test_patterns_of_rank_and_alpha_are_honoured(tmp_path):
    weights = matrices(1)
    path = "model.layers.1.mlp.down_proj"
    weights[path] = (torch.randn(2, 40), torch.randn(16, 2))
    folder = write(tmp_path / "a", weights, rank_pattern={"layers.1.mlp.down_proj": 2}, alpha_pattern={"down_proj": 5})
    inspection = inspect_adapters([folder])
    A, B = weights[path]
    assert inspection.tasks[0].cells[1, "down_proj"].norm == pytest.approx(float((B @ A).norm()) * 5 / 2, rel=1e-6)
    assert inspection.adapters[0].ranks == [2, 4] and inspection.adapters[0].scalings == [1.25, 2.5, 3]


def test_a_task_owns_its_mask_less_what_is_on_a_newer_one(two_tasks):
    folder, weights, (safety, math_masks) = two_tasks
    inspection = inspect_adapters([folder])
    first, second = inspection.tasks
    assert [task.name for task in (first, second)] == ["safety", "math"]
    assert first.owned == (safety - math_masks).num_selected < first.selected == safety.num_selected
    assert second.owned == second.selected == math_masks.num_selected
    one, two = dense(weights, masks=safety - math_masks), dense(weights, masks=math_masks)
    (pair,) = inspection.pairs
    assert pair.same_A and pair.cosine == pytest.approx(cosine(one, two), abs=1e-6)
    assert first.density == pytest.approx(safety.density)
    cells = {place: cell.density for place, cell in first.cells.items()}
    assert cells == pytest.approx(safety.by_layer_and_projection())
    assert f"{first.selected - first.owned:,} of the {first.selected:,} entries" in inspection.notes[0]


def test_overlap_and_what_chance_would_give(tmp_path, two_tasks):
    folder, _, (safety, math_masks) = two_tasks
    (pair,) = inspect_adapters([folder]).pairs
    assert pair.overlap.shares == pytest.approx((safety.overlap(math_masks), math_masks.overlap(safety)))
    assert pair.overlap.chance == pytest.approx((math_masks.density, safety.density))

    shapes = {"q_proj": (1000, 16), "v_proj": (1000, 16)}
    weights = matrices(1, layers=1, shapes=shapes)
    independent = [random_masks("a", weights, 0.2, 1), random_masks("b", weights, 0.1, 2)]
    (pair,) = inspect_adapters([write(tmp_path / "independent", weights, independent)]).pairs
    for share, chance in zip(pair.overlap.shares, pair.overlap.chance, strict=True):
        assert share == pytest.approx(chance, rel=0.15)  # 8000 entries: a standard deviation is 5 %

    crowded = [random_masks("a", weights, 0.2, 1), random_masks("b", weights, 0.2, 2)]
    for mask in crowded:  # both in one matrix: more than chance, and no more than chance in that matrix
        mask["model.layers.0.v_proj"].zero_()
    (pair,) = inspect_adapters([write(tmp_path / "crowded", weights, crowded)]).pairs
    assert pair.overlap.chance == pytest.approx((0.1, 0.1), rel=0.05)
    assert pair.overlap.chance_by_matrix == pytest.approx((0.2, 0.2), rel=0.05)
    assert pair.overlap.shares == pytest.approx(pair.overlap.chance_by_matrix, rel=0.15)

    disjoint = [independent[0], independent[1] - independent[0]]
    disjoint[1].task = "b"
    (pair,) = inspect_adapters([write(tmp_path / "disjoint", weights, disjoint)]).pairs
    assert pair.overlap.shares == (0, 0)


def test_projections_are_the_same_or_as_near_as_chance(tmp_path):
    shapes = {"q_proj": (8, 300)}
    folders = [write(tmp_path / name, matrices(seed, shapes=shapes)) for name, seed in (("a", 1), ("b", 2), ("c", 1))]
    independent, same, _ = inspect_adapters(folders).projections
    assert independent.chance == pytest.approx(math.sqrt(2 / (math.pi * 300)))
    assert independent.mean == pytest.approx(independent.chance, rel=0.3)
    assert not independent.same and independent.max < 0.3
    assert same.same and same.max == pytest.approx(1)


def test_masks_on_different_projections_are_not_comparable(tmp_path):
    weights, others = matrices(1), matrices(2)
    folders = [
        write(tmp_path / "a", weights, [random_masks("code", weights, 0.3, 1)]),
        write(tmp_path / "b", others, [random_masks("code", others, 0.3, 2)]),
    ]
    inspection = inspect_adapters(folders)
    assert [task.name for task in inspection.tasks] == ["a: code", "b: code"]
    assert inspection.pairs[0].overlap is not None and not inspection.pairs[0].same_A
    assert any("different A" in note for note in inspection.notes)


def test_what_cannot_be_compared_is_said_and_the_rest_is_shown(tmp_path):
    weights, wider = matrices(1), matrices(1, shapes={"self_attn.q_proj": (24, 20)})
    elsewhere = {f"visual.{path}": pair for path, pair in matrices(3).items()}
    folders = [
        write(tmp_path / "a", weights, [random_masks("math", weights, 0.3, 1)]),
        write(tmp_path / "rank-2", matrices(1, rank=2), [random_masks("code", matrices(1, rank=2), 0.3, 1)]),
        write(tmp_path / "wider", wider, base_model_name_or_path="meta-llama/Meta-Llama-3-8B"),
        write(tmp_path / "elsewhere", elsewhere),
        write(tmp_path / "zero", {path: (A, torch.zeros_like(B)) for path, (A, B) in weights.items()}),
    ]
    inspection = inspect_adapters(folders)
    pairs = {(pair.first, pair.second): pair for pair in inspection.pairs}
    ranks = pairs["math", "code"]
    assert ranks.overlap is None and ranks.cosine is not None and "rank 4 here and 2 there" in ranks.undefined[0]
    other_base = pairs["math", "wider"]
    assert other_base.cosine is None and "(24, 16) here and (24, 20) there" in other_base.undefined[0]
    assert "no matrix in common" in pairs["math", "elsewhere"].undefined[0]
    assert any("delta of zero is zero" in reason for reason in pairs["math", "zero"].undefined)
    notes = " ".join(inspection.notes)
    assert "(24, 16) here and (24, 20) there" in notes and "base, meta-llama/Meta-Llama-3-8B" in notes
    json.dumps(inspection.to_dict(), allow_nan=False)
    assert len(inspection_sections(inspection)) == 9


def test_the_share_of_the_largest_entries_is_that_of_sorted_ones(tmp_path):
    weights = matrices(1)
    magnitudes = inspect_adapters([write(tmp_path / "a", weights)]).tasks[0].magnitudes
    entries = torch.cat([B.flatten() for _, B in weights.values()]).square().sort(descending=True).values
    assert magnitudes.numel == len(entries)
    for share in (0.1, 0.5):
        exact = float(entries[: int(share * len(entries))].sum() / entries.sum())
        assert magnitudes.top(share) == pytest.approx(exact, abs=0.01)


def test_entries_outside_every_mask_are_reported(tmp_path):
    weights = matrices(1)
    folder = write(tmp_path / "a", weights, [random_masks("code", weights, 0.3, 1)])
    state = read_tensors(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
    outside = int((state[name] == 0).sum())
    save_file(state | {name: torch.ones_like(state[name])}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"{name} is not what was saved.*allow_modified=True"):
        inspect_adapters([folder])
    inspection = inspect_adapters([folder], allow_modified=True)
    assert inspection.adapters[0].outside == outside
    assert any(f"{outside:,} entries" in note for note in inspection.notes)


def test_plain_lora_the_authors_adapters_and_compact_ones_come_from_the_hub(tmp_path, monkeypatch):
    weights = matrices(1)
    mask = random_masks("code", weights, 0.3, 1)
    folder = write(tmp_path / "a", weights, [mask])
    local = inspect_adapters([folder])
    monkeypatch.chdir(tmp_path)
    plain = {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    torch.save({f"base_model.model.{path}.lora_B.default.weight": entries for path, entries in mask.items()}, "m.pt")
    with HubServer() as server, client_of(server, tmp_path / "home", monkeypatch):
        server.create("me/plain", files=plain)
        server.create("tomg/authors", files=plain | {"masks/0.9_mask.pt": Path("m.pt").read_bytes()})
        inspection = inspect_adapters(["me/plain", "tomg/authors"])
    unmasked, authors = inspection.tasks
    assert [unmasked.name, authors.name] == ["me/plain", "authors"]
    assert not unmasked.masked and unmasked.density == pytest.approx(mask.density)
    assert authors.masked and authors.selected == authors.owned == mask.num_selected
    assert unmasked.norm == authors.norm == local.tasks[0].norm
    assert inspection.pairs[0].cosine == pytest.approx(1) and inspection.projections[0].same


def test_a_compact_adapter_is_the_same_as_its_folder(tmp_path, adapter_folder):
    compact = export_compact(adapter_folder, tmp_path / "code.safetensors")
    inspection = inspect_adapters([adapter_folder, compact])
    one, two = inspection.tasks
    assert [one.name, two.name] == ["code-lori-s: code", "code.safetensors: code"]
    assert one.cells == two.cells and one.norm > 0
    assert inspection.pairs[0].overlap.shares == (1, 1)
