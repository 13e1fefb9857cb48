"""`lori export`: an adapter as one file, small or for llama.cpp."""

import argparse
from pathlib import Path

from .options import add_allow_modified
from .targets import check_targets
from .terminal import show


def add_parser(commands) -> None:
    export = commands.add_parser(
        "export",
        help="write an adapter as one file, small or for llama.cpp",
        epilog="example:\n  lori export --compact code-lori-s code-lori-s.safetensors --dtype bfloat16\n"
        "  lori export --gguf code-lori-s code-lori-s.gguf",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    form = export.add_mutually_exclusive_group(required=True)
    form.add_argument("--compact", action="store_true", help="seed, positions and values, which `lori expand` reads")
    form.add_argument("--gguf", action="store_true", help="llama.cpp's LoRA file, and Ollama's .Modelfile beside it")
    export.add_argument("folder", type=Path, help="the adapter's folder")
    export.add_argument("file", type=Path, help="the new file")
    export.add_argument(
        "--dtype", choices=["bfloat16", "float16", "int8"], help="with --compact: round the values; by default exact"
    )
    export.add_argument("--base_model", help="with --gguf: the base model; by default the one that the adapter names")
    export.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    add_allow_modified(export)
    export.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    for option, form in (("dtype", "compact"), ("base_model", "gguf")):
        if getattr(options, option) is not None and not getattr(options, form):
            raise ValueError(f"`--{option}` goes with `--{form}` alone. Both must be given, or neither. Leave it out.")
    check_targets({"file": options.file}, [options.folder], overwrite=options.overwrite)
    changes = {"overwrite": options.overwrite, "allow_modified": options.allow_modified}
    if options.gguf:
        from ..adapter.gguf_export import export_gguf

        file = export_gguf(options.folder, options.file, base_model=options.base_model, **changes)
    else:
        import torch

        from ..compact import export_compact

        dtype = getattr(torch, options.dtype) if options.dtype else None
        file = export_compact(options.folder, options.file, dtype=dtype, **changes)
    show(f"{file}: {file.stat().st_size:,} bytes")
