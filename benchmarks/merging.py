"""Merging four adapters of Llama-3-8B's shapes, r = 32, by concatenation: time and memory.

    python benchmarks/merging.py

Peers: reading the inputs and writing as many bytes as the output has, once; and PEFT's `add_weighted_adapter` (`cat`)
on a base built on the meta device. Every run is a process of its own; time starts after its imports, memory is the
highest resident set of the whole process. The inputs are in the page cache for all, and no one waits for the disk.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import report, summary
from llama_3_8b import FILE, RANK, config, write_adapter
from rich.progress import track

ADAPTERS, ROUNDS, WEIGHT = 4, 5, 0.3
CHUNK = 1 << 24


def write_adapters(folder: Path) -> None:
    for number in range(ADAPTERS):
        write_adapter(folder / f"task{number}", "meta-llama/Meta-Llama-3-8B", number)


def read_and_write(inputs: list[Path], output: Path) -> float:
    """Read all inputs and write as many bytes."""
    buffer = memoryview(bytearray(CHUNK))
    size = sum((adapter / FILE).stat().st_size for adapter in inputs)
    output.mkdir()
    start = time.perf_counter()
    for adapter in inputs:
        with open(adapter / FILE, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with open(output / FILE, "wb", buffering=0) as file:
        for done in range(0, size, CHUNK):
            file.write(buffer[: min(CHUNK, size - done)])
    return time.perf_counter() - start


def lori(inputs: list[Path], output: Path) -> float:
    from lori_trl.merging import merge_lori_adapters

    start = time.perf_counter()
    merge_lori_adapters(inputs, WEIGHT, "concat", output)
    return time.perf_counter() - start


def peft(inputs: list[Path], output: Path) -> float:
    """Merge through PEFT. A base whose weights are on the meta device would take the merged adapter there, too, and
    lose it; so its linear layers have a weight on the CPU, of a single number that stands for all."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    start = time.perf_counter()
    with torch.device("meta"):
        base = LlamaForCausalLM(config())
    for module in base.modules():
        if isinstance(module, torch.nn.Linear):
            weight = torch.zeros(1).expand(module.out_features, module.in_features)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    names = [adapter.name for adapter in inputs]
    model = PeftModel.from_pretrained(base, inputs[0], adapter_name=names[0], low_cpu_mem_usage=True)
    for adapter in inputs[1:]:
        model.load_adapter(adapter, adapter_name=adapter.name, low_cpu_mem_usage=True)
    model.base_model.add_weighted_adapter(names, [WEIGHT] * len(names), "merged", combination_type="cat")
    model.save_pretrained(output, selected_adapters=["merged"])
    return time.perf_counter() - start


CONTESTANTS = {"read_and_write": read_and_write, "lori": lori, "peft": peft}


def measured(name: str, folder: Path, output: Path) -> dict[str, float]:
    """Run one contestant in a process of its own."""
    command = [sys.executable, __file__, name, str(folder), str(output)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(name: str, folder: Path, output: Path) -> None:
    """Be that process."""
    if name == "lori":
        import lori_trl.merging  # noqa: F401
    if name == "peft":
        import peft  # noqa: F401
    seconds = CONTESTANTS[name](sorted(folder.glob("task*")), output)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({"seconds": seconds, "peak_bytes": 1024 * int(status["VmHWM"].split()[0])}))


def largest_difference(first: Path, second: Path) -> float:
    """Return the largest relative difference between the deltas of two merges, over all modules; both scalings are
    read from their files."""
    from peft import LoraConfig
    from safetensors import safe_open

    scalings = [config.lora_alpha / config.r for config in map(LoraConfig.from_pretrained, (first, second))]
    largest = 0.0
    with safe_open(first / FILE, "pt") as one, safe_open(second / FILE, "pt") as two:
        for name in one.keys():  # noqa: SIM118
            if ".lora_A." in name and ".layers.0." in name:
                deltas = [
                    scaling * file.get_tensor(name.replace("lora_A", "lora_B")) @ file.get_tensor(name)
                    for scaling, file in zip(scalings, (one, two), strict=True)
                ]
                largest = max(largest, ((deltas[0] - deltas[1]).norm() / deltas[1].norm()).item())
    return largest


def main() -> None:
    runs: dict[str, list[dict]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_adapters(folder)
        sizes = [(adapter / FILE).stat().st_size for adapter in folder.glob("task*")]
        for number in track(range(ROUNDS), "rounds", console=None):
            for name in CONTESTANTS:
                runs[name].append(measured(name, folder, folder / name))
                last = number == ROUNDS - 1 and name != "read_and_write"
                if not last:
                    subprocess.run(["rm", "-r", folder / name], check=True)
        difference = largest_difference(folder / "lori", folder / "peft" / "merged")
        output = (folder / "lori" / FILE).stat().st_size
    seconds = {name: [entry["seconds"] for entry in entries] for name, entries in runs.items()}
    ratios = [mine / floor for mine, floor in zip(seconds["lori"], seconds["read_and_write"], strict=True)]
    results = {
        "adapters": ADAPTERS,
        "rank": RANK,
        "input bytes": sum(sizes),
        "output bytes": output,
        "seconds": {name: summary(figures) for name, figures in seconds.items()},
        "peak bytes": {name: max(entry["peak_bytes"] for entry in entries) for name, entries in runs.items()},
        "lori / read and write, round by round": summary(ratios),
        "lori / read and write, of the medians": summary(seconds["lori"])["median"]
        / summary(seconds["read_and_write"])["median"],
        "peft / lori, of the medians": summary(seconds["peft"])["median"] / summary(seconds["lori"])["median"],
        "largest relative difference of a delta in layer 0, lori and peft": difference,
        "load average": os.getloadavg()[1],
    }
    report("merging", results)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
