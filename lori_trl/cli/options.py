"""Options that several commands have."""

import argparse
import re
from collections.abc import Iterable


def with_underscores(arguments: Iterable[str]) -> list[str]:
    """Spell options as TRL's are, with underscores: `--dry-run` is `--dry_run`. Values stay."""
    return [re.sub(r"^--[\w-]+", lambda option: f"--{option[0][2:].replace('-', '_')}", word) for word in arguments]


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Add `--dtype` and `--load_in_4bit`."""
    parser.add_argument(
        "--dtype",
        type=str,
        choices=["float32", "bfloat16", "float16"],
        help="of the base model's weights (default: float32)",
    )
    parser.add_argument(
        "--load_in_4bit", action="store_true", help="pack the base model's linear layers into 4 bits, as QLoRA does"
    )


def add_allow_modified(parser: argparse.ArgumentParser) -> None:
    """Add `--allow_modified`."""
    parser.add_argument(
        "--allow_modified",
        action="store_true",
        help="take an adapter that was changed after lori_trl saved it, e.g. by training it on with plain PEFT",
    )
