"""What a task is called where nobody says: after its data, by a name that a file can have."""

import hashlib
import re
import unicodedata
from pathlib import Path

LENGTH = 96
# Words that say nothing of what is in a file or folder: every project has one that is called so.
_NO_NAMES = {
    *("train", "training", "test", "testing", "valid", "validation", "val", "dev", "eval", "evaluation", "heldout"),
    *("data", "dataset", "datasets", "default", "main", "all", "full", "rows", "samples", "examples", "file", "files"),
    *("json", "jsonl", "csv", "parquet", "arrow", "text", "pandas", "generator", "webdataset", "cache", "input"),
    *("raw", "processed", "clean", "final", "new", "out", "output", "tmp", "temp", "home", "users", "root", "mnt"),
    *("work", "workspace", "content", "downloads", "documents", "desktop", "project", "projects"),
}


_VERSION = re.compile(r"v?\d[\d._-]*", re.IGNORECASE)
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def name_of_path(path: Path, split: str | None = None) -> str:
    """
    Name a task after a file of rows or a folder of them: files that are called alike have folders that are not.

    Args:
        path (`Path`): it exists; however it is spelt, the name is the same.
        split (`str`, *optional*): the split of it that is trained on.

    Returns:
        `str`: the file's name and that of the nearest folder above it, or the folder's; what is no name is left out.
            A version has the name above it, too.
    """
    path = path.resolve()
    above = [folder.name for folder in path.parents if folder != Path.home()]
    words = [path.name if path.is_dir() else _SHARD.sub("", path.stem), *above]
    named = [word for word in words if is_name(word)]
    count = 2 if path.is_file() and is_name(words[0]) else 1
    if named and _VERSION.fullmatch(named[:count][-1]):
        count += 1
    words = [*reversed(dict.fromkeys(named[:count])), *_names(split)]
    return file_name_of("-".join(words), str(path))


def name_of_dataset(name: str, config: str | None = None, split: str | None = None) -> str:
    """Name a task after a data set on the Hub, its configuration and split; after its owner where none is a name."""
    namespace, _, own = name.rpartition("/")
    words = _names(own, config, split) or _names(namespace)
    return file_name_of("-".join(words), f"{name} {config} {split}")


def is_name(word: str) -> bool:
    """Say whether a word tells one data set from another."""
    return word.lower() not in _NO_NAMES and any(map(str.isalnum, word))


def _names(*words: str | None) -> list[str]:
    return [word for word in words if word is not None and is_name(word)]


def file_name_of(text: str, meant: str | None = None) -> str:
    """
    Make a name that every system takes for a file's. Where letters are lost by that, a checksum tells names apart.

    Args:
        text (`str`): the name; empty where there is none.
        meant (`str`, *optional*): what a name is made from by checksum where `text` leaves none.

    ```python
    >>> file_name_of("my data (v2)")
    'my-data-v2'

    ```
    """
    letters = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", letters).strip("-._")
    if name and text.isascii() and len(name) <= LENGTH:
        return name
    checksum = hashlib.sha256((text or meant or "").encode()).hexdigest()[:8]
    return f"{name[: LENGTH - 9] or 'data'}-{checksum}"
