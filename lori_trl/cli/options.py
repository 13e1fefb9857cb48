"""Options that several commands have."""

import argparse


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
    """Add `--allow-modified`."""
    parser.add_argument(
        "--allow-modified",
        action="store_true",
        help="take an adapter that was changed after lori_trl saved it, e.g. by training it on with plain PEFT",
    )
