"""Files up to the Hub in one commit, which arrives whole or not at all."""

import json
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..inputs.files import parse_json, replacing
from ..inputs.typed_values import plain, typed
from .compat import httpx
from .download import (
    WAITS,
    describe,
    hash_file,
    is_same,
    is_transient,
    limited_silence,
    look_at,
    patiently,
)

logger = logging.getLogger(__name__)

_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{16,}")
_FAILURES = (HfHubHTTPError, httpx.HTTPError, RuntimeError, ValueError)  # what the client raises when a push fails


@limited_silence()
def make_repo(repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """
    Make a model repository unless it is there, and check that the token may write to it.

    Returns:
        `str`: its full name, `namespace/name`.

    Raises: as [`push_lori_to_hub`].
    """
    api = HfApi(token=token)
    try:
        repo_id = _make(api, repo_id, private)
        patiently(lambda: api.auth_check(repo_id, write=True))
    except _FAILURES as error:
        raise _explained(repo_id, token, error, "Nothing was sent.") from None
    return repo_id


@limited_silence()
def full_name(repo_id: str, token: str | None = None) -> str:
    """
    Complete a repository's name with the namespace of the user, where it has none; else the Hub is not asked.

    Raises: as [`push_lori_to_hub`].
    """
    if "/" in repo_id:
        return repo_id
    try:
        return f"{patiently(HfApi(token=token).whoami)['name']}/{repo_id}"
    except _FAILURES as error:
        raise _explained(repo_id, token, error, "Nothing was sent.") from None


@limited_silence()
def push_files(
    files: Mapping[str, Path],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str,
    token: str | None = None,
    left_over: Callable[[Iterable[str], Collection[str]], list[str]] = lambda there, new: [],
    memory: Path | None = None,
) -> CommitInfo:
    """
    Push files to a model repository in one commit.

    Each failure is followed by a look at the branch: a commit that arrived though its answer did not is not made
    twice, and one that did not arrive is made again, a few times.

    Args:
        files (`Mapping[str, Path]`): name in the repository -> file.
        repo_id, private, revision, create_pr, commit_message, token: as in [`push_lori_to_hub`].
        left_over (`Callable[[Iterable[str], Collection[str]], list[str]]`, *optional*):
            Takes the names of the files in the repository and of the new ones, returns those that the commit removes.
        memory (`Path`, *optional*):
            Where to remember the commits made from here. A branch whose head is another is not pushed over.

    Raises: as [`push_lori_to_hub`].
    """
    push = _Push(HfApi(token=token), repo_id, revision, create_pr, commit_message, dict(files), left_over, token)
    try:
        push.repo_id = _make(push.api, repo_id, private)
        head = _look(push.api, push.repo_id, revision)
        found = _find(push, head)
    except _FAILURES as error:
        raise _explained(push.repo_id, push.token, error, "Nothing was sent.") from None
    remembered = _Memory(memory, f"{push.api.endpoint}/{push.repo_id}@{revision or 'main'}")
    if found is None and not create_pr:
        remembered.check(head, push)
        remembered.note(head, push)
    info = found or _commit(push, head)
    if not create_pr:
        remembered.keep(info.oid)
    return info


class _Head(NamedTuple):
    """A commit and its files."""

    commit: str
    files: dict[str, RepoSibling]


@dataclass
class _Push:
    """What is to be pushed, and where."""

    api: HfApi
    repo_id: str
    revision: str | None
    create_pr: bool
    message: str
    files: dict[str, Path]
    left_over: Callable[[Iterable[str], Collection[str]], list[str]]
    token: str | None

    def changed(self, head: _Head) -> list[str]:
        """Names whose contents the commit lacks."""
        there = head.files
        return [name for name, file in self.files.items() if name not in there or not is_same(file, there[name])]

    def stale(self, head: _Head) -> list[str]:
        """Names in the commit that this push removes."""
        return self.left_over(head.files, self.files)

    def find(self, head: _Head) -> CommitInfo | None:
        """Return the commit that has these contents already: the head, or that of an open pull request."""
        if not self.changed(head) and not self.stale(head):
            return self._info(head.commit)
        if self.create_pr:
            for discussion in patiently(lambda: list(self.api.get_repo_discussions(self.repo_id))):
                if discussion.is_pull_request and discussion.status == "open" and discussion.title == self.message:
                    proposed = _look(self.api, self.repo_id, discussion.git_reference)
                    if not self.changed(proposed) and not self.stale(proposed):
                        return self._info(proposed.commit, discussion.num)
        return None

    def send(self, head: _Head) -> CommitInfo:
        """Make the commit on top of a head; the Hub refuses it if the branch has another head by then."""
        # The client marks the operations that it has used: every attempt needs its own.
        operations = [CommitOperationAdd(name, str(self.files[name])) for name in self.changed(head)]
        operations += [CommitOperationDelete(name) for name in self.stale(head)]
        return self.api.create_commit(
            self.repo_id,
            operations,
            commit_message=self.message,
            revision=self.revision,
            create_pr=self.create_pr,
            parent_commit=head.commit,
        )

    def _info(self, commit: str, pull_request: int | None = None) -> CommitInfo:
        url = f"{self.api.endpoint}/{self.repo_id}"
        return CommitInfo(
            commit_url=f"{url}/commit/{commit}",
            commit_message=self.message,
            commit_description="",
            oid=commit,
            _endpoint=self.api.endpoint,
            pr_url=None if pull_request is None else f"{url}/discussions/{pull_request}",
        )


@dataclass(frozen=True)
class _Remembered:
    """The head that the last push left on a branch, and of a later one that was on its way: name -> its hashes."""

    commit: str
    sent: dict[str, tuple[str, ...]]


class _Memory:
    """
    Remembers, in the folder that is pushed, what the last push from it left on each branch.

    What is about to be sent is noted too: if the process dies before the answer, the commit is recognised later. A
    file that was cut or cannot be written stops no push: what is not remembered is not checked.
    """

    def __init__(self, file: Path | None, branch: str):
        self.file, self.branch = file, branch
        self.records: dict[str, _Remembered] = {}
        if file is not None:
            with suppress(OSError, ValueError, TypeError, RecursionError):
                self.records = typed(dict[str, _Remembered], parse_json(file.read_text(encoding="utf-8")), "")

    def check(self, head: _Head, push: _Push) -> None:
        """Raise if the head is neither the commit that was left there nor what was on its way."""
        record = self.records.get(self.branch)
        if record is None or record.commit == head.commit:
            return
        hashes = {name: file.lfs.sha256 if file.lfs else file.blob_id for name, file in head.files.items()}
        if not record.sent or not all(hashes.get(name) in known for name, known in record.sent.items()):
            raise _conflict(push, head, f" To put yours on top of it all the same, delete `{self.file}` first.")

    def note(self, head: _Head, push: _Push) -> None:
        """Note what is about to be sent."""
        hashes: dict[str, tuple[str, ...]] = {
            name: (hash_file(file, lfs=True), hash_file(file, lfs=False)) for name, file in push.files.items()
        }
        self._write(_Remembered(head.commit, hashes))

    def keep(self, commit: str) -> None:
        """Note the commit that has arrived."""
        self._write(_Remembered(commit, {}))

    def _write(self, record: _Remembered) -> None:
        self.records[self.branch] = record
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.file) as partial:
                partial.write_text(json.dumps(plain(self.records), indent=2), encoding="utf-8")
        except OSError as error:
            logger.info(
                f"`{self.file}` was not written ({error}): the next push does not know this commit as its own."
            )


def _find(push: _Push, head: _Head) -> CommitInfo | None:
    try:
        return push.find(head)
    except HfHubHTTPError as error:
        if is_transient(error) or not push.create_pr:
            raise
        return None  # pull requests that may not be listed may still be made


def _commit(push: _Push, head: _Head) -> CommitInfo:
    for seconds in (*WAITS, None):
        try:
            return push.send(head)
        except _FAILURES as error:
            failure = error
        if not _is_conflict(failure) and not is_transient(failure):
            raise _explained(push.repo_id, push.token, failure, "The branch is as it was.") from None
        try:
            now = _look(push.api, push.repo_id, push.revision)
            if (found := push.find(now)) is not None:
                return found
        except _FAILURES:
            state = "Whether the commit arrived could not be seen; if it did, the next push finds it there."
            raise _explained(push.repo_id, push.token, failure, state) from None
        if now.commit != head.commit and not push.create_pr:
            raise _conflict(push, now)
        if seconds is not None:
            time.sleep(seconds)
    raise _explained(
        push.repo_id, push.token, failure, f"{len(WAITS) + 1} attempts were made, and the branch is as it was."
    ) from None


def _make(api: HfApi, repo_id: str, private: bool | None) -> str:
    """Return the repository's full name, after making it if it is missing."""
    if "/" not in repo_id:
        repo_id = f"{patiently(api.whoami)['name']}/{repo_id}"
    validate_repo_id(repo_id)

    def make() -> None:
        try:  # look first: it may be there, also when an earlier attempt to make it seemed to fail
            found = look_at(api, repo_id)
        except RepositoryNotFoundError:
            api.create_repo(repo_id, private=private, exist_ok=True)
        else:
            if private and found.private is False:
                raise PermissionError(
                    f"`private=True`, but `{repo_id}` is there already and public. A push does not change who may "
                    "read a repository. Make it private on its page, or push to another one."
                )

    patiently(make)
    return repo_id


def _look(api: HfApi, repo_id: str, revision: str | None) -> _Head:
    """Look at a branch, after making it if it is missing."""

    def look():
        return look_at(api, repo_id, revision)

    try:
        info = patiently(look)
    except RevisionNotFoundError:
        if revision is None or revision.startswith("refs/"):
            raise
        patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        info = patiently(look)
    return _Head(info.sha, {sibling.rfilename: sibling for sibling in info.siblings})


def _is_conflict(error: Exception) -> bool:
    return isinstance(error, HfHubHTTPError) and error.response.status_code == 412


def refuse_tokens(files: Mapping[str, Path]) -> None:
    """Raise `ValueError` if a text file holds what looks like an access token."""
    for name, file in files.items():
        if file.suffix in (".json", ".yaml", ".md") and _TOKEN.search(file.read_bytes()):
            raise ValueError(
                f"`{name}` holds what looks like an access token. What is pushed can be read by others. Take it out "
                "of the file, and log in with `hf auth login` instead."
            )


def _conflict(push: _Push, head: _Head, way_out: str = "") -> RuntimeError:
    branch = push.revision or "main"
    return RuntimeError(
        f"`{push.repo_id}` has a newer commit on {branch} ({head.commit[:12]}) that was not made from here. A push "
        f"does not go over other people's work; nothing was changed. Look at it at {push.api.endpoint}/{push.repo_id}"
        f"/commits/{branch}, then pass `create_pr=True` (`--create_pr`) to offer yours as a pull request, or another "
        f"`revision`.{way_out}"
    )


def _explained(repo_id: str, token: str | None, error: Exception, state: str) -> Exception:
    """Say what happened, how things stand, and what to do."""
    met = describe(error, token)
    what = f"The push to `{repo_id}` failed ({met}). {state}"
    if is_transient(error) or _is_conflict(error):
        return RuntimeError(
            f"{what} The Hub must be reachable and not be limiting your requests. Push again in a few minutes: files "
            "that it has already are not sent again."
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
        return PermissionError(
            f"{what} A token that may write to `{repo_id}` is needed. Log in with `hf auth login`, or pass "
            "another `token`; check the repository's name."
        )
    if isinstance(error, HFValidationError):
        return ValueError(
            f"`repo_id={repo_id!r}` is no repository's name ({met}). It is `namespace/name`, of letters, digits, "
            "'-', '_' and '.'. Correct it."
        )
    return ValueError(f"{what} The Hub takes valid files and metadata only. Correct what it names and push again.")
