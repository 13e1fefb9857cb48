"""`lori inspect`: where tasks train, and how far their masks and deltas meet."""

import argparse
from pathlib import Path

from .options import add_allow_modified
from .targets import check_targets
from .terminal import show


def add_parser(commands) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show where tasks train, and how far their masks and deltas meet",
        epilog="example:\n  lori inspect safety-lori code-lori --html interference.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect.add_argument("adapters", nargs="+", help="folders or Hub names of LoRI or plain LoRA adapters")
    inspect.add_argument("--save", type=Path, metavar="FILE.png|FOLDER", help="draw one picture, or a folder of them")
    inspect.add_argument("--html", type=Path, metavar="FILE", help="write one page that needs no network")
    inspect.add_argument("--json", metavar="FILE", help="write the numbers; - for the standard output, without tables")
    inspect.add_argument("--overwrite", action="store_true", help="replace files that are there")
    add_allow_modified(inspect)
    inspect.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    import json

    from rich.console import Console
    from rich.progress import track

    from ..inputs.files import replacing
    from ..inspection import (
        inspect_adapters,
        inspection_sections,
        render_page,
        render_picture,
        render_pictures,
        verdict,
    )

    to_screen = options.json == "-"
    json_file = Path(options.json) if options.json and not to_screen else None
    one_picture = options.save is not None and options.save.suffix == ".png"
    if options.save is not None and options.save.suffix not in ("", ".png") and not options.save.is_dir():
        raise ValueError(
            f"`--save {options.save}` is neither a .png nor a folder. Allowed is a file that ends in .png, or a "
            "folder. Pass another name."
        )
    check_targets(
        {"--save": options.save, "--html": options.html, "--json": json_file},
        options.adapters,
        folders=[] if one_picture else ["--save"],
        overwrite=options.overwrite,
    )
    console = Console(stderr=True)
    inspection = inspect_adapters(
        options.adapters,
        allow_modified=options.allow_modified,
        track=lambda paths: track(paths, "reading", console=console, transient=True, disable=not console.is_terminal),
    )
    sections = inspection_sections(inspection)
    numbers = json.dumps(inspection.to_dict(), indent=1, allow_nan=False) + "\n"
    files: dict[Path, bytes] = {}
    if json_file is not None:
        files[json_file] = numbers.encode()
    if options.html is not None:
        files[options.html] = render_page(inspection, sections).encode()
    if one_picture:
        files[options.save] = render_picture(sections)
    elif options.save is not None:
        files |= {options.save / f"{key}.png": picture for key, picture in render_pictures(sections).items()}
        options.save.mkdir(exist_ok=True)
    for file, contents in files.items():
        with replacing(file) as partial:
            partial.write_bytes(contents)
    if to_screen:
        print(numbers, end="")
        return
    for section in sections:
        show(section.for_terminal(), "")
    show(*(f"- {note}" for note in inspection.notes), *(f"written: {file}" for file in files), verdict(inspection))
