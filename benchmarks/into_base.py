"""An adapter into a base of Llama-3-8B's shapes in bfloat16, and a merge by `svd`: time and memory.

    python benchmarks/into_base.py

Peers: PEFT's `merge_and_unload` and `save_pretrained` on the loaded base; and PEFT's `add_weighted_adapter` by `svd`,
which decomposes the whole delta, of one module. Every run into the base is a process of its own; time starts after its
imports, memory is the highest resident set, less what is mapped from files. The base has the first layers alone, and
its embeddings, so that it fits; the largest matrix and the number of shards a layer are those of the whole.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from common import interleaved, report, summary
from llama_3_8b import RANK, SHAPES, config, write_adapter
from rich.progress import track

SHARD = "2GB"
DTYPE = torch.bfloat16


def write_base(folder: Path, layers: int) -> None:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config(layers, dtype="bfloat16")).to(DTYPE)
    model.to_empty(device="cpu")
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_((0.02 * torch.randn(parameter.shape, generator=draw)).to(DTYPE))
    model.save_pretrained(folder, max_shard_size=SHARD)


def lori(base: Path, adapter: Path, output: Path) -> None:
    from lori_trl.merging import merge_into_base

    merge_into_base([adapter], output_dir=output)


def peft(base: Path, adapter: Path, output: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPE)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output, max_shard_size=SHARD)


CONTESTANTS = {"lori": lori, "peft": peft}


def run(name: str, *places: str) -> None:
    """Be the process of one contestant. Its own memory is watched, without pages that are mapped from files."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import lori_trl.merging  # noqa: F401

    before = own_memory()
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    CONTESTANTS[name](*map(Path, places))
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "peak_bytes": peak[0] - before}))


def own_memory() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["RssAnon"].split()[0])


def measured(name: str, *places: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, name, *map(str, places)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def largest_difference(first: Path, second: Path) -> float:
    """Return the largest difference between two models' tensors, in units of bfloat16's step at that entry."""
    from safetensors import safe_open

    def index(folder: Path) -> dict[str, str]:
        return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    one, two, largest = index(first), index(second), 0.0
    assert one.keys() == two.keys()
    for name in one:
        with safe_open(first / one[name], "pt") as a, safe_open(second / two[name], "pt") as b:
            mine, theirs = a.get_tensor(name).float(), b.get_tensor(name).float()
            step = torch.finfo(DTYPE).eps * torch.maximum(mine.abs(), theirs.abs()).clamp(min=1e-3)
            largest = max(largest, ((mine - theirs).abs() / step).max().item())
    return largest


def svd_of_one_module(rounds: int) -> dict:
    """Two adapters of rank 32 on a matrix of 4096 x 4096, brought down to 32. PEFT takes minutes for larger ones."""
    from lori_trl.merging.methods import Factors, svd

    draw = torch.Generator().manual_seed(0)
    rows, columns = SHAPES["self_attn.o_proj"]
    factors = [
        Factors(torch.randn(RANK, columns, generator=draw), torch.randn(rows, RANK, generator=draw), 0.5, 1.0)
        for _ in range(2)
    ]

    def whole() -> None:  # as `LoraModel._svd_generalized_task_arithmetic_weighted_adapter` does it
        delta = sum(factor.weight * (factor.B @ factor.A) for factor in factors)
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        _ = U[:, :RANK] @ torch.diag(S[:RANK]), Vh[:RANK]

    seconds = interleaved({"lori": lambda: svd(factors, RANK) and None, "peft": whole}, rounds, warmup=0)
    return {name: summary(figures) for name, figures in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    runs: dict[str, list[dict]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base, adapter = folder / "base", folder / "adapter"
        subprocess.run([sys.executable, __file__, "write", str(folder), str(options.layers)], check=True)
        shards = [file.stat().st_size for file in base.glob("*.safetensors")]
        for number in track(range(options.rounds), "rounds", console=None):
            for name in CONTESTANTS:
                runs[name].append(measured(name, base, adapter, folder / name))
                if number < options.rounds - 1:
                    subprocess.run(["rm", "-r", folder / name], check=True)
        difference = largest_difference(folder / "lori", folder / "peft")
    seconds = {name: summary([entry["seconds"] for entry in entries]) for name, entries in runs.items()}
    peaks = {name: max(entry["peak_bytes"] for entry in entries) for name, entries in runs.items()}
    module = svd_of_one_module(rounds=1)
    results = {
        "layers": options.layers,
        "base bytes": sum(shards),
        "largest shard bytes": max(shards),
        "seconds": seconds,
        "lori / peft, of the medians": seconds["lori"]["median"] / seconds["peft"]["median"],
        "peak bytes": peaks,
        "peak of lori / peft": peaks["lori"] / peaks["peft"],
        "largest difference of an entry, in steps of bfloat16": difference,
        "svd of one module, seconds": module,
        "svd of one module, lori / peft, of the medians": module["lori"]["median"] / module["peft"]["median"],
        "load average": os.getloadavg()[1],
    }
    report("into_base", results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        write_base(Path(sys.argv[2], "base"), int(sys.argv[3]))
        write_adapter(Path(sys.argv[2], "adapter"), str(Path(sys.argv[2], "base")), 1, int(sys.argv[3]))
    elif sys.argv[1:2] and sys.argv[1] in CONTESTANTS:
        run(*sys.argv[1:])
    else:
        main()
