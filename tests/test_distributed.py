"""Two ranks with gloo on the CPU: the same masks, the same result as one process, and shards that add up."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lori_trl import LoriMasks

SCRIPT = Path(__file__).with_name("distributed_run.py")


def run_on_two_ranks(case, folder):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT, case, folder]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert (folder / "passed").is_file(), result.stderr[-4000:]


@pytest.mark.parametrize("case", ["selection", "fsdp2"])
def test_shards(case, tmp_path):
    run_on_two_ranks(case, tmp_path)


def test_ddp_equals_one_process_with_the_same_global_batch(make_trainer, tmp_path):
    run_on_two_ranks("ddp", tmp_path)
    alone = make_trainer(output_dir=str(tmp_path / "alone"))
    alone.train()
    masks = LoriMasks.from_pretrained(tmp_path / "out")
    assert masks == alone.masks and masks.projection == alone.projection
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for path, weight in alone.weights.items():
        B = saved[f"base_model.model.{path}.lora_B.weight"]
        torch.testing.assert_close(B, weight.detach(), rtol=1e-3, atol=2e-5)
        assert torch.equal(B[~masks[path]], torch.zeros_like(B)[~masks[path]])
    assert (tmp_path / "out" / "checkpoint-4" / "masks" / "code.safetensors").is_file()
