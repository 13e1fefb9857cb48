"""
Recipes and calls with faults in them, by the thousand: each ends with success, or one error of three parts and code 2.

    python benchmarks/fuzz_recipes.py [--cases 1000] [--seed 0]

Half of the cases are shipped recipes whose text or values are mutated: what `lori recipes validate` passes, a dry run
must take. The others are calls of every command with hostile, swapped and missing words, in a folder of two adapters
that no call may change. Prints a table of counts and keeps it as JSON.
"""

import argparse
import contextlib
import io
import os
import random
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from lori_trl.cli import main
from lori_trl.recipes.find import is_baseline, is_merge_recipe, list_recipes

HOSTILE_TEXT = ["[/q]", "\x1b[31m", "", " ", "-", "--", "../..", "/proc/none", "a" * 300, "\u202e", "a=b", "[x"]
VALUES = ["0", "-1", "1.5", "nan", "1e300", "9" * 400, "text", "code", "concat", "ties", "peft", "quickstart"]
HOSTILE_YAML = [
    *("!!timestamp foo", "!!bool foo", "!!int ''", "! x", "*a", "&a [*a]", "<<", "=", "| x", "? a", "'", "'\\0'"),
    *("{a: {b: c}}", "[[[[q]]]]", "[]", "~", "2001-99-99", "0x_", ".nan", "-.inf", "1:1:1.5", '"\\x1b[31m"'),
    *("[" * 5000, "0x" + "f" * 5000, "x" * 5000, "[" + "a, " * 5000 + "]", "8", "0.5", "true", "no", "1_0", "[a, b]"),
]
HOSTILE_LINES = [
    *("env: {A=B: 1}", "env: {1: 2}", "env: text", "env: {A: [1]}", "lr_scheduler_type: text", "help: 1", "recipe: a"),
    *("<<: {a: 1}", "? [a]\n: 1", "---", "\ttab: 1", "\x00", "model_init_kwargs: {1: 2}", "model_init_kwargs: text"),
    *("use_peft: true", "adapters: [a]", "deepspeed: text", "fsdp: text", "accelerator_config: [1]", "dry_run: text"),
    *("env: {A: 1}", "bf16: true", "seed: 1", "report_to: [none]", "trust_remote_code: true", "max_length: null"),
    "\n".join(f"key_{number}: 1" for number in range(2000)),
]
SECONDS = 10


def mutate_recipe(draw: random.Random) -> tuple[bytes, str]:
    """Return a shipped recipe with one or two faults, and of which kind the first one is."""
    content = draw.choice(list_recipes()).read_bytes()
    kinds = [draw.choice(list(_MUTATIONS)) for _ in range(draw.randint(1, 2))]
    for kind in kinds:
        content = _MUTATIONS[kind](content, draw)
    return content, f"recipe: {kinds[0]}"


def _change_byte(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content) + 1)
    return content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :]


def _change_value(content: bytes, draw: random.Random) -> bytes:
    return _in_lines(
        content, draw, lambda line: line.partition(b":")[0] + b": " + draw.choice(HOSTILE_YAML + VALUES).encode()
    )


def _misspell_key(content: bytes, draw: random.Random) -> bytes:
    return _in_lines(content, draw, lambda line: draw.choice([b"x", b"_", b" ", b"-"]) + line)


def _in_lines(content: bytes, draw: random.Random, change: Callable[[bytes], bytes]) -> bytes:
    lines = content.split(b"\n")
    settings = [number for number, line in enumerate(lines) if re.match(rb"\w+:", line)] or [0]
    place = draw.choice(settings)
    return b"\n".join([*lines[:place], change(lines[place]), *lines[place + 1 :]])


_MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a byte": _change_byte,
    "a value": _change_value,
    "a key": _misspell_key,
    "cut short": lambda content, draw: content[: draw.randrange(len(content) + 1)],
    "a line more": lambda content, draw: content + b"\n" + draw.choice(HOSTILE_LINES).encode() + b"\n",
    "a line twice": lambda content, draw: _in_lines(content, draw, lambda line: line + b"\n" + line),
    "another encoding": lambda content, draw: content.decode("latin-1").encode(draw.choice(["utf-16", "utf-32"])),
    "nested": lambda content, draw: b"a:\n" + b"\n".join(b" " + line for line in content.split(b"\n")),
}


# Words that each command's arguments are drawn from; the second list are its options.
_PLACES = [
    "one",
    "math",
    "c.safetensors",
    "rows.jsonl",
    "one/adapter_config.json",
    "nowhere",
    "link",
    ".",
    "new",
    "me/x",
]
_COMMANDS: dict[str, tuple[int, list[str]]] = {
    "tasks": (1, ["--extract", "--remove", "--output_dir"]),
    "merge": (2, ["--weights", "--method", "--density", "--seed", "--output_dir", "--recipe", "--heldout", "--grid"]),
    "push": (2, ["--revision", "--include", "--private"]),
    "export": (2, ["--dtype"]),
    "expand": (2, []),
    "inspect": (1, ["--html", "--json", "--save"]),
    "eval": (1, ["--limit", "--batch_size", "--dataset_path", "--output_path", "--seed"]),
    "recipes": (2, []),
    "sft": (0, ["--recipe", "--sparsity", "--lora_r", "--max_steps", "--dataset_path", "--output_dir", "--task_name"]),
}
_FIXED = {
    "push": ["--dry-run"],
    "export": ["--compact"],
    "eval": ["--tasks", "nonesuch"],
    "sft": ["--model_name_or_path", "base", "--dry-run"],
}


def mutate_call(draw: random.Random) -> tuple[list[str], str]:
    """Return the words of a call, and its kind."""
    command = draw.choice(list(_COMMANDS))
    places, options = _COMMANDS[command]
    words = [draw.choice(_PLACES + HOSTILE_TEXT * (draw.random() < 0.2)) for _ in range(places)]
    if command == "recipes":
        words[0] = draw.choice(["show", "copy", "validate", "list", "text"])
    for option in draw.sample(options, draw.randint(0, min(3, len(options)))):
        words += [option, draw.choice(_PLACES + VALUES + HOSTILE_TEXT)]
    words += _FIXED.get(command, [])
    if draw.random() < 0.1:
        words.pop(draw.randrange(len(words)))
    return [command, *words], f"call: {command}"


def run(words: list[str]) -> tuple[int, str, str]:
    """Run `lori` in this process. Returns the exit code and what was printed; whatever else is raised goes up."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code = main(words)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), error.getvalue()


def check(words: list[str]) -> str:
    """Run a call and return how it ended: "success", "refused", or what is wrong with it."""
    start = time.perf_counter()
    try:
        code, out, error = run(words)
    except Exception as traceback:
        return f"raised {type(traceback).__name__}: {traceback}"[:300]
    if re.search("[\x1b\x9b\u202e]", out + error):
        return "escapes on the terminal"
    if time.perf_counter() - start > SECONDS:
        return f"took more than {SECONDS} s"
    if code == 0:
        return "success"
    by_argparse = "usage: lori" in error
    three_parts = len(re.findall(r"[.:]\s", error)) >= 3
    return "refused" if code == 2 and (by_argparse or three_parts) else f"code {code}: {error}"[:300]


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A working directory with two adapters, a compact file, data, and a base without weights."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import shutil

    from tiny import make_llama, make_rows, trained_adapter

    from lori_trl.compact import export_compact

    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for name in ("one", "math"):
                shutil.copytree(trained_adapter(), name)
            export_compact("one", "c.safetensors")
            make_rows().to_json("rows.jsonl")
            make_llama().config.save_pretrained("base")
            os.symlink("one", "link")
            yield Path(folder)
        finally:
            os.chdir(before)


def fuzz_recipe(draw: random.Random) -> tuple[str, str]:
    """Check one recipe, and that a dry run takes it if it passes. Returns its kind and how it ended."""
    content, kind = mutate_recipe(draw)
    Path("mutated.yaml").write_bytes(content)
    ending = check(["recipes", "validate", "mutated.yaml"])
    file = Path("mutated.yaml")
    if ending == "success" and not is_merge_recipe(file) and not is_baseline(file):
        again = check(["sft", "--recipe", "mutated.yaml", "--model_name_or_path", "base", "--dry-run"])
        ending = "success" if again == "success" else f"validated, and the run: {again}"
    return kind, ending


def fuzz_call(draw: random.Random) -> tuple[str, str]:
    """Check one call, and that it changes no file that was there. Returns its kind and how it ended."""
    words, kind = mutate_call(draw)
    before = _files()
    ending = check(words)
    after = _files()
    for file in after.keys() - before.keys():
        file.unlink()
    if changed := [str(file) for file in before if before[file] != after.get(file)]:
        ending = f"changed {changed[0]}"
        for file in changed:
            Path(file).write_bytes(before[Path(file)])
    return kind, ending if ending in ("success", "refused") else f"{ending} by {words}"[:400]


def _files() -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}


def fuzz(cases: int, seed: int) -> tuple[Counter, list[str]]:
    """
    Check recipes and calls, in turn.

    Args:
        cases (`int`): how many of each.
        seed (`int`): of the mutations.

    Returns:
        `tuple[Counter, list[str]]`: (kind, ending) -> count; and the failures in full.
    """
    draw = random.Random(seed)
    counts: Counter = Counter()
    failures = []
    environment = dict(os.environ)
    with workplace():
        for _ in range(cases):
            for one in (fuzz_recipe, fuzz_call):
                kind, ending = one(draw)
                os.environ.clear()
                os.environ |= environment
                good = ending in ("success", "refused")
                counts[kind, ending if good else "failure"] += 1
                failures += [] if good else [f"{kind}: {ending}"]
    return counts, failures


if __name__ == "__main__":
    from common import report

    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    counts, failures = fuzz(options.cases, options.seed)
    endings = ("success", "refused", "failure")
    table = {kind: {ending: counts[kind, ending] for ending in endings} for kind in sorted({key[0] for key in counts})}
    print(f"{'kind':28}" + "".join(f"{ending:>10}" for ending in endings))
    for kind, row in table.items():
        print(f"{kind:28}" + "".join(f"{row[ending]:10,}" for ending in endings))
    print(*failures, sep="\n", file=sys.stderr)
    facts = {"cases": 2 * options.cases, "seed": options.seed, "failures": len(failures)}
    facts |= {"seconds": round(time.perf_counter() - start), "counts": table}
    report("fuzz_recipes", facts | {"peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024})
    sys.exit(bool(failures))
