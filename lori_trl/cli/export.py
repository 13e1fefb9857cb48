"""`lori export`: an adapter as one small file."""

import argparse
from pathlib import Path

from .options import add_allow_modified
from .targets import check_targets
from .terminal import show


def add_parser(commands) -> None:
    export = commands.add_parser(
        "export",
        help="write an adapter as one small file",
        epilog="example:\n  lori export --compact code-lori-s code-lori-s.safetensors --dtype bfloat16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("--compact", action="store_true", required=True, help="the form: seed, positions and values")
    export.add_argument("folder", type=Path, help="the adapter's folder")
    export.add_argument("file", type=Path, help="the new file")
    export.add_argument(
        "--dtype", choices=["bfloat16", "float16", "int8"], help="round the values; by default they are exact"
    )
    export.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    add_allow_modified(export)
    export.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    import torch

    from ..compact import export_compact

    check_targets({"file": options.file}, [options.folder])
    dtype = getattr(torch, options.dtype) if options.dtype else None
    changes = {"overwrite": options.overwrite, "allow_modified": options.allow_modified}
    file = export_compact(options.folder, options.file, dtype=dtype, **changes)
    show(f"{file}: {file.stat().st_size:,} bytes")
