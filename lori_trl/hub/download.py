"""Files down from the Hub: of one commit, and checked byte by byte."""

import glob
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TypeVar

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import get_session

from ..inputs.files import replacing
from .compat import httpx

logger = logging.getLogger(__name__)

WAITS = (1, 2, 4)  # seconds between the attempts of a request that the Hub could not answer
# Seconds that a server may say nothing until a request has failed; the client would wait for ever.
SILENCE = 120.0

Answer = TypeVar("Answer")


@contextmanager
def limited_silence() -> Iterator[None]:
    """Give up, while the context lasts, on a server that accepts a request and says nothing for `SILENCE` seconds."""
    session = get_session()
    before, session.timeout = session.timeout, httpx.Timeout(SILENCE)
    try:
        yield
    finally:
        session.timeout = before


def is_repo_id(name: str | os.PathLike) -> bool:
    """Say whether a name has the form of a Hub repository, `namespace/name`, and is nothing on the disk."""
    repo_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(name), re.ASCII)
    return isinstance(name, str) and repo_id is not None and ".." not in name and not Path(name).exists()


def fetch_from_hub(
    repo_id: str,
    choose: Callable[[list[str]], list[str]],
    *,
    max_bytes: Callable[[str], int | None],
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """
    Fetch files of a model repository into the Hub's cache: all from one commit, each checked against its hash.

    The client notices no wrong byte and takes stale copies without a word; this does neither. Without a connection
    the cached files are used, and checked against the hashes that they are filed under.

    Args:
        repo_id (`str`): the repository, `namespace/name`.
        choose (`Callable[[list[str]], list[str]]`):
            Takes the names of all files, returns those to fetch. It raises where none is wanted.
        max_bytes (`Callable[[str], int | None]`): a file's name -> how large it may be; `None` for no limit.
        revision (`str`, *optional*): a branch, tag or commit; by default the head of `main`.
        token (`str`, *optional*): by default that of `hf auth login`.

    Returns:
        `Path`: the folder in the cache that has the files.

    Raises:
        `FileNotFoundError`: there is no such repository or revision, also for this token.
        `PermissionError`: the token is invalid, or the repository is gated.
        `ConnectionError`: the Hub cannot be reached, and the cache does not have the files.
        `ValueError`: a file is not what the Hub says it is, or has a name or size that it must not have.
    """
    try:
        info = patiently(lambda: look_at(HfApi(token=token), repo_id, revision))
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled, ValueError) as error:
        if isinstance(error, OfflineModeIsEnabled) or is_transient(error):
            return _fetch_from_cache(repo_id, choose, max_bytes, revision, error)
        raise _explained(repo_id, revision, error) from None
    files = {sibling.rfilename: sibling for sibling in info.siblings}
    chosen = _checked_names(repo_id, list(files), choose)
    for name in chosen:
        _check_size(repo_id, name, files[name].size or 0, max_bytes(name))
    folder = _fetch(repo_id, [files[name] for name in chosen], info.sha, token)
    _note_commit(folder, revision or "main")
    return folder


def look_at(api: HfApi, repo_id: str, revision: str | None = None) -> ModelInfo:
    """Ask for a model repository's head and files. Raises what the client does."""
    return api.model_info(repo_id, revision=revision, files_metadata=True, timeout=SILENCE)


def hash_file(file: Path, *, lfs: bool) -> str:
    """Return the hash that the Hub files contents under: SHA-256 for LFS, else git's SHA-1 of a blob."""
    digest = hashlib.sha256() if lfs else hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_same(file: Path, sibling: RepoSibling) -> bool:
    """Say whether a local file has the contents that the Hub lists."""
    if sibling.lfs is not None:
        return hash_file(file, lfs=True) == sibling.lfs.sha256
    return hash_file(file, lfs=False) == sibling.blob_id


def is_transient(error: BaseException) -> bool:
    """Say whether the same request may succeed a little later: the server is busy or down, or the line broke."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    if isinstance(error, (httpx.TransportError, json.JSONDecodeError)):  # a gateway's HTML where JSON should be
        return True
    return error.__cause__ is not None and is_transient(error.__cause__)


def patiently(request: Callable[[], Answer], waits: Sequence[float] | None = None) -> Answer:
    """Make a request that changes nothing, again after each of `waits` as long as it fails for a passing reason."""
    for seconds in WAITS if waits is None else waits:
        try:
            return request()
        except (HfHubHTTPError, httpx.HTTPError, LocalEntryNotFoundError, ValueError) as error:
            if not is_transient(error):
                raise
            time.sleep(seconds)
    return request()


def without_token(text: object, token: str | None = None) -> str:
    """Return an error's text with every token struck out: some errors quote the header that carries it."""
    text = re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_***", str(text))
    for secret in (token, get_token()):
        text = text.replace(secret, "***") if secret else text
    return text


def describe(error: BaseException, token: str | None = None) -> str:
    """Say in one line what a request met."""
    if isinstance(error, HfHubHTTPError):
        lines = [error.server_message] if error.server_message else []
        return without_token(": ".join([f"HTTP {error.response.status_code}", *lines]), token)
    if error.__cause__ is not None:
        return describe(error.__cause__, token)
    return without_token(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", token)


def _checked_names(repo_id: str, names: list[str], choose: Callable[[list[str]], list[str]]) -> list[str]:
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in path.parts[0] or not name.isprintable():
            raise ValueError(
                f"`{repo_id}` lists a file {name!r}, which lies outside the repository. Names of files in it are "
                "relative paths without '..'. Do not use this repository."
            )
    return choose(names)


def _check_size(repo_id: str, name: str, size: int, largest: int | None) -> None:
    if largest is not None and size > largest:
        raise ValueError(
            f"`{name}` in `{repo_id}` has {size / 1e6:.0f} MB. Such a file has at most {largest / 1e6:.0f} MB. Do not "
            "use this repository."
        )


@limited_silence()
def _fetch(repo_id: str, siblings: list[RepoSibling], commit: str, token: str | None) -> Path:
    wanted = siblings
    for again in (False, True):
        patterns = [glob.escape(sibling.rfilename) for sibling in wanted]

        def download(patterns=patterns, again=again):
            return snapshot_download(
                repo_id, revision=commit, allow_patterns=patterns, token=token, force_download=again
            )

        try:
            folder = Path(patiently(download, WAITS[:1]))  # the client itself has tried for half a minute
            wanted = [sibling for sibling in siblings if not is_same(folder / sibling.rfilename, sibling)]
        except (HfHubHTTPError, httpx.HTTPError, FileNotFoundError, ValueError) as error:
            if isinstance(error, HfHubHTTPError) and not is_transient(error):
                raise _explained(repo_id, commit, error) from None
            raise ConnectionError(
                f"The files of `{repo_id}` cannot be fetched ({describe(error, token)}). All must come from commit "
                f"{commit[:12]}, so no older copy is taken. Try again later."
            ) from None
        if not wanted:
            return folder
        logger.warning(f"{wanted[0].rfilename} of {repo_id} in the cache is not what the Hub has: fetching it again.")
    raise ValueError(
        f"`{wanted[0].rfilename}` of `{repo_id}` arrived altered, twice. Its hash must be the one that the Hub lists "
        f"for commit {commit[:12]}. Try again; if it stays so, something between you and the Hub changes the files."
    )


def _note_commit(folder: Path, revision: str) -> None:
    """
    Note which commit a branch or tag is, in the cache's `refs/`, for when the Hub cannot be asked.

    The client does that by itself only where it is asked for a branch, of which it takes whatever commit is newest.
    """
    if revision == folder.name:
        return
    with suppress(OSError):  # a cache that cannot be written has the files all the same
        ref = folder.parents[1] / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        with replacing(ref) as partial:
            partial.write_text(folder.name)


def _fetch_from_cache(
    repo_id: str,
    choose: Callable[[list[str]], list[str]],
    max_bytes: Callable[[str], int | None],
    revision: str | None,
    error: Exception,
) -> Path:
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        raise ConnectionError(
            f"`{repo_id}` cannot be fetched ({describe(error)}), and the cache does not have it. Fetching needs the "
            "Hub once; later loads work offline. Connect, unset HF_HUB_OFFLINE, or try again later."
        ) from None
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    for name in _checked_names(repo_id, names, choose):
        file = folder / name
        _check_size(repo_id, name, file.stat().st_size, max_bytes(name))
        # One step only: behind the file's own hash there may be a link into a store that is filed by another hash.
        known = os.path.basename(os.readlink(file)) if file.is_symlink() else ""
        if known and hash_file(file, lfs=len(known) == 64) != known:
            raise ValueError(
                f"`{name}` of `{repo_id}` is altered in the cache. Its hash must be {known[:12]}..., under which it "
                f"is filed. Delete `{os.path.realpath(file)}` and fetch it again with a connection."
            )
    logger.warning(f"The Hub was not asked ({describe(error)}): {repo_id} comes from the cache, {folder.name[:12]}.")
    return folder


def _explained(repo_id: str, revision: str | None, error: Exception) -> OSError:
    what = f"`{repo_id}`" + (f" at `revision={revision}`" if revision else "")
    if isinstance(error, GatedRepoError) or (
        isinstance(error, HfHubHTTPError)
        and not isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError))
    ):
        return PermissionError(
            f"{what} was refused ({describe(error)}). A token that may read it is needed. Log in with `hf auth "
            "login`, pass another `token`, or ask for access on the repository's page."
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(
            f"{what} does not exist. A revision is a branch, a tag or a commit. Leave it unset for the newest."
        )
    return FileNotFoundError(
        f"{what} does not exist, or is private and the token may not read it. A repository is named "
        "`namespace/name`. Correct the name, or log in with `hf auth login`."
    )
