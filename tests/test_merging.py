"""Merging: exact where mathematics allows, PEFT's where it is PEFT's, and nothing written where the input is bad."""

import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from hub_server import HubServer, client_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import lora_config, make_llama, make_trainer, trained_adapter
from transformers import AutoModelForCausalLM

from lori_trl import LoriMasks, LoriSFTTrainer, load_lori_adapter, merge_lori_adapters, push_lori_to_hub
from lori_trl.adapter.folder import base_name
from lori_trl.adapter.safetensors import SafetensorsWriter
from lori_trl.cli import main
from lori_trl.cli.merge import recipe_parser
from lori_trl.compact import expand, export_compact
from lori_trl.evaluation import completion_loss
from lori_trl.hub.commit import push_files
from lori_trl.hub.push import adapter_files
from lori_trl.layers import module_path
from lori_trl.merge_search import search_merge_weights
from lori_trl.merging import METHODS
from lori_trl.projections import Projection, draw_projection, fingerprint
from lori_trl.recipes import find_recipe, read_recipe, shipped_folder

SHAPES = {  # (out_features, in_features)
    "model.layers.0.mlp.up_proj": (24, 16),
    "model.layers.0.self_attn.q_proj": (16, 16),
    "model.layers.1.self_attn.v_proj": (8, 16),
}


def write_adapter(
    folder: Path,
    seed: int = 0,
    *,
    rank: int = 4,
    alpha: float = 8,
    shapes: dict = SHAPES,
    dtype: torch.dtype = torch.float32,
    change=lambda tensors: None,
    **config,
) -> Path:
    """Write a plain LoRA adapter of random numbers."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (rows, columns) in shapes.items():
        own = config.get("rank_pattern", {}).get(path, rank)
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(own, columns, generator=draw).to(dtype)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(rows, own, generator=draw).to(dtype)
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    base = config.pop("base", "me/base")
    targets = sorted({path.rpartition(".")[2] for path in shapes})
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": targets, "base_model_name_or_path": base}
    LoraConfig(**settings | config).save_pretrained(folder)
    return folder


def factors(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Module path -> A, B in float64, and alpha / rank, read the way PEFT reads them."""
    config = LoraConfig.from_pretrained(folder)
    state = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name in state:
        if ".lora_A." in name:
            path = module_path(name)
            rank = config.rank_pattern.get(path, config.r)
            alpha = config.alpha_pattern.get(path, config.lora_alpha)
            scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
            found[path] = (state[name].double(), state[name.replace("lora_A", "lora_B")].double(), scaling)
    return found


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    return {path: scaling * B @ A for path, (A, B, scaling) in factors(folder).items()}


def assert_close(found: dict, expected: dict, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for path in expected:
        assert (found[path] - expected[path]).norm() <= tolerance * expected[path].norm(), path


def refuse(what: str, adapters, output_dir: Path, error=ValueError, **arguments) -> None:
    """The error says what was given, what is allowed and what to do; and nothing is written."""
    with pytest.raises(error, match=what) as raised:
        merge_lori_adapters(adapters, output_dir=output_dir, **arguments)
    assert len(str(raised.value).split(". ")) >= 3
    assert not output_dir.exists()


# ---- the file --------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.dictionaries(st.text(min_size=1, max_size=12), st.lists(st.integers(0, 5), max_size=3), max_size=6),
    cut=st.integers(0, 5),
)
def test_a_streamed_file_is_the_librarys_byte_for_byte(tmp_path, tensors, cut):
    tensors = {name: torch.randn(shape) for name, shape in tensors.items() if name.isprintable()}
    tensors.pop("__metadata__", None)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with SafetensorsWriter(tmp_path / "ours", shapes, {"format": "pt"}) as writer:
        for name in reversed(tensors):  # in any order
            writer.write(name, tensors[name])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_streamed_file_with_a_hole_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="1 tensors were not written, e.g. b"):
        with SafetensorsWriter(tmp_path / "x", {"a": (2,), "b": (3,)}) as writer:
            writer.write("a", torch.ones(2))
    with SafetensorsWriter(tmp_path / "x", {"a": (2,)}) as writer:
        with pytest.raises(ValueError, match=r"announced as \[2\]"):
            writer.write("a", torch.ones(3))
        writer.write("a", torch.ones(2))


# ---- exact -----------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_concat_is_the_weighted_sum_of_the_deltas(tmp_path_factory, data):
    """Any number of adapters, ranks, scalings, target modules and dtypes (paper eq. 3 and 4)."""
    folder = tmp_path_factory.mktemp("concat")
    adapters, weights = [], []
    for number in range(data.draw(st.integers(1, 4))):
        paths = data.draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
        shapes = {path: SHAPES[path] for path in paths}
        arguments = {
            "rank": data.draw(st.integers(1, 5)),
            "alpha": data.draw(st.integers(1, 64)),
            "use_rslora": data.draw(st.booleans()),
            "rank_pattern": data.draw(st.dictionaries(st.sampled_from(paths), st.integers(1, 6), max_size=1)),
            "alpha_pattern": data.draw(st.dictionaries(st.sampled_from(paths), st.integers(1, 64), max_size=1)),
            "dtype": data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        }
        adapters.append(write_adapter(folder / str(number), number, shapes=shapes, **arguments))
        weights.append(data.draw(st.floats(-2, 2).filter(lambda weight: abs(weight) > 1e-3)))
    merged = merge_lori_adapters(adapters, weights, "concat", folder / "merged")
    expected = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, delta in deltas(adapter).items():
            expected[path] = expected.get(path, 0) + weight * delta
    assert_close(deltas(merged), expected)


def test_linear_is_equation_5(tmp_path):
    adapters = [write_adapter(tmp_path / str(seed), seed, alpha=alpha) for seed, alpha in enumerate((8, 6, 3))]
    weights = [0.5, -0.3, 0.8]
    merged = merge_lori_adapters(adapters, weights, "linear", tmp_path / "merged")
    expected = {}
    for path in SHAPES:
        parts = [factors(adapter)[path] for adapter in adapters]
        expected[path] = sum(
            first * second * scaling * (B @ A)
            for first, (A, _, _) in zip(weights, parts, strict=True)
            for second, (_, B, scaling) in zip(weights, parts, strict=True)
        )
    assert_close(deltas(merged), expected)


def test_linear_on_numbers_small_enough_to_read(tmp_path):
    """One module, rank 1, scaling 2: A = 1 and 10, B = 1 and 3, weights 0.5 and 0.1."""

    def numbers(A, B):
        def change(tensors):
            for name, value in zip(sorted(tensors), (A, B), strict=True):
                tensors[name].fill_(value)

        return change

    shapes = {"model.layers.0.mlp.up_proj": (1, 1)}
    adapters = [
        write_adapter(tmp_path / name, shapes=shapes, rank=1, alpha=2, change=numbers(A, B))
        for name, A, B in (("a", 1.0, 1.0), ("b", 10.0, 3.0))
    ]
    for method, value in (
        ("concat", 2 * (0.5 * 1 * 1 + 0.1 * 10 * 3)),
        ("linear", 2 * (0.5 * 1 + 0.1 * 10) * (0.5 * 1 + 0.1 * 3)),
        ("linear_peft", (math.sqrt(1.0) * 1 + math.sqrt(0.2) * 10) * (math.sqrt(1.0) * 1 + math.sqrt(0.2) * 3)),
    ):
        merged = merge_lori_adapters(adapters, [0.5, 0.1], method, tmp_path / method)
        assert deltas(merged)["model.layers.0.mlp.up_proj"].item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", [{}, {"use_rslora": True}, {"alpha": 5, "rank": 3}, {"alpha": 7, "use_rslora": True}])
def test_weight_1_of_one_adapter_is_the_identity(tmp_path, method, form):
    adapter = write_adapter(tmp_path / "a", **form)
    density = 0.5 if method in ("magnitude", "ties", "dare") else None
    merged = merge_lori_adapters([adapter], 1.0, method, tmp_path / "merged", density=density)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, merged))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    scalings = [{scaling for _, _, scaling in factors(folder).values()} for folder in (adapter, merged)]
    assert scalings[0].pop() == pytest.approx(scalings[1].pop(), rel=1e-15)
    assert not json.loads((merged / "adapter_config.json").read_text())["use_rslora"]


def test_different_scalings_leave_alpha_equal_to_rank(tmp_path):
    """vLLM reads `r` and `lora_alpha` alone, no patterns."""
    adapters = [write_adapter(tmp_path / "a", rank=2), write_adapter(tmp_path / "b", rank=5, alpha=7)]
    config = LoraConfig.from_pretrained(merge_lori_adapters(adapters, 1.0, "concat", tmp_path / "different"))
    assert (config.r, config.lora_alpha) == (7, 7) and not config.rank_pattern and not config.alpha_pattern
    config = LoraConfig.from_pretrained(merge_lori_adapters(adapters[:1] * 2, 1.0, "concat", tmp_path / "equal"))
    assert (config.r, config.lora_alpha) == (4, 16)  # both have scaling 4


def test_by_default_the_deltas_are_averaged(tmp_path):
    adapters = [write_adapter(tmp_path / str(seed), seed) for seed in range(2)]
    first, second = (deltas(adapter) for adapter in adapters)
    merged = merge_lori_adapters(adapters, output_dir=tmp_path / "merged")
    assert_close(deltas(merged), {path: (first[path] + second[path]) / 2 for path in first})


# ---- as PEFT does it -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft_adapters(tmp_path_factory) -> list[Path]:
    """Three LoRA adapters of the tiny model with different scalings, one of them on fewer modules."""
    folders = []
    for seed, alpha, targets in ((1, 8, "all-linear"), (2, 6, ["q_proj", "v_proj", "up_proj"]), (3, 8, "all-linear")):
        model = get_peft_model(make_llama(), LoraConfig(r=4, lora_alpha=alpha, target_modules=targets))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data.normal_(0, 0.1)
        folders.append(tmp_path_factory.mktemp("peft") / f"task{seed}")
        model.save_pretrained(folders[-1])
    return folders


@pytest.mark.parametrize(
    ("method", "theirs", "density"),
    [
        ("concat", "cat", None),
        ("linear_peft", "linear", None),
        ("magnitude", "magnitude_prune", 0.3),
        ("ties", "ties", 0.7),
        ("dare", "dare_linear", 0.7),
        ("dare", "dare_linear", 1.0),
    ],
)
def test_as_peft_merges(peft_adapters, tmp_path, method, theirs, density):
    """Bit for bit, the random numbers too; `concat` puts the weights on B, PEFT on A, so there the deltas are."""
    weights = [0.5, -0.3, 0.9]
    merged = merge_lori_adapters(peft_adapters, weights, method, tmp_path / "merged", density=density, seed=5)
    model = PeftModel.from_pretrained(make_llama(), peft_adapters[0], adapter_name="task1")
    for folder in peft_adapters[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    torch.manual_seed(5)
    names = [folder.name for folder in peft_adapters]
    model.base_model.add_weighted_adapter(names, weights, "peft", combination_type=theirs, density=density)
    model.load_adapter(merged, adapter_name="ours")
    compared = 0
    for path, module in model.named_modules():
        if "peft" in getattr(module, "lora_A", {}):
            if method == "concat":
                ours, reference = module.get_delta_weight("ours"), module.get_delta_weight("peft")
                assert (ours - reference).norm() <= 1e-6 * reference.norm(), path
            else:
                assert torch.equal(module.lora_A["ours"].weight, module.lora_A["peft"].weight), path
                assert torch.equal(module.lora_B["ours"].weight, module.lora_B["peft"].weight), path
                assert module.scaling["ours"] == module.scaling["peft"] == 1
            compared += 1
    assert compared == 14


def test_dare_leaves_torchs_generator_alone_and_follows_its_seed(peft_adapters, tmp_path):
    state = torch.get_rng_state()
    files = [
        merge_lori_adapters(peft_adapters, 0.5, "dare", tmp_path / str(number), density=0.5, seed=seed)
        / "adapter_model.safetensors"
        for number, seed in enumerate((1, 1, 2))
    ]
    assert torch.equal(state, torch.get_rng_state())
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_plain_peft_gives_the_sum_of_the_adapters_outputs(peft_adapters, tmp_path):
    """In a process that has never heard of lori_trl."""
    merged = merge_lori_adapters(peft_adapters, [0.5, 0.25, 1.0], output_dir=tmp_path / "merged")
    base = make_llama()
    base.save_pretrained(tmp_path / "base")
    for folder, weight in zip(peft_adapters, (0.5, 0.25, 1.0), strict=True):
        for path, delta in deltas(folder).items():
            base.get_submodule(path).weight.data += weight * delta.float()
    tokens = torch.arange(10).view(1, 10)
    with torch.no_grad():
        torch.save(base(tokens).logits, tmp_path / "expected.pt")
    code = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r}), {str(merged)!r})
expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(model(torch.arange(10).view(1, 10)).logits, expected, rtol=1e-4, atol=1e-5)
assert not any(name.startswith("lori_trl") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's count of a process's memory")
def test_memory_does_not_grow_with_the_adapters(tmp_path):
    """Four adapters of 17 MB become one of 67 MB with less than half of that in memory."""
    shapes = {f"model.layers.{layer}.self_attn.q_proj": (1024, 1024) for layer in range(64)}
    adapters = [write_adapter(tmp_path / str(seed), seed, rank=32, shapes=shapes) for seed in range(4)]

    def peak() -> int:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(status["VmHWM"].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = peak()
    merged = merge_lori_adapters(adapters, 0.5, output_dir=tmp_path / "merged")
    assert peak() - before < 32e6
    assert (merged / "adapter_model.safetensors").stat().st_size > 64e6


# ---- LoRI ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lori_adapters(tmp_path_factory) -> list[Path]:
    """Two LoRI-S adapters of different tasks."""
    second = tmp_path_factory.mktemp("lori") / "math-lori-s"
    trainer = make_trainer(second, task_name="math")
    trainer.train()
    trainer.save_model()
    return [trained_adapter(), second]


def test_concat_keeps_every_tasks_mask_where_its_b_lies(lori_adapters, tmp_path):
    merged = merge_lori_adapters(lori_adapters, [0.5, 0.4], output_dir=tmp_path / "merged")
    state = load_file(merged / "adapter_model.safetensors")
    union = None
    for number, (folder, weight) in enumerate(zip(lori_adapters, (0.5, 0.4), strict=True)):
        config = json.loads((folder / "lori_config.json").read_text())
        own = load_file(folder / "adapter_model.safetensors")
        before = LoriMasks.from_pretrained(folder)
        after = LoriMasks.from_pretrained(merged, task=config["task"])
        assert after.num_selected == before.num_selected
        for path, mask in before.items():
            block = slice(4 * number, 4 * number + 4)
            assert torch.equal(after[path][:, block], mask) and not after[path][:, :4].all()
            name = f"base_model.model.{path}.lora_B.weight"
            assert torch.equal(state[name][:, block], own[name] * weight)
        union = after if union is None else union | after
    assert all(not state[f"base_model.model.{path}.lora_B.weight"][~mask].any() for path, mask in union.items())


def test_a_task_of_two_adapters_has_the_union_of_their_masks(lori_adapters, tmp_path):
    """Here of an adapter with itself: with `linear` the same mask, with `concat` twice as many entries."""
    mask = LoriMasks.from_pretrained(lori_adapters[0])
    for method, times in (("linear", 1), ("concat", 2)):
        merged = merge_lori_adapters(lori_adapters[:1] * 2, method=method, output_dir=tmp_path / method)
        assert LoriMasks.from_pretrained(merged, task="code").num_selected == times * mask.num_selected
    assert LoriMasks.from_pretrained(tmp_path / "linear", task="code") == mask


def test_what_lies_beside_the_merge(lori_adapters, tmp_path):
    merged = merge_lori_adapters(lori_adapters, [0.5, 0.4], output_dir=tmp_path / "merged")
    config = json.loads((merged / "lori_config.json").read_text())
    assert config["task"] == "code-math" and [record["task"] for record in config["tasks"]] == ["code", "math"]
    first = config["merge"]["adapters"][0]
    assert (first["task"], first["weight"], first["source"], first["rank"]) == ("code", 0.5, "code-lori-s", 4)
    for name, digest in first["sha256"].items():
        assert subprocess.check_output(["sha256sum", lori_adapters[0] / name], text=True).split()[0] == digest
    assert set(first["sha256"]) == {"adapter_config.json", "lori_config.json"}  # that has the tensors' own
    recipe = yaml.safe_load((merged / "recipe.yaml").read_text())
    assert recipe == {"adapters": [str(folder) for folder in lori_adapters], "weights": [0.5, 0.4], "method": "concat"}
    again = merge_lori_adapters(**recipe, output_dir=tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json", "lori_config.json", "masks/math.safetensors"):
        assert (merged / name).read_bytes() == (again / name).read_bytes()
    card = (merged / "README.md").read_text()
    assert "# Merged LoRI adapter: code-math" in card and "| math | 0.4 |" in card
    assert str(tmp_path) not in card + (merged / "lori_config.json").read_text()
    with safe_open(merged / "adapter_model.safetensors", framework="pt") as opened:
        A = {module_path(name): opened.get_tensor(name) for name in opened.keys() if ".lora_A." in name}  # noqa: SIM118
    assert config["projection"]["fingerprint"] == fingerprint(A)
    assert LoriMasks.from_pretrained(merged).projection == Projection(**config["projection"])


def test_one_adapter_keeps_the_seed_of_its_a(lori_adapters, tmp_path):
    merged = merge_lori_adapters(lori_adapters[:1], 1.0, output_dir=tmp_path / "merged")
    before, after = (json.loads((folder / "lori_config.json").read_text()) for folder in (lori_adapters[0], merged))
    assert before["projection"] == after["projection"]
    assert LoriMasks.from_pretrained(merged) == LoriMasks.from_pretrained(lori_adapters[0])


def test_a_merge_is_loaded_merged_packed_and_trained_like_any_adapter(lori_adapters, tmp_path):
    merged = merge_lori_adapters(lori_adapters, [0.5, 0.4], output_dir=tmp_path / "merged")
    model = load_lori_adapter(make_llama(), merged, is_trainable=True)
    assert list(model.lori_masks) == ["code", "math"]
    twice = merge_lori_adapters([merged, lori_adapters[0]], [1.0, -0.5], output_dir=tmp_path / "twice")
    assert_close(deltas(twice), {path: 0.4 * delta for path, delta in deltas(lori_adapters[1]).items()}, 1e-5)
    expand(export_compact(merged, tmp_path / "merged.safetensors"), tmp_path / "expanded")
    for name in ("adapter_model.safetensors", "masks/code.safetensors"):
        assert (tmp_path / "expanded" / name).read_bytes() == (merged / name).read_bytes()
    from_compact = merge_lori_adapters([tmp_path / "merged.safetensors"], 1.0, output_dir=tmp_path / "identity")
    assert_close(deltas(from_compact), deltas(merged), 0)
    trainer = make_trainer(tmp_path / "next", model, task_name="next")
    assert isinstance(trainer, LoriSFTTrainer)
    trainer.train()
    trainer.save_model()
    records = json.loads((tmp_path / "next" / "lori_config.json").read_text())["tasks"]
    assert [record["task"] for record in records] == ["code", "math", "next"]


def test_a_merge_is_pushed_and_merged_from_the_hub(lori_adapters, tmp_path, monkeypatch):
    merged = merge_lori_adapters(lori_adapters, [0.5, 0.4], output_dir=tmp_path / "merged")
    with adapter_files(merged, "me/merged") as files:
        assert set(files) == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "density.png",
            "lori_config.json",
            "masks/code.safetensors",
            "masks/math.safetensors",
            "recipe.yaml",
        }
    plain = write_adapter(tmp_path / "plain")
    with HubServer() as hub, client_of(hub, tmp_path / "home", monkeypatch):
        push_lori_to_hub(merged, "me/merged")
        names = ("adapter_config.json", "adapter_model.safetensors")
        push_files({name: plain / name for name in names}, "me/plain", commit_message="plain LoRA")
        again = merge_lori_adapters(["me/merged"], 1.0, output_dir=tmp_path / "again")
        lora = merge_lori_adapters(["me/plain"], 1.0, output_dir=tmp_path / "lora")
    assert_close(deltas(again), deltas(merged), 0)
    assert_close(deltas(lora), deltas(plain), 0)
    config = json.loads((lora / "lori_config.json").read_text())
    assert config["merge"]["adapters"][0]["source"] == "me/plain" and config["tasks"] == []


# ---- warnings --------------------------------------------------------------------------------------------------


def lori_A(seed: int):
    """Replace A by LoRI's, drawn from a seed."""

    def change(tensors):
        for name in tensors:
            if ".lora_A." in name:
                tensors[name] = draw_projection(module_path(name), *tensors[name].shape, seed=seed)

    return change


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_independent_a_bring_no_warning(tmp_path, caplog, rank):
    adapters = [write_adapter(tmp_path / str(seed), rank=rank, change=lori_A(seed)) for seed in range(4)]
    merged = merge_lori_adapters(adapters, output_dir=tmp_path / "merged")
    assert not caplog.records
    report = json.loads((merged / "lori_config.json").read_text())["merge"]["independence"]
    assert len(report) == 6 and not any(pair["same_A"] for pair in report)


def test_a_shared_a_is_named(tmp_path, caplog):
    adapters = [write_adapter(tmp_path / name, number, change=lori_A(1)) for number, name in enumerate("ab")]
    merge_lori_adapters(adapters, output_dir=tmp_path / "merged")
    assert "`a` and `b` have the same A" in caplog.text and "projection_seed" in caplog.text


def test_trained_a_of_one_start_are_named(tmp_path, caplog):
    def nearly(tensors):
        lori_A(1)(tensors)
        for name in tensors:
            if ".lora_A." in name:
                tensors[name] += 0.05 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(2))

    adapters = [write_adapter(tmp_path / "a", change=lori_A(1)), write_adapter(tmp_path / "b", change=nearly)]
    merge_lori_adapters(adapters, output_dir=tmp_path / "merged")
    assert "The A of `a` and `b` are not independent" in caplog.text


def test_mixed_dtypes_are_named(tmp_path, caplog):
    adapters = [write_adapter(tmp_path / "a"), write_adapter(tmp_path / "b", 1, dtype=torch.bfloat16)]
    merge_lori_adapters(adapters, output_dir=tmp_path / "merged")
    assert "a: F32, b: BF16" in caplog.text


# ---- bases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reduced"),
    [
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
        ("/models/Meta-Llama-3-8B/", "Meta-Llama-3-8B"),
        ("/hub/models--meta-llama--Meta-Llama-3-8B/snapshots/8cde5ca/", "meta-llama/Meta-Llama-3-8B"),
        (r"C:\models\Meta-Llama-3-8B", "Meta-Llama-3-8B"),
        ("", None),
        (None, None),
    ],
)
def test_names_of_bases_are_reduced_to_what_machines_have_in_common(name, reduced):
    assert base_name(name) == reduced


def test_a_local_copy_of_the_base_is_the_same_base(tmp_path, caplog):
    adapters = [
        write_adapter(tmp_path / "a", base="meta-llama/Meta-Llama-3-8B"),
        write_adapter(tmp_path / "b", 1, base="/models/meta-llama-3-8b"),
    ]
    merged = merge_lori_adapters(adapters, output_dir=tmp_path / "merged")
    assert LoraConfig.from_pretrained(merged).base_model_name_or_path == "meta-llama/Meta-Llama-3-8B"
    assert not caplog.records
    write_adapter(tmp_path / "c", 2, base=None)
    merge_lori_adapters([adapters[0], tmp_path / "c"], output_dir=tmp_path / "other")
    assert "c names no base model" in caplog.text


def test_different_bases_need_an_override(tmp_path):
    adapters = [
        write_adapter(tmp_path / "a", base="meta-llama/Meta-Llama-3-8B"),
        write_adapter(tmp_path / "b", 1, base="NousResearch/Meta-Llama-3-8B"),
    ]
    refuse("different base models .*a: meta-llama/.*b: NousResearch/", adapters, tmp_path / "merged")
    merged = merge_lori_adapters(adapters, output_dir=tmp_path / "merged", base_model="meta-llama/Meta-Llama-3-8B")
    assert LoraConfig.from_pretrained(merged).base_model_name_or_path == "meta-llama/Meta-Llama-3-8B"
    wider = {path: (rows, 2 * columns) for path, (rows, columns) in SHAPES.items()}
    other = write_adapter(tmp_path / "c", shapes=wider)
    what = "has 16 inputs and 24 outputs in `a`, 32 and 24 in `c`"
    refuse(what, [adapters[0], other], tmp_path / "wider", base_model="me/base")


# ---- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        (r"`weights=\[0.5\]` are 1 for 2 adapters", {"weights": [0.5]}),
        (r"`weights=\[0.0, 0.0\]` are all 0", {"weights": 0.0}),
        ("not all finite", {"weights": [1.0, math.nan]}),
        ("`method='conact'` is not known .did you mean concat", {"method": "conact"}),
        ("`density=None` with `method='ties'`", {"method": "ties"}),
        ("must be in .0, 1", {"method": "dare", "density": 1.5}),
        ("has no meaning with `method='concat'`", {"density": 0.5}),
    ],
)
def test_a_wrong_call_is_refused(tmp_path, what, arguments):
    adapters = [write_adapter(tmp_path / str(seed), seed) for seed in range(2)]
    refuse(what, adapters, tmp_path / "merged", **arguments)


def test_what_is_missing_or_broken_is_refused(tmp_path):
    good = write_adapter(tmp_path / "good")
    out = tmp_path / "merged"
    refuse("is no list of adapters", [], out)
    refuse("is no list of adapters", str(good), out)
    refuse("`.*nowhere` does not exist", [good, tmp_path / "nowhere"], out, FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refuse("holds no adapter_config.json", [good, tmp_path / "empty"], out, FileNotFoundError)
    for name, content in (("adapter_config.json", "{"), ("adapter_model.safetensors", "no tensors here")):
        broken = shutil.copytree(good, tmp_path / f"broken-{name}")
        (broken / name).write_text(content)
        refuse(name, [good, broken], out)
    other_rank = write_adapter(tmp_path / "rank", rank=3)
    refuse("rank 3 in `rank`, 4 in `good`.*method='concat'", [good, other_rank], out, method="linear")


def test_a_task_without_its_masks_is_refused(lori_adapters, tmp_path):
    broken = shutil.copytree(lori_adapters[0], tmp_path / "broken")
    (broken / "masks" / "code.safetensors").unlink()
    refuse("holds no masks", [broken, lori_adapters[1]], tmp_path / "merged", FileNotFoundError)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["A", "B"])
def test_what_is_not_finite_is_refused(tmp_path, value, part):
    def change(tensors):
        tensors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight"][1, 2] = value

    adapters = [write_adapter(tmp_path / "good"), write_adapter(tmp_path / "bad", 1, change=change)]
    refuse(f"`.*bad`: lora_{part} of model.layers.0.self_attn.q_proj has 1 entries", adapters, tmp_path / "merged")


def test_large_finite_entries_are_no_fault(tmp_path):
    def change(tensors):
        for tensor in tensors.values():
            tensor.fill_(1e38)

    merge_lori_adapters([write_adapter(tmp_path / "a", change=change)], 1.0, output_dir=tmp_path / "merged")


@pytest.mark.parametrize(
    ("what", "config", "extra"),
    [
        ("use_dora=True .DoRA", {"use_dora": True}, None),
        ("modules_to_save=.*whole modules", {"modules_to_save": ["lm_head"]}, None),
        ("bias='all'", {"bias": "all"}, None),
        ("init_lora_weights='pissa'", {"init_lora_weights": "pissa"}, None),
        ("target_parameters=", {"target_parameters": ["mlp.experts.up"]}, None),
        ("1 tensors that cannot be merged: .*embed_tokens", {}, "base_model.model.model.embed_tokens.weight"),
        ("1 tensors that cannot be merged: .*magnitude", {}, "base_model.model.x.lora_magnitude_vector"),
        ("1 tensors that cannot be merged: x", {}, "base_model.model.x.lora_A.weight"),
    ],
)
def test_other_forms_of_lora_are_refused(tmp_path, what, config, extra):
    def change(tensors):
        if extra is not None:
            tensors[extra] = torch.ones(4, 4)

    adapters = [write_adapter(tmp_path / "good"), write_adapter(tmp_path / "other", 1, change=change, **config)]
    refuse(what, adapters, tmp_path / "merged")


def test_an_adapter_without_tensors_or_of_another_dtype_is_refused(tmp_path):
    refuse("holds no tensors", [write_adapter(tmp_path / "none", change=dict.clear)], tmp_path / "merged")
    double = write_adapter(tmp_path / "double", dtype=torch.float64)
    refuse("tensors that cannot be merged: F64", [double], tmp_path / "merged")


def test_a_merge_that_changes_nothing_is_refused(tmp_path):
    def untrained(tensors):
        for name in tensors:
            if ".lora_B." in name:
                tensors[name].zero_()

    adapters = [write_adapter(tmp_path / str(seed), seed, change=untrained) for seed in range(2)]
    refuse("every entry of its B is 0", adapters, tmp_path / "merged")
    same = [write_adapter(tmp_path / "a"), write_adapter(tmp_path / "b")]
    refuse("every entry of its B is 0", same, tmp_path / "merged", method="linear", weights=[1.0, -1.0])


def test_an_input_is_not_written_over(tmp_path):
    adapter = write_adapter(tmp_path / "a")
    before = {file.name: file.read_bytes() for file in adapter.iterdir()}
    with pytest.raises(ValueError, match="lie in each other"):
        merge_lori_adapters([adapter], output_dir=tmp_path / "." / "a")
    assert before == {file.name: file.read_bytes() for file in adapter.iterdir()}


def test_a_failed_merge_leaves_the_last_one_whole(tmp_path):
    def diverged(tensors):
        tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"][0, 0] = math.nan

    merged = merge_lori_adapters([write_adapter(tmp_path / "a")], output_dir=tmp_path / "merged")
    before = {file: file.read_bytes() for file in merged.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="NaN or infinite"):
        merge_lori_adapters([write_adapter(tmp_path / "b", change=diverged)], output_dir=merged, overwrite=True)
    with pytest.raises(FileExistsError, match="holds an adapter already.*overwrite=True"):
        merge_lori_adapters([tmp_path / "a"], 0.5, output_dir=merged)
    assert before == {file: file.read_bytes() for file in merged.rglob("*") if file.is_file()}


def test_regexes_and_layer_choices_become_the_modules_they_meant(tmp_path):
    adapter = write_adapter(tmp_path / "a", target_modules=r".*\.(up|q|v)_proj")
    config = LoraConfig.from_pretrained(merge_lori_adapters([adapter], output_dir=tmp_path / "merged"))
    assert config.target_modules == set(SHAPES)


# ---- recipes and the command line ------------------------------------------------------------------------------

RECIPES = sorted(shipped_folder("recipes").glob("merge/*.yaml"))
# Tables 8 to 10: table -> adapters, weight of LoRA and LoRI-D, weight of LoRI-S.
TABLES = {8: (4, 0.4, 0.3), 9: (4, 0.4, 0.3), 10: (3, 0.5, 0.4)}
DENSITIES = {"magnitude": 0.3, "ties": 0.7, "dare": 0.7}


def test_the_recipes_are_the_papers_27_merges():
    methods = {
        "lora": ["concat", "linear", *DENSITIES],
        "lori_d": ["concat", "linear"],
        "lori_s": ["concat", "linear"],
    }
    rows = [(table, variant, method) for table in TABLES for variant in methods for method in methods[variant]]
    assert len(rows) == 27 and {file.stem for file in RECIPES} == {f"table{t}_{v}_{m}" for t, v, m in rows}
    for table, variant, method in rows:
        count, dense, sparse = TABLES[table]
        suffix = variant.replace("_", "-") + "-mistral" * (table == 9)
        assert read_recipe(find_recipe(f"table{table}_{variant}_{method}")) == {
            "adapters": [f"{task}-{suffix}" for task in ("nlu", "math", "code", "safety")[:count]],
            "weights": sparse if variant == "lori_s" else dense,
            "method": "linear_peft" if method == "linear" else method,  # the authors' code merged by PEFT's
            **({"density": DENSITIES[method]} if method in DENSITIES else {}),
            **({"seed": 0} if method == "dare" else {}),
        }


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_runs_as_its_header_says(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    runs = [shlex.split(line.partition(":")[2]) for line in header if line.startswith(("# Run:", "# Override:"))]
    assert [run[:4] for run in runs] == [["lori", "merge", "--recipe", file.name]] * 2
    recipe = read_recipe(file)
    for seed, name in enumerate(recipe["adapters"]):
        write_adapter(tmp_path / name, seed)
    for run, weight in zip(runs, (recipe["weights"], 0.25), strict=True):
        assert main(run[1:]) == 0
        merge = json.loads(Path("merged", "lori_config.json").read_text())["merge"]
        assert [adapter["weight"] for adapter in merge["adapters"]] == [weight] * len(recipe["adapters"])
        assert merge["method"] == recipe["method"] and merge.get("density") == recipe.get("density")
        shutil.rmtree("merged")
    assert main(["recipes", "validate", str(file)]) == 0


def test_the_command_line_merges_as_python_does(tmp_path, capsys):
    adapters = [str(write_adapter(tmp_path / str(seed), seed)) for seed in range(2)]
    merge_lori_adapters(adapters, [0.5, -0.2], "ties", tmp_path / "python", density=0.5)
    options = ["--weights", "0.5", "-0.2", "--method", "ties", "--density", "0.5"]
    assert main(["merge", *adapters, *options, "--output_dir", str(tmp_path / "command")]) == 0
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("python", "command"))
    assert first.read_bytes() == second.read_bytes()
    assert "-0.2" in capsys.readouterr().out


def test_the_command_line_knows_every_method():
    choices = next(action.choices for action in recipe_parser()._actions if action.dest == "method")
    assert choices == list(METHODS)


def test_bad_input_on_the_command_line_is_one_message(tmp_path, capsys):
    adapter = str(write_adapter(tmp_path / "a"))
    out = ["--output_dir", str(tmp_path / "merged")]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"adapters: [{adapter}]\nwieghts: 0.5\ndensity: 2\nmethod: tie\n")
    for arguments, says in (
        ([adapter, "--weights", "0.5", "0.5"], "are 2 for 1 adapters"),
        ([str(tmp_path / "nowhere")], "does not exist"),
        ([], "is no list of adapters"),
        (["--recipe", str(recipe)], "has 3 faults"),
        (["--recipe", "table8_lori_s_concat"], "`nlu-lori-s` does not exist"),
    ):
        with pytest.raises(SystemExit) as raised:
            main(["merge", *arguments, *out])
        error = capsys.readouterr().err
        assert raised.value.code == 2 and says in error and "Traceback" not in error
        assert not (tmp_path / "merged").exists()


# ---- the search for weights ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tmp_path_factory, model_folder) -> tuple[list[Path], dict[str, Path]]:
    """Two adapters that know their own words by heart, too strongly, and a held-out file of each."""
    folder = tmp_path_factory.mktemp("searched")
    adapters, heldout = [], {}
    for word in ("w7", "w8"):
        rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" {word} {word}"} for i in range(20, 32)]
        heldout[word] = folder / f"{word}.jsonl"
        heldout[word].write_text("\n".join(map(json.dumps, rows[:8])))
        changes = {"task_name": word, "sparsity": 0.0, "max_steps": 30, "learning_rate": 1e-2}
        trainer = make_trainer(
            folder / f"{word}-lori",
            str(model_folder),
            peft_config=lora_config(),
            train_dataset=Dataset.from_list(rows),
            **changes,
        )
        trainer.train()
        trainer.save_model()
        adapters.append(folder / f"{word}-lori")
    return adapters, heldout


def read_rows(heldout: dict[str, Path]) -> dict[str, list]:
    return {name: list(map(json.loads, file.read_text().splitlines())) for name, file in heldout.items()}


@pytest.mark.parametrize("method", ["concat", "linear", "dare"])
def test_the_losses_of_a_search_are_those_of_the_merges(searched, tmp_path, model_folder, tokenizer, method):
    adapters, heldout = searched
    rows, density = read_rows(heldout), 0.8 if method == "dare" else None
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    search = search_merge_weights(
        adapters, rows, model, tokenizer, method=method, grid=(0.5, 1.0), density=density, seed=3
    )
    assert [trial.weights for trial in search.trials] == [(0.5, 0.5), (1.0, 1.0)]
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    for name in rows:
        assert search.base.losses[name] == pytest.approx(completion_loss(model, tokenizer, rows[name]).loss, rel=1e-6)
    for trial in search.trials:
        folder = tmp_path / str(trial.weights[0])
        merge_lori_adapters(adapters, trial.weights, method, folder, density=density, seed=3)
        merged = PeftModel.from_pretrained(model, folder)
        for name, loss in trial.losses.items():
            assert loss == pytest.approx(completion_loss(merged, tokenizer, rows[name]).loss, rel=1e-5)
        model = merged.unload()


def test_a_coordinate_search_goes_on_from_the_best_shared_weight(searched, tokenizer, model_folder):
    adapters, heldout = searched
    rows = read_rows({"w7": heldout["w7"]})  # only the first adapter's task counts
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    grid = (0.1, 0.5, 1.0)
    shared = search_merge_weights(adapters, rows, model, tokenizer, grid=grid)
    search = search_merge_weights(adapters, rows, model, tokenizer, grid=grid, strategy="coordinate")
    assert search.trials[:3] == shared.trials and len({trial.weights for trial in search.trials}) == len(search.trials)
    assert search.best.objective <= shared.best.objective
    assert search.best.weights[0] > search.best.weights[1]
    for number in range(2):  # no single change within the grid is better
        for weight in grid:
            weights = list(search.best.weights)
            weights[number] = weight
            tried = {trial.weights: trial.objective for trial in search.trials}
            assert tried[tuple(weights)] >= search.best.objective


def test_the_command_line_searches_merges_and_keeps_the_table(searched, tmp_path, capsys):
    adapters, heldout = searched
    files = [str(file) for file in heldout.values()]
    arguments = [*map(str, adapters), "--search", "shared", "--grid", "0.2", "0.6", "--heldout", *files]
    assert main(["merge", *arguments, "--output_dir", str(tmp_path / "merged")]) == 0
    printed = capsys.readouterr().out
    assert "completion loss by weights" in printed and "base model" in printed
    config = json.loads((tmp_path / "merged" / "lori_config.json").read_text())
    search = config["merge"]["search"]
    assert [trial["weights"] for trial in search["trials"]] == [[0.2, 0.2], [0.6, 0.6]]
    best = min(search["trials"], key=lambda trial: trial["objective"])
    assert best["objective"] == pytest.approx(sum(best["losses"].values()) / 2)
    assert best["objective"] < sum(search["base"].values()) / 2
    assert [adapter["weight"] for adapter in config["merge"]["adapters"]] == best["weights"]
    assert f"{best['objective']:.4f}" in printed and str(tmp_path) not in json.dumps(config)


def test_a_wrong_search_is_one_message(searched, tmp_path, capsys, model_folder):
    adapters, heldout = searched
    file = str(heldout["w7"])
    other = str(write_adapter(tmp_path / "other", base=str(model_folder)))
    for arguments, says in (
        (["--heldout", file], "without `--search`"),
        (["--search", "shared"], "`heldout` names no data"),
        (["--search", "shared", "--heldout", file, file], "names a file twice"),
        (["--search", "shared", "--heldout", file, "--grid", "0"], "`grid=[0.0]` is empty or has a 0"),
        (["--search", "shared", "--heldout", file, "--weights", "1"], "exclude each other"),
        (["--search", "shared", "--heldout", str(tmp_path / "none.jsonl")], "none.jsonl"),
    ):
        with pytest.raises(SystemExit) as raised:
            main(["merge", *map(str, adapters), *arguments, "--output_dir", str(tmp_path / "merged")])
        assert raised.value.code == 2 and says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["merge", other, "--search", "shared", "--heldout", file, "--output_dir", str(tmp_path / "merged")])
    assert "does not fit" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
