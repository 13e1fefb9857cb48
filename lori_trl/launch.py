"""The launch files that are shipped: how accelerate starts a run on several devices, and what it deals out to them."""

from pathlib import Path

_FOLDER = Path(__file__).parent / "accelerate_configs"


def find_launch_file(name_or_path: str) -> Path:
    """
    Find a launch file: a path, or the name of a shipped one.

    Raises:
        `FileNotFoundError`: neither exists.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    shipped = {file.stem: file for file in sorted(_FOLDER.glob("*.yaml"))}
    if name_or_path not in shipped:
        raise FileNotFoundError(
            f"`--accelerate_config {name_or_path}` is neither a file nor a shipped launch file. Shipped are "
            f"{', '.join(shipped)}. Pass one of these, or a file that `accelerate config` wrote."
        )
    return shipped[name_or_path]
