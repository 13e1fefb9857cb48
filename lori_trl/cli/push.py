"""`lori push`: an adapter's folder to the Hub, in one commit."""

import argparse
from pathlib import Path

from .options import add_allow_modified
from .terminal import show


def add_parser(commands) -> None:
    push = commands.add_parser(
        "push",
        help="push an adapter's folder to the Hub, in one commit",
        epilog="example:\n  lori push code-lori-s me/code-lori-s --private",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    push.add_argument("folder", type=Path, help="the adapter's folder")
    push.add_argument(
        "repo",
        help="the repository on the Hub, namespace/name, or a name of yours; made if it is missing",
    )
    push.add_argument("--private", action="store_true", default=None, help="make a private repository")
    push.add_argument("--revision", help="the branch; made if it is missing")
    push.add_argument("--create_pr", action="store_true", help="open a pull request instead")
    push.add_argument(
        "--include", nargs="+", default=["peft"], choices=["peft", "compact"], help="which forms of the adapter"
    )
    push.add_argument("--dry_run", action="store_true", help="list the files and their sizes, and push nothing")
    add_allow_modified(push)
    push.set_defaults(func=run)


def run(options: argparse.Namespace) -> None:
    from rich.table import Table

    from ..adapter.push import adapter_files, push_lori_to_hub
    from ..hub.commit import full_name

    _check_repo(options.repo)
    if options.dry_run:
        repo = full_name(options.repo)
        with adapter_files(options.folder, repo, options.include, allow_modified=options.allow_modified) as files:
            table = Table("file", "bytes", title=f"{options.folder} -> {repo}{', private' if options.private else ''}")
            for name, file in files.items():
                table.add_row(name, f"{file.stat().st_size:,}")
            table.add_row("together", f"{sum(file.stat().st_size for file in files.values()):,}")
        show(table)
        return
    commit = push_lori_to_hub(
        options.folder,
        options.repo,
        private=options.private,
        revision=options.revision,
        create_pr=options.create_pr,
        include=options.include,
        allow_modified=options.allow_modified,
    )
    if commit is not None:
        show(commit.pr_url or commit.commit_url)


def _check_repo(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise ValueError(
            f"`{repo}` cannot be a repository. Allowed is `namespace/name`, of letters and digits, with single '-', "
            "'_' and '.' between them. Correct it."
        ) from None
