"""Adapters by name for a server: found, checked, unpacked once, and evicted by size. No vLLM is needed here."""

import os
import shutil
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, client_of
from safetensors.torch import load_file
from tiny import model_folder, trained_adapter

from lori_trl import push_lori_to_hub
from lori_trl.adapter import vllm_plugin
from lori_trl.adapter.vllm_plugin import AdapterStore
from lori_trl.compact import export_compact

BASE = str(model_folder())
GB = 10**9


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    export_compact(trained_adapter(), folder / "small.safetensors")
    shutil.copytree(trained_adapter(), folder / "plain")
    (folder / "inside").mkdir()
    export_compact(trained_adapter(), folder / "inside" / "adapter_compact.safetensors")
    return folder


def weights(folder: Path) -> dict:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["small", "plain", "inside"])
def test_an_adapter_is_found_in_every_form(source, tmp_path, name):
    store = AdapterStore(str(source), tmp_path / "cache", GB)
    folder = store.find(name, BASE)
    expected = weights(trained_adapter())
    assert all((weights(folder)[key] == tensor).all() for key, tensor in expected.items())
    assert folder == store.find(name, BASE)
    assert (folder.parent == tmp_path / "cache") == (name != "plain")


@pytest.mark.parametrize(
    "name", ["unknown", "../adapters/plain", "..", "plain/../plain", "/etc", "", ".hidden", "a\0b"]
)
def test_a_name_that_is_none_is_no_adapter(source, tmp_path, name):
    assert AdapterStore(str(source), tmp_path / "cache", GB).find(name, BASE) is None
    assert not (tmp_path / "cache").exists()


def test_what_is_put_there_later_is_found_and_a_new_file_is_unpacked_anew(source, tmp_path):
    store = AdapterStore(str(source), tmp_path / "cache", GB)
    assert store.find("late", BASE) is None
    shutil.copy(source / "small.safetensors", source / "late.safetensors")
    first = store.find("late", BASE)
    export_compact(trained_adapter(), tmp_path / "rounded.safetensors", dtype=torch.bfloat16)
    os.replace(tmp_path / "rounded.safetensors", source / "late.safetensors")
    second = store.find("late", BASE)
    assert first != second and first.is_dir() and second.is_dir()


def test_a_bad_adapter_fails_alone_and_says_why(source, tmp_path):
    store = AdapterStore(str(source), tmp_path / "cache", GB)
    content = bytearray((source / "small.safetensors").read_bytes())
    content[-5] ^= 1
    (source / "flipped.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="Adapter flipped: .* do not match their checksum"):
        store.find("flipped", BASE)
    with pytest.raises(ValueError, match="was trained on tiny-llama, and me.other is served"):
        store.find("small", "me/other")
    assert store.find("small", BASE) is not None
    assert not list((tmp_path / "cache").glob(".unpacking-*"))


def test_several_requests_at_once_unpack_once(source, tmp_path):
    stores = [AdapterStore(str(source), tmp_path / "cache", GB) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        folders = [each.result() for each in [pool.submit(stores[n % 2].find, "small", BASE) for n in range(16)]]
    assert len({*folders}) == 1 and len(list((tmp_path / "cache").iterdir())) == 1


def test_the_oldest_goes_when_the_cache_is_full_but_nothing_in_use(source, tmp_path, caplog):
    cache = tmp_path / "cache"
    old = AdapterStore(str(source), cache, GB).find("small", BASE)
    os.utime(old, (0, 0))
    shutil.copy(source / "small.safetensors", source / "next.safetensors")
    store = AdapterStore(str(source), cache, 1)  # a new server, with room for nothing
    kept = store.find("next", BASE)
    assert not old.exists() and kept.is_dir() and "more than LORI_CACHE_GB allows" in caplog.text


def test_adapters_of_an_organisation_on_the_hub(tmp_path, monkeypatch):
    with HubServer() as server, client_of(server, tmp_path / "home", monkeypatch):
        folder = shutil.copytree(trained_adapter(), tmp_path / "code")
        push_lori_to_hub(folder, "me/code", include=("compact",))
        store = AdapterStore("me", tmp_path / "cache", GB)
        assert weights(store.find("code", BASE)).keys() == weights(trained_adapter()).keys()
        assert store.find("nothing", BASE) is None


def test_nothing_happens_unless_it_is_asked_for(monkeypatch):
    monkeypatch.delenv("LORI_ADAPTERS", raising=False)
    vllm_plugin.register()
    assert "vllm" not in sys.modules


def test_vllm_gets_a_resolver(source, tmp_path, monkeypatch):
    """The two modules of vLLM stand in here; the real server is in `make test-serving`."""
    import asyncio

    registered = {}
    request = types.SimpleNamespace(LoRARequest=types.SimpleNamespace)
    registry = types.SimpleNamespace(register_resolver=registered.__setitem__)
    resolver = types.SimpleNamespace(LoRAResolver=object, LoRAResolverRegistry=registry)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    monkeypatch.setitem(sys.modules, "vllm.lora.resolver", resolver)
    monkeypatch.setenv("LORI_ADAPTERS", str(source))
    monkeypatch.setenv("LORI_CACHE", str(tmp_path / "cache"))
    vllm_plugin.register()
    found = asyncio.run(registered["lori_trl"].resolve_lora(BASE, "small"))
    assert found.lora_name == "small" and Path(found.lora_path, "adapter_config.json").is_file()
    assert asyncio.run(registered["lori_trl"].resolve_lora(BASE, "unknown")) is None
