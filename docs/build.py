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

_ARGUMENT = re.compile(r"^( +)([\w*, ]+) \((.+)\):(.*)$", re.MULTILINE)
_GROUP = re.compile(r"^ +> (Parameters that control .+)$", re.MULTILINE)
_RAISED = re.compile(r"^( +)((?:`\w+`, )*)`(\w+)`: ", re.MULTILINE)


def _plain_type(text: str) -> str:
    """``"`str` or `None`, *optional*, defaults to `x`"`` -> `"str | None"`: the signature has the rest."""
    kind = re.sub(r", (\*optional\*|defaults to).*", "", text)
    return re.sub(r"[`\[\]]", "", kind).replace(" or ", " | ") if "`" not in kind[1:-1] or " or " in kind else kind


try:
    from griffe import Extension
except ImportError:  # `python docs/build.py` needs no site
    pass
else:

    class HuggingFaceDocstrings(Extension):
        """Let griffe, which knows Google's form, read docstrings in Hugging Face's."""

        def on_instance(self, *, obj, **kwargs) -> None:
            if obj.docstring is None:
                return
            text = _GROUP.sub(r"\n    Parameters: \1", obj.docstring.value)
            text = _ARGUMENT.sub(lambda match: f"{match[1]}{match[2]} ({_plain_type(match[3])}):{match[4]}", text)
            obj.docstring.value = text


if __name__ == "__main__":
    RECIPES.write_text(recipes_page(), encoding="utf-8")
