"""The methods: exact where mathematics allows, PEFT's where it is PEFT's."""

import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merging.adapters import SHAPES, assert_close, deltas, factors, refuse, write_adapter
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny import make_llama

from lori_trl import merge_lori_adapters
from lori_trl.adapter.record import read_record
from lori_trl.merging import METHODS
from lori_trl.merging.methods import PRUNING


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
    density = 0.5 if method in PRUNING else None
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


@pytest.mark.parametrize(
    ("method", "theirs", "density"),
    [
        ("concat", "cat", None),
        ("linear_peft", "linear", None),
        ("magnitude", "magnitude_prune", 0.3),
        ("ties", "ties", 0.7),
        ("dare", "dare_linear", 0.7),
        ("dare", "dare_linear", 1.0),
        ("dare_ties", "dare_ties", 0.7),
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


@pytest.mark.release
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


@pytest.mark.parametrize("rank", [1, 5, 8, 30])
def test_svd_is_the_best_approximation_of_its_rank(tmp_path, rank):
    """Against the decomposition of the whole delta, which the method never makes."""
    adapters = [write_adapter(tmp_path / "a", 1), write_adapter(tmp_path / "b", 2, rank=5, alpha=7)]
    first, second = (deltas(adapter) for adapter in adapters)
    merged = merge_lori_adapters(adapters, [0.5, -0.8], "svd", tmp_path / "merged", rank=rank)
    lost = read_record(merged).merge.lost or {}
    for path, delta in deltas(merged).items():
        whole = 0.5 * first[path] - 0.8 * second[path]
        U, values, Vh = torch.linalg.svd(whole, full_matrices=False)
        best = (U[:, :rank] * values[:rank]) @ Vh[:rank]
        assert (delta - best).norm() <= 1e-5 * whole.norm()
        share = ((whole - best).norm() / whole.norm()).item()
        assert lost.get(path, 0.0) == pytest.approx(share, abs=1e-5)
    config = LoraConfig.from_pretrained(merged)
    assert config.r == rank and not (merged / "masks").exists()


def test_svd_keeps_by_default_the_highest_rank(tmp_path):
    adapters = [write_adapter(tmp_path / "a", 1), write_adapter(tmp_path / "b", 2, rank=5)]
    assert LoraConfig.from_pretrained(merge_lori_adapters(adapters, 1.0, "svd", tmp_path / "merged")).r == 5


@pytest.mark.parametrize(("method", "rank"), [("svd", 0), ("svd", 2.5), ("concat", 4)])
def test_a_rank_that_means_nothing_is_refused(tmp_path, method, rank):
    refuse("`rank=", [write_adapter(tmp_path / "a")], tmp_path / "merged", method=method, rank=rank)
