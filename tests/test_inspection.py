"""Interference in numbers and pictures: against dense computations, chance, and what a reader of the files sees."""

import json
import math
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from files_by_hand import change_tensors, write_record
from hub_server import HubServer, client_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from lori_trl import LoriMasks
from lori_trl.cli import main
from lori_trl.compact import export_compact
from lori_trl.inspection import Magnitudes, inspect_adapters, inspection_sections
from lori_trl.projections import Projection, draw_projection, fingerprint

SHAPES = {"self_attn.q_proj": (24, 16), "self_attn.v_proj": (12, 16), "mlp.down_proj": (16, 40)}
RANK, ALPHA = 4, 12
HOSTILE = '<script>alert(1)<$x^2$ & "q">'


def matrices(seed: int, layers: int = 3, rank: int = RANK, shapes=SHAPES) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> A `(rank, in_features)`, B `(out_features, rank)`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        path: (draw_projection(path, rank, columns, seed=seed), torch.randn(rows, rank, generator=generator))
        for layer in range(layers)
        for name, (rows, columns) in shapes.items()
        for path in [f"model.layers.{layer}.{name}"]
    }


def random_masks(task: str, weights: dict, density: float, seed: int) -> LoriMasks:
    generator = torch.Generator().manual_seed(seed)
    entries = {path: torch.rand(B.shape, generator=generator) < density for path, (_, B) in weights.items()}
    return LoriMasks(entries, task=task, sparsity=1 - density)


def write(folder: Path, weights: dict, masks: list[LoriMasks] | None = None, **config) -> Path:
    """Write a plain PEFT adapter; with masks, a LoRI adapter whose B is 0 outside them."""
    folder.mkdir(parents=True)
    if masks:
        union = {path: torch.stack([mask[path] for mask in masks]).any(0) for path in weights}
        weights = {path: (A, B * union[path]) for path, (A, B) in weights.items()}
    state = {f"base_model.model.{path}.lora_A.weight": A for path, (A, _) in weights.items()}
    state |= {f"base_model.model.{path}.lora_B.weight": B for path, (_, B) in weights.items()}
    save_file(state, folder / "adapter_model.safetensors")
    rank = next(iter(weights.values()))[0].shape[0]
    peft = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "base_model_name_or_path": "/models/base"}
    (folder / "adapter_config.json").write_text(json.dumps(peft | config))
    if masks:
        for mask in masks:
            mask.save_pretrained(folder)
        A = {path: pair[0] for path, pair in weights.items()}
        write_record(folder, masks, Projection(None, None, fingerprint(A)))
    return folder


def dense(weights: dict, scaling: float = ALPHA / RANK, masks: LoriMasks | None = None) -> dict[str, Tensor]:
    return {
        path: scaling * (B * (1 if masks is None else masks[path])).double() @ A.double()
        for path, (A, B) in weights.items()
    }


def cosine(first: dict[str, Tensor], second: dict[str, Tensor], layer: int | None = None) -> float:
    here = [path for path in first if layer is None or f"layers.{layer}." in path]
    one, two = (torch.cat([delta[path].flatten() for path in here]) for delta in (first, second))
    return float(one @ two / one.norm() / two.norm())


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory) -> tuple[Path, dict, list[LoriMasks]]:
    """One adapter of two tasks whose masks overlap."""
    weights = matrices(1)
    masks = [random_masks("safety", weights, 0.3, 5), random_masks("math", weights, 0.4, 6)]
    return write(tmp_path_factory.mktemp("two") / "both", weights, masks), weights, masks


# ---- numbers ---------------------------------------------------------------------------------------------------


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


def test_magnitudes_count_every_entry():
    magnitudes = Magnitudes()
    magnitudes.add(torch.tensor([[0.01, -0.01], [10.0, 1e-30]], dtype=torch.float64))
    magnitudes.zeros += 1
    assert magnitudes.numel == 5 and int(magnitudes.counts.sum()) == 4
    assert float(magnitudes.squares.sum()) == pytest.approx(100.0002)
    assert magnitudes.top(0.2) == pytest.approx(100 / 100.0002)
    assert len(magnitudes.edges) == len(magnitudes.counts[magnitudes.span]) + 1
    alike = Magnitudes()
    alike.add(torch.full((100,), 0.5, dtype=torch.float64))
    assert alike.top(0.1) == pytest.approx(0.1)


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
    state = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
    outside = int((state[name] == 0).sum())
    save_file(state | {name: torch.ones_like(state[name])}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"{name} is not what was saved.*allow_modified=True"):
        inspect_adapters([folder])
    inspection = inspect_adapters([folder], allow_modified=True)
    assert inspection.adapters[0].outside == outside
    assert any(f"{outside:,} entries" in note for note in inspection.notes)


# ---- forms of an adapter ---------------------------------------------------------------------------------------


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


# ---- the command -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory, two_tasks) -> Path:
    """Everything the command can write, of an adapter of two tasks and one whose name means harm."""
    folder = tmp_path_factory.mktemp("out")
    hostile = write(folder / HOSTILE.replace("/", ""), matrices(2), base_model_name_or_path=f"/models/{HOSTILE}")
    targets = ["--html", folder / "page.html", "--json", folder / "numbers.json", "--save", folder / "all.png"]
    assert main(["inspect", str(two_tasks[0]), str(hostile), *map(str, targets)]) == 0
    assert main(["inspect", str(two_tasks[0]), "--save", str(folder / "pictures")]) == 0
    return folder


def test_json_has_its_form(written, two_tasks):
    found = json.loads((written / "numbers.json").read_text(encoding="utf-8"))
    assert found["format_version"] == 1
    assert set(found) == {"format_version", "adapters", "tasks", "pairs", "projections", "notes"}
    assert [task["name"] for task in found["tasks"]] == ["safety", "math", HOSTILE]
    task = found["tasks"][0]
    assert set(task) == {
        "name", "adapter", "masked", "selected", "owned", "density", "norm", "cells", "magnitudes"
    }  # fmt: skip
    assert set(task["cells"][0]) == {"layer", "projection", "selected", "numel", "density", "norm"}
    assert len(task["cells"]) == 9
    magnitudes = task["magnitudes"]
    assert len(magnitudes["log10_edges"]) == len(magnitudes["counts"]) + 1 == len(magnitudes["squares"]) + 1
    assert sum(magnitudes["counts"]) + magnitudes["zeros"] == task["owned"]
    pair = found["pairs"][0]
    assert set(pair) == {"first", "second", "same_A", "overlap", "cosine", "cosine_by_layer", "undefined"}
    assert set(pair["overlap"]) == {"shares", "chance", "chance_by_matrix"}
    assert set(found["projections"][0]) == {"first", "second", "same", "mean", "chance", "max"}
    assert str(two_tasks[0].parent) not in json.dumps(found)


def test_json_alone_goes_to_the_standard_output(two_tasks, capsys):
    assert main(["inspect", str(two_tasks[0]), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["format_version"] == 1


def test_the_terminal_shows_names_as_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = write(tmp_path / "[red]\x1b[31mname", matrices(1))
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "[red]" in out and "\x1b[31m" not in out
    for title in ("Adapters", "Tasks", "Density by layer", "Norms of the deltas", "Entries by magnitude"):
        assert title in out
    assert "Overlap" not in out  # one task: nothing to compare


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]


def test_the_page_needs_no_network_and_no_script(written):
    text = (written / "page.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:60])
        elif not name.startswith("xmlns"):
            assert not re.search(r"https?:|//|javascript:", value or ""), (tag, name, value[:60])
        assert not name.startswith("on")
    assert not re.search(r"@import|url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))


def test_names_are_escaped_in_the_page(written):
    text = (written / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text and "alert(1)<" not in text
    assert "&lt;script&gt;alert(1)&lt;$x^2$ &amp; &#34;q&#34;&gt;" in text


def test_every_picture_has_words_and_a_table(written):
    page = _Page()
    text = (written / "page.html").read_text(encoding="utf-8")
    page.feed(text)
    labels = [value for tag, name, value in page.attributes if tag == "figure" and name == "aria-label"]
    assert len(labels) == page.tags.count("svg") == 6 and all(len(label) > 30 for label in labels)
    assert page.tags.count("table") >= 9
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert "#010203" not in text and "currentColor" in text


def test_pictures_are_drawn_in_their_size(written):
    names = {file.stem for file in (written / "pictures").iterdir()}
    assert names == {"overlap", "cosine", "cosine_by_layer", "density", "norms", "magnitudes"}
    for file in (written / "pictures").iterdir():
        assert _size(file)[0] == 768  # 4.8 inches at 160 dots
        assert _size(file)[1] > 200
    assert _size(written / "all.png")[0] == 2 * 768


def _size(file: Path) -> tuple[int, int]:
    header = file.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


# ---- bad input -------------------------------------------------------------------------------------------------


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit:
        main(["inspect", *map(str, arguments)])
    assert exit.value.code == 2
    out, error = capsys.readouterr()
    assert out == "" and "Traceback" not in error and error.count(". ") >= 2  # given, allowed, what to do
    return error


def spoil(folder: Path, name: str) -> None:
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    first = sorted(state)[0]
    if name.endswith("plain LoRA"):
        (folder / "lori_config.json").unlink()
    if name == "nan":
        change_tensors(folder, lambda tensors: tensors[first].fill_(math.nan))
    elif name == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif name.startswith("no B"):
        save_file({key: tensor for key, tensor in state.items() if key == first or "lora_A" in key}, file)
    elif name.startswith("no lora"):
        save_file({"lm_head.weight": torch.ones(2, 2)}, file)
    elif name == "no weights":
        file.unlink()
    elif name == "no config":
        (folder / "adapter_config.json").unlink()
    elif name == "dora":
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    elif name == "not json":
        (folder / "adapter_config.json").write_text("{")
    elif name == "other masks":
        weights = matrices(1, rank=2)
        random_masks("code", weights, 0.5, 1).save_pretrained(folder)
    elif name == "no mask":
        (folder / "masks" / "code.safetensors").unlink()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", "holds NaN or infinity"),
        ("truncated", "unreadable"),
        ("no B", "name different tensors"),
        ("no lora", "name different tensors"),
        ("no B in plain LoRA", "no pair of lora_A"),
        ("no lora in plain LoRA", "holds no lora_A and lora_B"),
        ("no weights", "holds no adapter_model.safetensors"),
        ("no config", "holds no adapter_config.json"),
        ("dora", "use_dora=True"),
        ("not json", "must be the JSON that PEFT wrote"),
        ("other masks", "do not fit the adapter"),
        ("no mask", "holds no masks"),
    ],
)
def test_a_spoiled_adapter_is_refused_and_nothing_written(tmp_path, capsys, fault, message):
    weights = matrices(1)
    folder = write(tmp_path / "a", weights, [random_masks("code", weights, 0.3, 1)])
    spoil(folder, fault)
    error = refused(capsys, folder, "--html", tmp_path / "page.html", "--json", tmp_path / "x.json")
    assert message in error
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a"]


def test_wrong_calls_are_refused(tmp_path, capsys, two_tasks, monkeypatch):
    folder = two_tasks[0]
    assert "does not exist" in refused(capsys, tmp_path / "nowhere")
    assert "is there twice" in refused(capsys, folder, folder)
    assert "--save" in refused(capsys, folder, "--save", tmp_path / "picture.jpg")
    assert "--save" in refused(capsys, folder, "--save", folder / "adapter_config.json")
    assert "--html" in refused(capsys, folder, "--html", tmp_path / "no" / "page.html")
    assert "--json" in refused(capsys, folder, "--json", tmp_path)
    monkeypatch.setattr("lori_trl.heatmaps.is_matplotlib_available", lambda: False)
    for option, target in (("--html", "page.html"), ("--save", "a.png"), ("--save", "folder")):
        assert "lori-trl[plots]" in refused(capsys, folder, option, tmp_path / target)
    assert not list(tmp_path.iterdir())
    assert main(["inspect", str(folder)]) == 0  # the tables need no matplotlib


def test_an_untrained_adapter_has_tables_and_no_pictures(tmp_path, capsys):
    folder = write(tmp_path / "a", {path: (A, torch.zeros_like(B)) for path, (A, B) in matrices(1).items()})
    for target in ("a.png", "pictures"):
        assert "nothing to draw" in refused(capsys, folder, "--save", tmp_path / target)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert main(["inspect", str(folder), "--html", str(tmp_path / "page.html")]) == 0
