"""An adapter up to the Hub: its files, and no others, in one commit."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import CommitInfo, HfApi

from ..hub.commit import full_name, push_files, refuse_tokens
from ..inputs.files import room_for
from .compact_file import write_compact
from .folder import AdapterFolder, base_name
from .layout import (
    ADAPTER_CONFIG,
    CARD_NAME,
    COMPACT_NAME,
    EVAL_RESULTS_NAME,
    PEFT_FILES,
    PICTURE_NAME,
    RECIPE_NAME,
    RECORD_NAME,
    left_over,
    masks_name,
    moments_name,
    tokenizer_files,
)
from .record import read_record
from .write import LOCAL_PATH, refuse_link_out, write_card

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

FORMS = ("peft", "compact")
_PATHS = ("dataset_path", "output_dir", "logging_dir", "heldout")  # keys of a recipe that hold nothing else
MEMORY = Path(".cache", "lori_trl", "pushed.json")  # in the adapter's folder: which commits are its own


def push_lori_to_hub(
    source: "Trainer | str | Path",
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    include: Sequence[str] = ("peft",),
    allow_modified: bool = False,
) -> CommitInfo | None:
    """
    Push an adapter to the Hub: its files in one commit, and no other files.

    The commit has the adapter, its masks, `lori_config.json`, the tokenizer with its chat template, the recipe,
    evaluation results, the card and its picture. Files of an earlier adapter that this one does not have are removed
    in the same commit; files that are not an adapter's are left alone. Where the branch has the same contents already,
    no commit is made.

    Args:
        source (`Trainer` or `str` or `Path`):
            A LoRI trainer, whose adapter is saved to its `output_dir` first, or an adapter's folder. With a trainer,
            call it on every process; the main one pushes.
        repo_id (`str`): the repository, `namespace/name` or a name in your own namespace. Made if it is missing.
        private (`bool`, *optional*): whether a repository that is made is private; by default as the namespace says.
        revision (`str`, *optional*): the branch, made if it is missing; by default `main`.
        create_pr (`bool`, *optional*, defaults to `False`): open a pull request instead of pushing to the branch.
        commit_message (`str`, *optional*): by default names the variant and task.
        token (`str`, *optional*): a token that may write; by default that of `hf auth login`.
        include (`Sequence[str]`, *optional*, defaults to `("peft",)`):
            Which forms: `"peft"` are the plain PEFT files, `"compact"` is the small file of
            [`~compact.export_compact`].
        allow_modified (`bool`, *optional*, defaults to `False`): push a folder that was changed after it was saved.

    Returns:
        `CommitInfo` or `None`: the commit, or the one that has the contents already; `None` on the other processes.

    Raises:
        `FileNotFoundError`: the folder holds no complete LoRI adapter.
        `ValueError`: an argument is not allowed, a file holds a token, or the Hub rejects the contents.
        `PermissionError`: the token is missing, invalid or may not write here.
        `RuntimeError`: somebody else's commit is in the way, or the Hub could not be reached. The branch is as before.

    ```python
    push_lori_to_hub("code-lori-s", "me/code-lori-s", private=True)
    ```
    """
    if isinstance(source, (str, os.PathLike)):
        folder, is_main = Path(source), os.environ.get("RANK", "0") == "0"
    else:
        source.save_model(_internal_call=True)
        folder, is_main = Path(source.args.output_dir), source.is_world_process_zero()
    if not is_main:
        return None
    repo_id = full_name(repo_id, token)  # the card names it
    with adapter_files(folder, repo_id, include, allow_modified=allow_modified) as files:
        record = read_record(folder, allow_modified=allow_modified)
        return push_files(
            files,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"{record.variant} adapter: {record.task}",
            token=token,
            left_over=left_over,
            memory=folder / MEMORY,
        )


def push_in_background(folder: str | Path, memory: Path, repo_id: str, **arguments) -> Future:
    """
    Push a folder while training goes on. Its files are copied first, and a failure is logged.

    Args:
        folder (`str` or `Path`): the adapter's folder, e.g. a checkpoint; it may be deleted meanwhile.
        memory (`Path`): the file that says which commits are this run's own.
        repo_id (`str`): the repository.
        **arguments: `private`, `revision`, `commit_message` and `token` of [`push_files`].

    Returns:
        `Future`: done when the push is; never raises.
    """
    copy = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with adapter_files(folder, repo_id) as files:
        copies = {name: Path(copy.name, str(number)) for number, name in enumerate(files)}
        for name, file in files.items():
            shutil.copyfile(file, copies[name])

    def push() -> None:
        with copy, logged("The push of a checkpoint failed, training goes on"):
            push_files(copies, repo_id, left_over=left_over, memory=memory, **arguments)

    return HfApi().run_as_future(push)


@contextmanager
def logged(what: str) -> Iterator[None]:
    """Log whatever goes wrong inside instead of raising it: a run is worth more than its push or its card."""
    try:
        yield
    except Exception as error:
        logger.error(f"{what}: {error}")


@contextmanager
def adapter_files(
    folder: str | Path, repo_id: str, include: Sequence[str] = ("peft",), *, allow_modified: bool = False
) -> Iterator[dict[str, Path]]:
    """
    Yield what a push of an adapter's folder consists of: name in the repository -> file.

    All of it is read and checked first. Of local paths, the last part goes up. The card is written anew, with the
    repository's name and the evaluation results, unless it was edited by hand.

    Raises:
        `FileNotFoundError`: a file is missing.
        `ValueError`: `include` is not allowed, a file was changed, leads out of the folder, or holds a token.
    """
    folder = Path(folder)
    if isinstance(include, str) or not set(include) <= set(FORMS) or not include:
        raise ValueError(
            f"`include={include!r}` is not known. A push has one or both of {', '.join(FORMS)}. Pass e.g. "
            "`include=('peft', 'compact')`."
        )
    record = read_record(folder, allow_modified=allow_modified)
    needed = [RECORD_NAME, *PEFT_FILES, *(masks_name(task.task) for task in record.tasks)]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"`{folder}` lacks {', '.join(missing)}. A LoRI adapter's folder has {', '.join(needed)}. Pass the folder "
            "that `save_model()` wrote."
        )
    beside = (RECIPE_NAME, EVAL_RESULTS_NAME, PICTURE_NAME)
    optional = [name for name in (*beside, moments_name(record.task)) if (folder / name).is_file()]
    tokenizer = tokenizer_files(folder)
    for name in [*needed, *optional, *tokenizer, CARD_NAME]:
        refuse_link_out(folder, name)
    adapter = AdapterFolder(str(folder), folder, allow_modified)
    adapter.verify()
    with tempfile.TemporaryDirectory() as stage:
        files = {name: folder / name for name in [*(needed if "peft" in include else needed[:1]), *optional]}
        files |= tokenizer
        public = _without_local_paths(adapter)
        for name in public.keys() & files.keys():
            files[name] = Path(stage, name)
            files[name].write_text(public[name], encoding="utf-8")
        if "compact" in include:
            files[COMPACT_NAME] = Path(stage, COMPACT_NAME)
            config = json.loads(public[ADAPTER_CONFIG]) if ADAPTER_CONFIG in public else adapter.config
            contents = adapter.contents()
            recipe = public.get(RECIPE_NAME, contents.recipe)
            with room_for(files[COMPACT_NAME]):
                write_compact(files[COMPACT_NAME], replace(contents, adapter_config=config, recipe=recipe))
        newest = next(reversed(adapter.masks.values()), None)
        place = {"repo_id": repo_id, "forms": tuple(include)}
        files[CARD_NAME] = write_card(folder, record, newest, beside=folder, target=stage, **place)
        refuse_tokens(files)
        yield dict(sorted(files.items()))


def _without_local_paths(adapter: AdapterFolder) -> dict[str, str]:
    """Return the files that name places of this machine, with the last part of these instead: name -> text."""
    texts = {}
    base = adapter.config.get("base_model_name_or_path")
    if base and base != adapter.base:
        texts[ADAPTER_CONFIG] = json.dumps({**adapter.config, "base_model_name_or_path": adapter.base}, indent=2)
    if (adapter.folder / RECIPE_NAME).is_file():
        recipe = yaml.safe_load((adapter.folder / RECIPE_NAME).read_text(encoding="utf-8"))
        if (public := _names_for_paths(recipe, {base: adapter.base} if base else {})) != recipe:
            texts[RECIPE_NAME] = yaml.safe_dump(public, sort_keys=False)
    return texts


def _names_for_paths(value: Any, known: Mapping[str, str | None], is_local: bool = False) -> Any:
    """Replace paths in a recipe by their last parts; `known` has names for some of them."""
    if isinstance(value, dict):
        return {key: _names_for_paths(each, known, key in _PATHS) for key, each in value.items()}
    if isinstance(value, list):
        return [_names_for_paths(each, known, is_local) for each in value]
    if not isinstance(value, str):
        return value
    if value in known:
        return known[value]
    is_local = is_local or LOCAL_PATH.match(value) is not None or ("/" in value and os.path.exists(value))
    return base_name(value, is_local=True) if is_local else value
