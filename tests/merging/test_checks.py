"""What cannot be merged is refused, nothing is written then, and what is doubtful is named."""

import json
import math
import shutil

import pytest
import torch
from merging.adapters import SHAPES, refuse, write_adapter
from peft import LoraConfig

from lori_trl import merge_lori_adapters
from lori_trl.adapter.folder import base_name
from lori_trl.method.layers import module_path
from lori_trl.method.projections import draw_projection


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
    assert all("--max-lora-rank" in record.getMessage() for record in caplog.records)  # of vLLM, not of A
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
