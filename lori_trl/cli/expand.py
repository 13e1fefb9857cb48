"""`lori expand`: the plain PEFT files from the compact form."""

import argparse
from pathlib import Path

from .terminal import show


def add_parser(commands) -> None:
    expand = commands.add_parser(
        "expand",
        help="restore the plain PEFT files from the compact form",
        epilog="example:\n  lori expand code-lori-s.safetensors code-lori-s",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    expand.add_argument("file", type=Path, help="the compact file")
    expand.add_argument("folder", type=Path, help="where to")
    expand.add_argument("--overwrite", action="store_true", help="replace an adapter that is in the folder")
    expand.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    from ..compact import expand

    expand(options.file, options.folder, overwrite=options.overwrite)
    show(f"{options.folder}: the plain PEFT adapter")
