"""How the package is built: imports go one way, private names stay at home, files stay short."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lori_trl"
FILES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
TREES = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in FILES.items()}
# From the lowest to the highest: a room imports from its own and from those before it.
ROOMS = (
    *("inputs", "hub", "method", "recipes", "adapter", "compact", "continual", "inspection", "training", "evaluation"),
    *("merging", "cli"),
)
LINES = 500


def imports(module: str) -> Iterator[tuple[str, str, str | None]]:
    """Yield what a module imports of this package, wherever it stands: module, name in it (or ""), and name here."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == PACKAGE.name:
                    yield alias.name, "", alias.asname
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names if source.partition(".")[0] == PACKAGE.name else []:
                if f"{source}.{alias.name}" in FILES:
                    yield f"{source}.{alias.name}", "", alias.asname or alias.name
                else:
                    yield source, alias.name, alias.asname or alias.name


def with_packages(module: str, importer: str) -> set[str]:
    """Add the packages whose `__init__` is run on the way to a module, but for those the importer lies in."""
    parts = module.split(".")
    parents = {".".join(parts[:length]) for length in range(1, len(parts))}
    return {module} | {parent for parent in parents if not f"{importer}.".startswith(f"{parent}.")}


def test_imports_form_no_circle():
    """Imports within functions and those for types alone count too."""
    graph = {
        module: {each for source, _, _ in imports(module) for each in with_packages(source, module)} - {module}
        for module in FILES
    }
    assert len(graph) > 50 and set().union(*graph.values()) <= graph.keys()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def room(module: str) -> str:
    """Return the folder or file at the top of the package that a module lies in; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def test_the_top_has_the_rooms_and_no_more():
    there = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("__") and path.suffix != ".typed"}
    assert there == set(ROOMS)
    assert len(there) <= 13


def test_arrows_between_rooms_go_down():
    """So folders form no circle either. `lori_trl/__init__` hands out names of all rooms, and no room needs it."""
    rank = {name: number for number, name in enumerate(ROOMS)}
    arrows = {(room(module), room(source)) for module in FILES for source, _, _ in imports(module)}
    inner = {(importer, source) for importer, source in arrows if importer and importer != source}
    assert len(inner) > 20
    assert not [(importer, source) for importer, source in inner if source == "" or rank[source] > rank[importer]]


@pytest.mark.parametrize("module", FILES)
def test_no_private_name_of_another_module_is_used(module):
    names = {here for _, _, here in imports(module)}
    used = [name for _, name, _ in imports(module) if _private(name)]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            used += [f"{node.value.id}.{node.attr}"] if _private(node.attr) else []
    assert not used


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("module", FILES)
def test_no_file_is_long(module):
    length = len(FILES[module].read_text(encoding="utf-8").splitlines())
    assert length <= LINES
