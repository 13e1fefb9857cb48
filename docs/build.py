"""What the site needs besides the pages: files from elsewhere in the repository, links out of docs/, docstrings.

python docs/build.py        writes docs/recipes.md anew
"""

import re
from pathlib import Path

from lori_trl.recipes import is_merge_recipe, list_recipes, read_recipe, recipe_facts

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "docs" / "recipes.md"
_FROM_ELSEWHERE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_PICTURES = "benchmarks/results"


# ---- recipes.md ----------------------------------------------------------------------------------------------------


def recipes_page() -> str:
    """Return docs/recipes.md: what is typed by hand there, up to the first table, and the tables of all recipes."""
    rows: dict[str, list[str]] = {"Adapters": [], "Baselines": [], "Merges": []}
    for file in list_recipes():
        if is_merge_recipe(file):
            recipe = read_recipe(file)
            cells = [", ".join(recipe["adapters"]), recipe["weights"], recipe["method"], recipe.get("density", "")]
            rows["Merges"].append(f"| `{file.name}` | {' | '.join(map(str, cells))} |")
        else:
            *cells, _ = recipe_facts(file).values()
            kind = "Baselines" if file.parent.name == "baselines" else "Adapters"
            rows[kind].append(f"| `{file.name}` | {' | '.join(cells)} |")
    facts = "| recipe | task | base | variant | rank | source |\n| --- | --- | --- | --- | --- | --- |"
    merges = "| recipe | adapters | weights | method | density |\n| --- | --- | --- | --- | --- |"
    intro = RECIPES.read_text(encoding="utf-8").partition("\n## Adapters\n")[0]
    tables = [f"## {kind}\n\n{merges if kind == 'Merges' else facts}\n" + "\n".join(rows[kind]) for kind in rows]
    return "\n\n".join([intro.rstrip(), *tables]) + "\n"


# ---- hooks of MkDocs -----------------------------------------------------------------------------------------------


def on_files(files, config):
    """Take the pages at the repository's top level, and the benchmarks' pictures, into the site."""
    from mkdocs.structure.files import File

    for source, target in _FROM_ELSEWHERE.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    for picture in sorted((ROOT / _PICTURES).glob("*.png")):
        target = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, target, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Let links mean the site where it has the file, and the repository where it has not."""
    raw = config.repo_url.replace("github.com", "raw.githubusercontent.com") + "/main/"
    at_top = page.file.src_uri in _FROM_ELSEWHERE.values()

    def target(match: re.Match) -> str:
        link, anchor = match[1].removeprefix(raw), match[2] or ""
        if not at_top and not link.startswith("../") and link == match[1]:
            return match[0]
        path = link.removeprefix("../")
        inside = _FROM_ELSEWHERE.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(inside) is not None:
            return f"]({inside}{anchor})"
        return f"]({config.repo_url}/blob/main/{path}{anchor})" if (ROOT / path).exists() else match[0]

    return re.sub(r"\]\(([^)#\s]+)(#[^)\s]*)?\)", target, markdown)


def on_page_content(html, page, config, files):
    """Make links of the docstrings' [`names`]: public ones lead to their entry, others are code."""
    if page.file.src_uri != "api.md":
        return html
    entries = {entry.rpartition(".")[2]: entry for entry in re.findall(r'id="(lori_trl\.[\w.]+)"', html)}

    def reference(match: re.Match) -> str:
        name = match[1].rpartition(".")[2]
        code = f"<code>{name}</code>"
        return f'<a href="#{entries[name]}">{code}</a>' if name in entries else code

    return re.sub(r"\[<code>~?([\w.]+)</code>\]", reference, html)


# ---- docstrings ----------------------------------------------------------------------------------------------------

_NOTE = re.compile(r"^( *)> \[!NOTE\]\n((?:\1>.*\n?)+)", re.MULTILINE)
_GROUP = re.compile(r"^(?:Parameters:\n)? +> (Parameters that control .+)\n+", re.MULTILINE)
_ARGUMENT = re.compile(r"^( +)([\w*, ]+) \((.*`.*)\):", re.MULTILINE)
_RESULT = re.compile(r"^    (\[?`[^`]+`\]?(?:(?:, | or )\[?`[^`]+`\]?)*): ", re.MULTILINE)


def google_docstring(text: str) -> str:
    """
    Turn a docstring in Hugging Face's form into Google's, which griffe reads.

    ``name (`str` or `int`, *optional*, defaults to `x`):`` becomes ``name (str | int):``, for the signature has the
    rest; a group of parameters becomes a section with a title, a note of GitHub's one of Material's.
    """
    text = _NOTE.sub(_note, text)
    text = _GROUP.sub(r"Parameters: \1\n", text)
    text = _ARGUMENT.sub(lambda match: f"{match[1]}{match[2]} ({_plain_type(match[3])}):", text)
    return _RESULT.sub(lambda match: f"    {_plain_type(match[1])}: ", text)


def _plain_type(text: str) -> str:
    kind = re.sub(r", (\*optional\*|defaults to).*", "", text)
    return re.sub(r"`|\[(?=`)|(?<=`)\]", "", kind.replace("`, `", "` | `").replace(" or ", " | "))


def _note(match: re.Match) -> str:
    lines = [line.strip().removeprefix(">").strip() for line in match[2].splitlines()]
    body = "\n".join(lines).replace("\n- ", "\n\n- ", 1)  # Markdown wants a blank line before a list
    return "!!! note\n\n" + "".join(f"    {line}\n" for line in body.splitlines())


try:
    from griffe import Extension
except ImportError:  # `python docs/build.py` needs no site
    pass
else:

    class HuggingFaceDocstrings(Extension):
        """Let griffe read docstrings in Hugging Face's form."""

        def on_instance(self, *, obj, **kwargs) -> None:
            if obj.docstring is not None:
                obj.docstring.value = google_docstring(obj.docstring.value)


if __name__ == "__main__":
    RECIPES.write_text(recipes_page(), encoding="utf-8")
