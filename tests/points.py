"""
Install the wheel with pip alone at one point of what `pyproject.toml` allows, and do there what people do.

    PYTHON=python3.12 python tests/points.py lowest|newest|PIN...     e.g. trl==1.10.0 transformers==5.16.1

A run on the quickstart's rows, the same resumed, a second task, DPO, a merge, a push to a server on this machine and
plain PEFT on what was pushed. The environment is deleted at the end. What was seen is a row of `docs/installing.md`.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder
from hub_server import TOKEN, HubServer
from tiny import make_llama, make_tokenizer

ROOT = Path(__file__).parents[1]
TORCH = "torch==2.13.0"
PACKAGES = ("trl", "transformers", "peft", "accelerate", "datasets", "huggingface-hub", "torch", "safetensors")
SHORT = "--max_steps 4 --calibration_max_steps 2 --save_strategy steps --save_steps 2 --eval_strategy no "
SHORT += "--eval_on_start no --per_device_train_batch_size 2 --max_length 64"

DPO = """
import sys
from datasets import load_dataset
from lori_trl import LoriDPOConfig, LoriDPOTrainer
from peft import LoraConfig
rows = load_dataset("json", data_files=sys.argv[2], split="train").select(range(8))
rows = rows.map(lambda row: {"chosen": row["completion"], "rejected": row["completion"][::-1]})
rows = rows.select_columns(["prompt", "chosen", "rejected"])
args = LoriDPOConfig("dpo", task_name="dpo", max_steps=2, calibration_max_steps=2, per_device_train_batch_size=2,
                     max_length=64, use_cpu=True, report_to="none")
trainer = LoriDPOTrainer(model=sys.argv[1], args=args, train_dataset=rows,
                         peft_config=LoraConfig(r=4, target_modules="all-linear"))
trainer.train()
trainer.save_model()
outside = sum(int(weight.detach().masked_fill(trainer.masks[path], 0).count_nonzero())
              for path, weight in trainer.run.weights.items())
inside = sum(int(weight.count_nonzero()) for weight in trainer.run.weights.values())
assert outside == 0 and 0 < inside <= trainer.masks.num_selected, (outside, inside)
"""
PLAIN_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
here, there = (PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), name).eval()
               for name in sys.argv[2:])
tokens = torch.arange(12).view(2, 6)
with torch.no_grad(), here.disable_adapter():
    base = here(tokens).logits
assert torch.equal(here(tokens).logits, there(tokens).logits) and not torch.equal(base, here(tokens).logits)
assert not any(name.startswith("lori_trl") for name in sys.modules)
"""


def pip_arguments(point: list[str], top: Path) -> list[str]:
    if point == ["newest"]:
        return ["--pre"]
    if point != ["lowest"]:
        return point
    lowest = subprocess.run([sys.executable, ROOT / "tests/lowest_versions.py"], check=True, capture_output=True)
    (top / "constraints.txt").write_bytes(lowest.stdout)
    return ["--constraint", str(top / "constraints.txt")]


def check(point: list[str], top: Path, hub: HubServer) -> str:
    """Do all of it. Returns the row; what fails raises."""
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(top), versions=["standard"])
    began = time.monotonic()
    subprocess.run([os.environ.get("PYTHON", sys.executable), "-m", "venv", top / "venv"], check=True)
    programs = top / "venv" / "bin"
    pip = [programs / "python", "-m", "pip"]
    subprocess.run([*pip, "install", "-qq", TORCH, wheel, *pip_arguments(point, top)], check=True)
    listed = subprocess.run([*pip, "list", "--format", "json"], check=True, capture_output=True).stdout
    versions = {each["name"].replace("_", "-"): each["version"] for each in json.loads(listed)}
    installed = time.monotonic()
    model, folder = top / "model", top / "elsewhere"
    make_llama().save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    folder.mkdir()
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    offline = variables | {"HF_HUB_OFFLINE": "1"}

    def run(*command: object, environment: dict[str, str] = offline) -> None:
        subprocess.run([programs / str(command[0]), *map(str, command[1:])], cwd=folder, env=environment, check=True)

    def adapter(name: str) -> bytes:
        return (folder / name / "adapter_model.safetensors").read_bytes()

    call = ["lori-sft", "--recipe", "quickstart.yaml", "--model_name_or_path", model, *SHORT.split()]
    run("lori", "--version")
    run(*call, "--output_dir", "first")
    undisturbed = adapter("first")
    shutil.rmtree(folder / "first" / "checkpoint-4")
    (folder / "first" / "adapter_model.safetensors").unlink()
    run(*call, "--output_dir", "first", "--resume_from_checkpoint", "True")
    assert adapter("first") == undisturbed, "a resumed run ended in another adapter"
    run(*call, "--output_dir", "second", "--task_name", "second")
    run("python", "-c", DPO, model, ROOT / "recipes" / "quickstart" / "train.jsonl")
    run("lori", "merge", "first", "second", "--output_dir", "merged")
    assert adapter("merged")
    online = variables | hub.environment(str(top / "home")) | {"HF_TOKEN": TOKEN}
    run("lori", "push", "first", "me/first", environment=online)
    run("python", "-c", PLAIN_PEFT, model, folder / "first", "me/first", environment=online)
    seconds = f"{installed - began:.0f} s, {time.monotonic() - installed:.0f} s"
    return " | ".join([" ".join(point), *(versions[name] for name in PACKAGES), seconds])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as top, HubServer() as hub:
        print(f"| {check(sys.argv[1:], Path(top), hub)} |")
