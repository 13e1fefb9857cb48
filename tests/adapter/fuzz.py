"""Adapters' files with a bit flipped, and their metadata mutated: `python tests/adapter/fuzz.py [CASES]`.

A flipped bit must not pass any reader. Mutated metadata must give an adapter or the three-part error, nothing else;
the error, where checksums were not made to fit. `test_fuzz.py` runs a small part of this.
"""

import copy
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from files_by_hand import change_record, mutate_compact, mutate_masks, seal  # noqa: E402
from tiny import make_llama, trained_adapter  # noqa: E402

from lori_trl import LoriMasks, load_lori_adapter  # noqa: E402
from lori_trl.adapter.compact_file import read_compact, read_compact_masks  # noqa: E402
from lori_trl.adapter.folder import AdapterFolder, read_modules  # noqa: E402
from lori_trl.adapter.record import hash_settings  # noqa: E402
from lori_trl.compact import export_compact  # noqa: E402

Reader = Callable[[], object]


def readers_of_folder(folder: Path) -> dict[str, Reader]:
    """What merging and inspecting; evaluating and pushing; exporting, extracting and removing; loading go through."""

    def opened() -> AdapterFolder:
        return AdapterFolder(str(folder), folder)

    def modules() -> None:
        adapter = opened()
        for _ in read_modules([adapter], adapter.shapes, torch.float32):
            pass

    return {
        "modules": modules,
        "verify": lambda: opened().verify(),
        "contents": lambda: opened().contents(),
        "load": lambda: load_lori_adapter(make_llama(), folder),
    }


def readers_of_masks(file: Path) -> dict[str, Reader]:
    return {"masks": lambda: LoriMasks.from_pretrained(file)}


def readers_of_compact(file: Path) -> dict[str, Reader]:
    return {"contents": lambda: read_compact(file), "masks": lambda: read_compact_masks(file)}


def outcome(reader: Reader) -> str:
    """Read once: `passed`, `refused` by a three-part error, or the error that it should not be."""
    try:
        reader()
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        return "refused" if text.count(". ") >= 2 and len(text) < 2000 else f"not three parts: {text[:300]}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "passed"


def places(root: Path) -> dict[str, tuple[Path, dict[str, Reader]]]:
    """A tiny adapter's files to damage, and who reads each."""
    folder = shutil.copytree(trained_adapter(), root / "adapter")
    compact = export_compact(folder, root / "compact.safetensors")
    masks = folder / "masks" / "code.safetensors"
    return {
        "weights": (folder / "adapter_model.safetensors", readers_of_folder(folder)),
        "record": (folder / "lori_config.json", readers_of_folder(folder)),
        "masks": (masks, readers_of_masks(masks)),
        "compact": (compact, readers_of_compact(compact)),
    }


def flip_bits(root: Path, cases: int, seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """Flip one bit of each file at a time: (file, reader, outcome)."""
    draw = random.Random(seed)
    for name, (file, readers) in places(root).items():
        whole = file.read_bytes()
        for _ in range(cases):
            changed = bytearray(whole)
            changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            file.write_bytes(changed)
            for reader, read in readers.items():
                yield name, reader, outcome(read)
        file.write_bytes(whole)


VALUES = [
    None, True, False, -1, 0, 1, 2**70, 0.5, 1e308, float("nan"), float("inf"), "", "x", "../../x", "[/q]", "\x1b[31m",
    [], {}, [[]], {"a": 1}, "x" * 10_000, [0] * 1000, "NaN",
]  # fmt: skip


def mutate(value: object, draw: random.Random) -> object:
    """Change one node of JSON values: replaced, removed, doubled, renamed or buried."""
    value = copy.deepcopy(value)
    nodes = [(None, None)]
    stack = [value]
    while stack:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
        nodes += [(node, key) for key in keys]
        stack += [node[key] for key in keys]
    parent, key = draw.choice(nodes)
    new = draw.choice(VALUES) if draw.random() < 0.95 else json.loads("[" * 400 + "]" * 400)
    if parent is None:
        return new
    action = draw.randrange(4)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, dict):
        parent[draw.choice(["", "x", key + "s", "sha256", "format_version"])] = parent.pop(key)
    else:
        parent[key] = new
    return value


def mutate_metadata(root: Path, cases: int, seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """Mutate the metadata of each file, with checksums that fit and without: (file, reader, outcome)."""
    draw = random.Random(seed)
    found = places(root)
    record = found["record"][0].read_bytes()
    for name in ("record", "config", "masks", "compact"):
        file, readers = found["record" if name == "config" else name]
        file = file.with_name("adapter_config.json") if name == "config" else file
        whole = file.read_bytes()
        for number in range(cases):
            fits = number % 2 == 0
            if name == "config":
                value = mutate(json.loads(whole), draw)
                file.write_text(json.dumps(value))
                fits = fits and isinstance(value, dict)
                if fits:
                    settings = {"adapter_config": hash_settings(value)}
                    change_record(file.parent, lambda values, settings=settings: values.update(settings))
            elif name == "record":
                value = mutate(json.loads(whole), draw)
                fits = fits and isinstance(value, dict)
                file.write_text(json.dumps(seal(value) if fits else value))
            elif name == "masks":
                mutate_masks(file, lambda values: mutate(values, draw), fits)
            else:
                mutate_compact(file, lambda values: mutate(values, draw), fits)
            for reader, read in readers.items():
                yield f"{name}, {'fitting' if fits else 'old'} checksum", reader, outcome(read)
            file.write_bytes(whole)
            found["record"][0].write_bytes(record)


def main() -> int:
    cases = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    torch.set_num_threads(1)
    bad = 0
    for title, run, number in (("bit flips", flip_bits, cases), ("mutations", mutate_metadata, cases // 2)):
        counts: Counter = Counter()
        with tempfile.TemporaryDirectory() as root:
            for file, reader, result in run(Path(root), number):
                counts[file, reader, result] += 1
        print(f"{title}, {number} a file")
        for (file, reader, result), count in sorted(counts.items()):
            print(f"  {file:28} {reader:10} {count:7} {result}")
            bad += result not in ("passed", "refused") or (result == "passed" and title == "bit flips")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
