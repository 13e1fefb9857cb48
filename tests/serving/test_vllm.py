"""A real vLLM server finds compact adapters by name, and answers as PEFT does, token for token.

vLLM pins a transformers of its own, so it runs in `.venv-vllm`, which `make test-serving` makes.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from files_by_hand import change_tensors
from peft import LoraConfig, PeftModel
from tiny import make_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from lori_trl import LoriSFTConfig, LoriSFTTrainer
from lori_trl.compact import export_compact

pytestmark = pytest.mark.serving
ROOT = Path(__file__).parents[2]
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
COUNT, TOKENS = 20, 8
PROMPT = "The three largest cities of Europe are"


def smollm2() -> str:
    sys.path.insert(0, str(ROOT / "examples"))
    from quickstart import smollm2

    return smollm2()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    """Twenty LoRI adapters of SmolLM2-135M: one that was trained for a step, with other values each time."""
    folder = tmp_path_factory.mktemp("customers")
    trainer = LoriSFTTrainer(
        model=smollm2(),
        args=LoriSFTConfig(
            str(folder / "first"),
            task_name="customer",
            calibration_method="random",
            max_steps=1,
            per_device_train_batch_size=1,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=make_rows(),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()
    found = {}
    for number in range(COUNT):
        name = f"customer-{number:02}"
        found[name] = shutil.copytree(folder / "first", folder / name)
        draw = torch.Generator().manual_seed(number)

        def change(tensors, draw=draw):
            for key, tensor in tensors.items():
                if ".lora_B." in key:
                    tensor.copy_((tensor != 0) * 1.5 * torch.randn(tensor.shape, generator=draw))

        change_tensors(found[name], change)
    return found


@pytest.fixture(scope="module")
def answers(adapters) -> dict[str, str]:
    """PEFT's greedy answers."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    base = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    inputs, found = tokenizer(PROMPT, return_tensors="pt"), {}
    for name, folder in adapters.items():
        model = PeftModel.from_pretrained(base, folder)
        output = model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        found[name] = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
        base = model.unload()
    return found


@pytest.fixture(scope="module")
def server(adapters, tmp_path_factory):
    """A server whose folder holds all adapters but the last, compact, and a damaged one."""
    folder = tmp_path_factory.mktemp("served")
    for name, adapter in list(adapters.items())[:-1]:
        export_compact(adapter, folder / f"{name}.safetensors")
    content = bytearray((folder / "customer-00.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "damaged.safetensors").write_bytes(content)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", smollm2(), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    command += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--max-cpu-loras", "4"]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "LORI_ADAPTERS": str(folder),
        "LORI_CACHE": str(tmp_path_factory.mktemp("unpacked")),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    log = (tmp_path_factory.mktemp("log") / "vllm.txt").open("w+")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            if process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        else:
            process.kill()
        log.seek(0)
        assert process.poll() is None, log.read()[-5000:]
        yield f"http://127.0.0.1:{port}/v1/completions", folder
    finally:
        process.terminate()
        process.wait(60)


def ask(url: str, name: str) -> str:
    body = {"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "min_tokens": TOKENS, "temperature": 0}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]["text"]


def refused(url: str, name: str) -> str:
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(url, name)
    return f"{error.value.code} {error.value.read().decode()}"


def test_each_answer_is_pefts(server, answers):
    url, _ = server
    assert len({*answers.values()}) > COUNT / 2
    served = list(answers)[:-1]
    with ThreadPoolExecutor(4) as pool:  # mixed in one batch
        found = dict(zip(served, pool.map(lambda name: ask(url, name), served), strict=True))
    assert found == {name: answers[name] for name in served}


def test_a_new_adapter_is_served_while_it_runs(server, adapters, answers):
    url, folder = server
    name, adapter = list(adapters.items())[-1]
    assert refused(url, name).startswith("404")
    export_compact(adapter, folder / f"{name}.safetensors")
    assert ask(url, name) == answers[name]


def test_a_bad_adapter_fails_by_name_and_the_others_go_on(server, answers):
    url, _ = server
    message = refused(url, "damaged")
    assert "damaged" in message and "checksum" in message, message
    assert refused(url, "../served/customer-00").startswith("404")
    assert ask(url, "customer-01") == answers["customer-01"]
