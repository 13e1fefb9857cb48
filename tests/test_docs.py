"""The documentation is true to the letter: every code block is run, on the tiny model.

The blocks of a page are run in their order, in one folder that has `recipes/` as the repository has, and in this
process: a new one would take seconds to import PEFT. What cannot be run says why in the line above:
`<!-- not run: REASON -->`.
"""

import ast
import functools
import importlib.util
import json
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
from hub_server import HubServer, client_of

from lori_trl.adapter.mask_files import MasksMetadata
from lori_trl.adapter.record import LoriRecord
from lori_trl.adapter.record_fields import (
    BaseModel,
    Calibration,
    Counts,
    Independence,
    Losses,
    Merge,
    MergedAdapter,
    TaskRecord,
    Training,
    TrainingData,
)
from lori_trl.cli import main, sft
from lori_trl.method.projections import Projection

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's and transformers' of each other

ROOT = Path(__file__).parents[1]
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}
QUICK = {"README.md"}  # the others train, merge and evaluate for a minute: `make test-release`
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$"
    r"|^\| `(?P<command>lori[- ][^\n`]+ [^\n`]+)` \|",  # a command in a table
    re.DOTALL | re.MULTILINE,
)


@dataclass
class Block:
    """A code block: where it stands, what is in it, and why it is not run, if it is not."""

    page: str
    number: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}-{self.number}-{self.language}"


def blocks(page: str) -> list[Block]:
    matches = [match.groupdict() for match in _BLOCK.finditer(PAGES[page])]
    return [
        Block(page, number, match["language"] or "bash", match["code"] or match["command"], match["reason"])
        for number, match in enumerate(matches, start=1)
        if match["language"] in ("python", "bash", None)
    ]


BLOCKS = {page: blocks(page) for page in PAGES}


@dataclass
class Place:
    """The folder in which a page's blocks are run, the names that they made, and how many have been run."""

    folder: Path
    names: dict = field(default_factory=dict)
    done: int = 0


def statements(code: str) -> Iterator[str]:
    """Split a block of commands: one a line, or several lines where they are continued or hold a document."""
    lines = iter(code.splitlines(keepends=True))
    for line in lines:
        while line.endswith("\\\n"):
            line += next(lines)
        if document := re.search(r"<<'(\w+)'", line):
            while not line.endswith(f"\n{document[1]}\n"):
                line += next(lines)
        if line.strip() and not line.startswith("#"):
            yield line


def run_command(statement: str, model: str) -> None:
    """Run a command: ours in this process, on the tiny model, `make` on paper, others in a shell."""
    program = statement.split(maxsplit=1)[0]
    if program not in ("make", "lori", "lori-sft"):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(["bash", "-euc", statement], check=True, env=os.environ | {"PATH": path})
        return
    arguments = shlex.split(statement.replace("\\\n", ""), comments=True)[1:]
    if program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    else:
        assert (main(arguments) if program == "lori" else sft(on_tiny_model(arguments, model))) == 0


def run_block(block: Block, names: dict, model: str) -> None:
    code = block.code.replace(SMOLLM2, model)
    if block.language == "python":
        exec(compile(code, str(block), "exec"), names)
    else:
        for statement in statements(code):
            run_command(statement, model)


def on_tiny_model(arguments: list[str], model: str) -> list[str]:
    """Put the tiny model in the place of a recipe's. What is meant for GPUs is checked as far as its counts."""
    if "--accelerate_config" in arguments or any("_lori_" in argument for argument in arguments):
        return [*arguments, *["--dry_run"] * ("--dry_run" not in arguments)]
    return [*arguments, *([] if "--model_name_or_path" in arguments else ["--model_name_or_path", model])]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Return a context in which the Hub is the tests' own. Outside of it there is none."""
    home = tmp_path_factory.mktemp("hub")

    @contextmanager
    def reach():
        with pytest.MonkeyPatch.context() as patch, client_of(server, home, patch):
            patch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)  # PEFT asks it
            yield

    with HubServer() as server:
        yield reach


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Place]:
    made = {}
    for page in PAGES:
        folder = tmp_path_factory.mktemp(Path(page).stem)
        shutil.copytree(ROOT / "recipes", folder / "recipes")
        made[page] = Place(folder)
    return made


@pytest.fixture
def run(places, hub, model_folder, monkeypatch):
    """Return a function that runs a block once, after those that stand before it."""

    def run(block: Block) -> None:
        place = places[block.page]
        monkeypatch.chdir(place.folder)
        for each in BLOCKS[block.page][place.done :]:
            if each.number > block.number:
                break
            place.done += 1
            if each.reason is None:
                with hub() if re.search(r"\bme/", each.code) else nullcontext():
                    run_block(each, place.names, str(model_folder))

    return run


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=str(block), marks=[] if page in QUICK else pytest.mark.release)
        for page in PAGES
        for block in BLOCKS[page]
        if block.reason is None
    ],
)
def test_a_block_runs(run, block):
    run(block)


def test_every_page_is_looked_through():
    fences = {page: text.count("\n```python\n") + text.count("\n```bash\n") for page, text in PAGES.items()}
    assert fences["README.md"] >= 4
    for page, count in fences.items():
        assert count == sum(f"```{block.language}\n{block.code}```" in PAGES[page] for block in BLOCKS[page]), page


def test_what_is_shown_of_the_readme_is_true(places, run):
    """The ten lines of Python leave what they say they do."""
    run(BLOCKS["README.md"][-1])
    names = places["README.md"].names
    masks = names["trainer"].masks
    assert masks.task == "style" and masks.num_selected == masks.numel // 10
    assert names["model"].peft_config["default"].task_type == "CAUSAL_LM"
    assert os.path.isdir(places["README.md"].folder / "style-lori")


# ---- pages against the sources -------------------------------------------------------------------------------------


def template(node: ast.expr) -> str:
    """Return a message's text, with {} for what is put in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    parts = node.values if isinstance(node, ast.JoinedStr) else []
    return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts) or "{}"


@functools.cache
def sources() -> list[ast.AST]:
    """Every node of the package's code."""
    files = sorted((ROOT / "lori_trl").rglob("*.py"))
    return [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]


def errors() -> list[str]:
    """The messages of all errors."""
    calls = [node for node in sources() if isinstance(node, ast.Call) and node.args]
    return [template(call.args[0]) for call in calls if re.search(r"(Error|type\(error\))$", ast.unparse(call.func))]


def quoted() -> list[str]:
    """The words by which docs/troubleshooting.md tells errors."""
    first_cells = re.findall(r'^\| (".+?") \| ', PAGES["docs/troubleshooting.md"], re.MULTILINE)
    return [words.replace("…", "{}") for cell in first_cells for words in re.findall(r'"([^"]+)"', cell)]


def test_every_error_of_three_parts_is_explained():
    known = quoted()
    complete = [message for message in errors() if message.count(". ") >= 2]
    assert len(complete) > 100
    assert not [message for message in complete if not any(words in message for words in known)]


def test_the_errors_that_are_explained_occur():
    texts = [template(node) for node in sources() if isinstance(node, (ast.Constant, ast.JoinedStr))]
    assert not [words for words in quoted() if not any(words in text for text in texts)]


def test_every_key_of_the_formats_is_explained():
    page = PAGES["docs/hub_and_formats.md"]
    classes = (LoriRecord, Calibration, Counts, BaseModel, TrainingData, Losses, Training, TaskRecord)
    for each in (*classes, MergedAdapter, Independence, Merge, Projection, MasksMetadata):
        assert not [key.name for key in fields(each) if f"`{key.name}`" not in page], each.__name__


def test_the_functions_that_the_method_names_exist():
    named = re.findall(r"`((?:method|training|merging|continual)\.[\w.]+)`", PAGES["docs/method.md"])
    assert len(named) > 8
    for name in named:
        assert pkgutil.resolve_name(f"lori_trl.{name}") is not None, name


def test_the_table_of_recipes_is_current():
    source = importlib.util.spec_from_file_location("recipes", ROOT / "docs" / "site" / "recipes.py")
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    assert module.recipes_page() == PAGES["docs/recipes.md"], "run `python docs/site/recipes.py`"


def test_every_target_that_is_named_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {name for text in PAGES.values() for name in re.findall(r"(?:`|^)make ([\w-]+)", text, re.MULTILINE)}
    assert {"quickstart", "test"} <= named <= targets


def test_the_readme_is_a_page():
    """It is read on GitHub and on the package index: short sections, and links that hold at both."""
    prose = re.sub(r"^\|.*\n|^```.*?^```\n", "", PAGES["README.md"], flags=re.MULTILINE | re.DOTALL)
    sections = re.split(r"^## ", prose, flags=re.MULTILINE)
    assert {section.splitlines()[0]: len(section.split()) for section in sections if len(section.split()) >= 130} == {}
    links = re.findall(r"\]\(([^)#]+)", PAGES["README.md"])
    assert links and not [link for link in links if not link.startswith("https://")]
    ours = [path for link in links if (path := re.fullmatch(r".+/lori_trl/(?:blob/)?main/(.+)", link))]
    assert len(ours) > 10 and not [path[1] for path in ours if not (ROOT / path[1]).is_file()]


def test_the_figures_of_the_study_are_on_its_page():
    page = r"[+-]?\d+\.\d+ ± \d+\.\d+"
    figures = {figure for name in PAGES.keys() - {"docs/results.md"} for figure in re.findall(page, PAGES[name])}
    assert figures and figures <= set(re.findall(page, PAGES["docs/results.md"]))


def test_the_figures_of_the_readme_are_on_file():
    results = ROOT / "benchmarks" / "results"
    stored = json.loads((results / "storage.json").read_text())["results"]["bytes"]
    times = json.loads((results / "run_time.json").read_text())["results"]["over LoRA"]
    page = PAGES["docs/results.md"]
    losses = {
        method: re.search(rf"^\| {method} \| ([\d.]+) ± ", page.split("\n## One task\n")[1], re.MULTILINE)[1]
        for method in ("LoRA", "LoRI-S")
    }
    second = page.split("\n## A that leaves the first task alone\n")[1]
    forgotten = [
        re.search(rf"^\| {arm} \| [\d.]+ \| ([\d.]+) ± \S+ \| (\+\S+ ± \S+) \|", second, re.MULTILINE).groups()
        for arm in ("LoRA", "LoRI-S, random A", "LoRI-S, contrastive A")
    ]
    dense, cheap = times["LoRI-S, whole calibration"], times["LoRI-S, 3 batches' gradients"]
    megabytes = {
        method: f"{stored[method]['gradients and optimizer state'] / 1e6:.1f} MB" for method in ("peft_lora", "hook")
    }
    plain = f"{4 * 9_768_960 / 1e6:.1f}"  # the values of A and B
    compact = re.search(r"^\| kept bit for bit \| ([\d.]+) MB", page, re.MULTILINE)[1]
    rows = [
        f"| {plain} MB | {plain} or {float(compact):.1f} MB |",
        f"| {megabytes['peft_lora']} | {megabytes['hook']} |",  # a calibration trains all of B
        f"| 1 | {dense:.2f}, or {cheap:.2f} with ",
        f"| {losses['LoRA']} | {losses['LoRI-S']} |",
        *(f"| {lost} | {gsm8k} |" for gsm8k, lost in forgotten),
    ]
    assert not [row for row in rows if row not in PAGES["README.md"]]
