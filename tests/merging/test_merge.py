"""The merged adapter's files: what they hold, and what stays as it was."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import HubServer, client_of
from merging.adapters import SHAPES, assert_close, deltas, refuse, write_adapter
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import make_llama, make_trainer

from lori_trl import LoriMasks, LoriSFTTrainer, load_lori_adapter, merge_lori_adapters, push_lori_to_hub
from lori_trl.adapter.push import adapter_files
from lori_trl.compact import expand, export_compact
from lori_trl.hub.commit import push_files
from lori_trl.merging import METHODS
from lori_trl.merging.methods import PRUNING
from lori_trl.method.layers import module_path
from lori_trl.method.projections import Projection, fingerprint


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
    assert "# Merged adapter: code-math" in card and "| math | 0.4 |" in card
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
            "tokenizer.json",
            "tokenizer_config.json",
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


def test_large_finite_entries_are_no_fault(tmp_path):
    def change(tensors):
        for tensor in tensors.values():
            tensor.fill_(1e38)

    merge_lori_adapters([write_adapter(tmp_path / "a", change=change)], 1.0, output_dir=tmp_path / "merged")


@pytest.mark.parametrize("method", METHODS)
def test_a_result_that_is_not_finite_is_refused_and_nothing_written(tmp_path, method):
    adapters = [write_adapter(tmp_path / str(seed), seed) for seed in range(2)]
    density = 0.5 if method in PRUNING else None
    what = "`weights=.1e.300, 1e.300.` give A or B of model.layers.0.mlp.up_proj .* that are not finite"
    refuse(what, adapters, tmp_path / "merged", weights=[1e300, 1e300], method=method, density=density)


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


def test_the_tokenizer_that_all_inputs_have_is_the_merged_adapters(lori_adapters, peft_adapters, tmp_path, caplog):
    first, second = (shutil.copytree(folder, tmp_path / folder.name) for folder in lori_adapters)
    for folder in (first, second):
        (folder / "chat_template.jinja").write_text("its own")
    merged = merge_lori_adapters([peft_adapters[0], first, second], output_dir=tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (merged / name).read_bytes() == (second / name).read_bytes()
    assert 'AutoTokenizer.from_pretrained("path/to/this/folder")' in (merged / "README.md").read_text()
    (second / "chat_template.jinja").write_text("another")
    again = merge_lori_adapters([first, second], output_dir=merged, overwrite=True)
    assert not list(again.glob("*token*")) and not list(again.glob("*template*"))
    assert "different tokenizers (chat_template.jinja)" in caplog.text


def test_a_rank_that_vllm_takes_only_if_told_is_named(tmp_path, caplog):
    adapters = [write_adapter(tmp_path / str(seed), seed, rank=12) for seed in range(3)]
    merge_lori_adapters(adapters[:1], output_dir=tmp_path / "one")
    assert "vLLM" not in caplog.text
    merge_lori_adapters(adapters, output_dir=tmp_path / "three")
    assert "has rank 36" in caplog.text and "`--max-lora-rank 64`, or merge by `svd`" in caplog.text
