"""Options that several commands have."""

import argparse


def add_allow_modified(parser: argparse.ArgumentParser) -> None:
    """Add `--allow-modified`."""
    parser.add_argument(
        "--allow-modified",
        action="store_true",
        help="take an adapter that was changed after lori_trl saved it, e.g. by training it on with plain PEFT",
    )
