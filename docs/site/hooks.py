"""Hooks of MkDocs: pages and pictures from elsewhere in the repository, links out of docs/, names in docstrings."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
_FROM_ELSEWHERE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_PICTURES = "benchmarks/results"


def on_files(files, config):
    """Take the pages at the repository's top level, and the benchmarks' pictures, into the site."""
    for source, target in _FROM_ELSEWHERE.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    for picture in sorted((ROOT / _PICTURES).glob("*.png")):
        target = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, target, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Let links mean the site where it has the file, and the repository where it has not."""
    raw = config.repo_url.replace("github.com", "raw.githubusercontent.com") + "/main/"
    blob = f"{config.repo_url}/blob/main/"
    at_top = page.file.src_uri in _FROM_ELSEWHERE.values()

    def target(match: re.Match) -> str:
        link, anchor = match[1].removeprefix(raw).removeprefix(blob), match[2] or ""
        if not at_top and not link.startswith("../") and link == match[1]:
            return match[0]
        path = link.removeprefix("../")
        inside = _FROM_ELSEWHERE.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(inside) is not None:
            return f"]({inside}{anchor})"
        return f"]({blob}{path}{anchor})" if (ROOT / path).exists() else match[0]

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
