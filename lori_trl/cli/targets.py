"""Where files are to be written: checked, for all commands alike, before work goes into what to write."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path


def check_targets(
    targets: Mapping[str, Path | None],
    inputs: Iterable[str | Path] = (),
    *,
    folders: Iterable[str] = (),
    overwrite: bool = False,
) -> None:
    """
    Check that files and folders can be written, and that none destroys another or an input.

    Args:
        targets (`Mapping[str, Path | None]`): option -> the file or folder, or `None` where it was not given.
        inputs (`Iterable[str | Path]`, *optional*): what is read: folders, files, names on the Hub.
        folders (`Iterable[str]`, *optional*): the options that name folders of pictures.
        overwrite (`bool`, *optional*, defaults to `False`): whether files that are there may be replaced.

    Raises:
        `FileExistsError`: a file is there, or a folder has pictures.
        `ValueError`: two are the same, or one is an input, lies in one, or is a file of another adapter.
        `OSError`: one cannot be written.
    """
    sources = [Path(source) for source in inputs if os.path.exists(source)]
    options: dict[Path, str] = {}
    for option, target in targets.items():
        if target is None:
            continue
        _check_writable(option, target, is_folder=option in folders)
        _check_beside(option, target, sources)
        if _place(target) in options:
            raise ValueError(
                f"`{options[_place(target)]}` and `{option}` are both {target}. One place cannot hold both. Pass "
                "another."
            )
        options[_place(target)] = option
        if not overwrite:
            _check_new(option, target, is_folder=option in folders)


def _check_new(option: str, target: Path, *, is_folder: bool) -> None:
    if any(target.glob("*.png")) if is_folder else target.exists():
        held = "holds pictures already" if is_folder else "exists"
        raise FileExistsError(
            f"`{option} {target}` {held}. What is written goes to a new place. Pass another name, or `--overwrite` to "
            "replace what is there."
        )


def _check_writable(option: str, target: Path, *, is_folder: bool) -> None:
    compact = target.suffix == ".safetensors" and option.startswith("--")  # of `lori export` it is what is asked for
    if not is_folder and target.exists() and (compact or (target.parent / "adapter_config.json").exists()):
        raise ValueError(
            f"`{option} {target}` is an adapter or a file of one's folder. An output never changes an adapter. Pass a "
            "place outside of it."
        )
    kind = "a folder" if is_folder else "a file"
    wrong_kind = target.exists() and not (target.is_dir() if is_folder else target.is_file())
    if wrong_kind or not os.access(target if target.is_dir() else target.parent, os.W_OK | os.X_OK):
        raise OSError(
            f"`{option} {target}` cannot be written. Allowed is {kind} in a folder that exists and is writable. Pass "
            "another, or make the folder above it."
        )


def _check_beside(option: str, target: Path, sources: Iterable[Path]) -> None:
    place = _place(target)
    for source in sources:
        if {_place(source), source.resolve()} & {place, *place.parents, target.resolve()}:
            raise ValueError(
                f"`{option} {target}` is `{source}`, which is read, or lies in it. An output never changes an input. "
                "Pass a place beside it."
            )


def _place(target: Path) -> Path:
    """Where a name stands: what takes it replaces a link, not the link's end."""
    return target.parent.resolve() / target.name
