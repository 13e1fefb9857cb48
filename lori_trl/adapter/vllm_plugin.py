"""Serving many adapters with vLLM: each is found by its name at the first request for it, compact ones included.

vLLM loads this as a plugin, by the entry point `vllm.general_plugins`. It does nothing unless `LORI_ADAPTERS` is set:

    LORI_ADAPTERS         a folder that holds adapters, or an organisation or user on the Hub
    LORI_CACHE            where compact adapters are unpacked to; by default ~/.cache/lori_trl/unpacked
    LORI_CACHE_GB         how large that may become, in 10^9 bytes; by default 50

Nothing of vLLM is imported before vLLM calls `register`.
"""

import asyncio
import logging
import os
import re
import shutil
import tempfile
import threading
from pathlib import Path

from ..hub.download import hash_file
from .compact_file import read_compact
from .fetch import fetch_adapter
from .folder import AdapterFolder, base_name, may_be_one_base
from .layout import ADAPTER_WEIGHTS, COMPACT_NAME
from .write import write_contents

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}", re.ASCII)  # a request's text: no path may come of it


class AdapterStore:
    """
    Adapters by name, as plain folders that any server can read.

    Args:
        source (`str`):
            A folder that holds, for the name `x`, the adapter's folder `x`, or the compact file `x.safetensors`; what
            is put there later is found too. If there is no such folder: an organisation or user on the Hub, with the
            adapter in `source/x`.
        cache (`Path`): where compact adapters are unpacked to, each under its name and the checksum of its file.
        cache_bytes (`int`):
            How large the cache may become. What was unpacked longest ago goes first, but nothing that this process
            has handed out: vLLM reads a folder again whenever it has dropped an adapter from its memory.
    """

    def __init__(self, source: str, cache: Path, cache_bytes: int):
        self.source, self.cache, self.cache_bytes = source, cache, cache_bytes
        self._handed_out: set[Path] = set()
        self._lock = threading.Lock()

    def find(self, name: str, base_model: str) -> Path | None:
        """
        Return an adapter's plain folder; `None` if there is no adapter of that name.

        Args:
            name (`str`): as a request gives it; not trusted.
            base_model (`str`): the model that is served.

        Raises:
            `ValueError`: the adapter is damaged, or of another base model.
            `ConnectionError`, `PermissionError`: the Hub cannot be reached, or does not hand it out.
        """
        if not _NAME.fullmatch(name) or ".." in name:
            return None
        place = self._locate(name)
        if place is None:
            return None
        with self._lock:
            try:
                folder = self._unpack(name, place) if place.is_file() else place
                adapter = AdapterFolder(name, folder)
                adapter.verify()
            except ValueError as error:
                raise ValueError(f"Adapter {name}: {error}") from error  # vLLM strikes paths out of what it answers
            if not may_be_one_base([adapter.base, base_name(base_model)]):
                raise ValueError(
                    f"`{name}` was trained on {adapter.base}, and {base_name(base_model)} is served. An adapter fits "
                    "its own base model alone. Serve it there, or take it out of the folder."
                )
            self._handed_out.add(folder)
            self._evict()
        return folder

    def _locate(self, name: str) -> Path | None:
        """Return an adapter's plain folder or compact file."""
        if Path(self.source).is_dir():
            place = Path(self.source, name)
            if (file := place.with_name(f"{name}.safetensors")).is_file():
                return file
        else:
            try:
                place = fetch_adapter(f"{self.source}/{name}")
            except FileNotFoundError:
                return None
        if (place / ADAPTER_WEIGHTS).is_file():
            return place
        return file if (file := place / COMPACT_NAME).is_file() else None

    def _unpack(self, name: str, file: Path) -> Path:
        """Unpack a compact file under its checksum, whole or not at all; what is there already is not made again."""
        folder = self.cache / f"{name}-{hash_file(file, lfs=True)[:16]}"
        if folder.is_dir():
            os.utime(folder)
            return folder
        self.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=self.cache) as beside:
            stage = Path(beside, "adapter")
            stage.mkdir()
            write_contents(stage, read_compact(file))
            try:
                stage.rename(folder)
            except OSError:
                if not folder.is_dir():  # another process was faster
                    raise
        return folder

    def _evict(self) -> None:
        unpacked = {folder: _bytes_of(folder) for folder in self.cache.glob("[!.]*") if folder.is_dir()}
        total = sum(unpacked.values())
        for folder in sorted(unpacked, key=lambda each: each.stat().st_mtime):
            if total <= self.cache_bytes:
                return
            if folder not in self._handed_out:
                shutil.rmtree(folder, ignore_errors=True)
                total -= unpacked[folder]
        if total > self.cache_bytes:
            logger.warning(
                f"The {len(self._handed_out)} adapters that were asked for take {total / 1e9:.1f} GB in "
                f"{self.cache}, more than LORI_CACHE_GB allows. All of them are kept, for vLLM reads them again."
            )


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def register() -> None:
    """Register a resolver of adapters with vLLM. vLLM calls it in each of its processes, when it starts."""
    source = os.environ.get("LORI_ADAPTERS")
    if not source:
        return
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    cache = Path(os.environ.get("LORI_CACHE") or Path.home() / ".cache" / "lori_trl" / "unpacked")
    store = AdapterStore(source, cache, int(1e9 * float(os.environ.get("LORI_CACHE_GB", "50"))))

    class LoriResolver(LoRAResolver):
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            folder = await asyncio.to_thread(store.find, lora_name, base_model_name)
            if folder is None:
                return None
            return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(folder))  # vLLM sets the number

    LoRAResolverRegistry.register_resolver("lori_trl", LoriResolver())
