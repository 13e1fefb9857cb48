"""The Hub: pushes and pulls by the real client, against a server over loopback that fails in every way it can."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from files_by_hand import change_record, change_tensors, seal
from hub_server import READ_TOKEN, REVOKED_TOKEN, TOKEN, HubServer, client_of
from huggingface_hub import close_session, constants
from huggingface_hub.utils import get_session
from safetensors.torch import load_file
from tiny import lora_config, make_llama, make_rows, make_tokenizer, make_trainer, model_folder, trained_adapter
from transformers import AutoTokenizer

from lori_trl import LoriMasks, cli, load_lori_adapter, push_lori_to_hub
from lori_trl.compact import export_compact
from lori_trl.evaluation import with_adapter
from lori_trl.hub.download import fetch_from_hub

REPO = "me/code-lori-s"
FILES = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "density.png",
    "lori_config.json",
    "masks/code.safetensors",
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    wait = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: wait(min(seconds, 0.01)))
    with HubServer() as server, client_of(server, tmp_path / "home", monkeypatch):
        yield server


@pytest.fixture
def folder(tmp_path) -> Path:
    return shutil.copytree(trained_adapter(), tmp_path / "code-lori-s")


def titles(hub, repo=REPO, revision="main") -> list[str]:
    return [commit.title for commit in hub.repos[repo].log(revision)]


def contents(hub, repo=REPO, revision="main") -> dict[str, bytes]:
    files = dict(hub.repos[repo].log(revision)[0].files)
    files.pop(".gitattributes")
    return files


def is_whole(hub, folder, repo=REPO, revision="main") -> bool:
    """Whether a branch has the folder's adapter, all of it."""
    files = contents(hub, repo, revision)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = Path(config["base_model_name_or_path"]).name  # a folder stays here
    return (
        set(FILES) <= set(files)
        and json.loads(files["adapter_config.json"]) == config
        and all(
            files[name] == (folder / name).read_bytes() for name in set(FILES) - {"README.md", "adapter_config.json"}
        )
    )


def change(folder: Path) -> None:
    """Train on, as far as files go."""
    change_record(folder, lambda values: values["training"].update(steps=values["training"]["steps"] + 1))


def double_B(tensors: dict) -> None:
    for name, tensor in tensors.items():
        tensor.mul_(2 if "lora_B" in name else 1)


def go_offline(monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()


# ---- pushing ---------------------------------------------------------------------------------------------------


def test_a_push_is_one_commit_of_exactly_the_adapters_files(hub, folder):
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", "events.log", "masks/code.pt", ".env"):
        (folder / name).write_bytes(b"private")
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"private")
    commit = push_lori_to_hub(folder, REPO, private=True)
    assert sorted(contents(hub)) == FILES
    assert is_whole(hub, folder)
    assert titles(hub) == ["LoRI-S adapter: code", "initial commit"]
    assert hub.repos[REPO].private
    assert commit.oid == hub.repos[REPO].branches["main"]
    assert f'PeftModel.from_pretrained(base, "{REPO}")' in contents(hub)["README.md"].decode()


def test_a_second_push_of_the_same_makes_no_commit(hub, folder):
    first = push_lori_to_hub(folder, REPO)
    sent = len(hub.requests)
    assert push_lori_to_hub(folder, REPO).oid == first.oid
    assert len(titles(hub)) == 2
    assert not any("POST" in request for request in hub.requests[sent:])
    shutil.rmtree(folder / ".cache")  # from elsewhere, without the memory of the first push
    assert push_lori_to_hub(folder, REPO).oid == first.oid


def test_a_name_alone_is_in_ones_own_namespace(hub, folder):
    push_lori_to_hub(folder, "code-lori-s")
    assert is_whole(hub, folder, "me/code-lori-s")


def test_files_of_the_adapter_before_are_removed_and_others_left(hub, folder):
    before = {"lori_config.json": b"{}", "masks/old.safetensors": b"old", "eval_results.json": b"{}"}
    hub.create(REPO, files={**before, "LICENSE": b"mine"})
    push_lori_to_hub(folder, REPO)
    assert sorted(contents(hub)) == sorted(["LICENSE", *FILES])


def test_masks_that_belong_to_no_adapter_there_are_not_removed(hub, folder):
    hub.create(REPO, files={"masks/other.safetensors": b"mine"})
    push_lori_to_hub(folder, REPO)
    assert sorted(contents(hub)) == sorted(["masks/other.safetensors", *FILES])


def test_places_of_this_machine_stay_here(hub, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "/home/me/tiny-llama"})
    )
    recipe = {"dataset_path": "/home/me/rows.jsonl", "adapters": ["~/one", "me/two"], "target_modules": r".*\.up_proj"}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    before = {name: (folder / name).read_bytes() for name in ("adapter_config.json", "recipe.yaml")}
    push_lori_to_hub(folder, REPO, include=("peft", "compact"))
    pushed = contents(hub)
    assert json.loads(pushed["adapter_config.json"]) == config | {"base_model_name_or_path": "tiny-llama"}
    public = {"dataset_path": "rows.jsonl", "adapters": ["one", "me/two"], "target_modules": r".*\.up_proj"}
    assert yaml.safe_load(pushed["recipe.yaml"]) == public
    assert not any(b"/home/me" in text for text in pushed.values())
    assert before == {name: (folder / name).read_bytes() for name in before}
    load_lori_adapter(make_llama(), REPO)


def test_what_should_be_private_is_not_pushed_to_a_public_repository(hub, folder):
    hub.create(REPO)
    with pytest.raises(PermissionError, match="is there already and public"):
        push_lori_to_hub(folder, REPO, private=True)
    assert titles(hub) == ["initial commit"]


def test_a_branch_is_made(hub, folder):
    push_lori_to_hub(folder, REPO, revision="epoch-1")
    assert is_whole(hub, folder, revision="epoch-1")
    assert titles(hub) == ["initial commit"]


def test_a_folder_that_lacks_something_is_not_pushed(hub, folder):
    with pytest.raises(FileNotFoundError, match="lori expand"):
        push_lori_to_hub(export_compact(folder, folder.with_name("code.safetensors")), REPO)
    (folder / "masks" / "code.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks masks/code.safetensors"):
        push_lori_to_hub(folder, REPO)
    with pytest.raises(FileNotFoundError, match="lori_config.json"):
        push_lori_to_hub(folder / "masks", REPO)
    with pytest.raises(ValueError, match="include="):
        push_lori_to_hub(folder, REPO, include="compact")
    assert not hub.requests


def test_only_the_main_process_pushes(hub, folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert push_lori_to_hub(folder, REPO) is None
    assert not hub.requests


def test_either_form_or_both(hub, folder):
    push_lori_to_hub(folder, "me/both", include=("peft", "compact"))
    assert sorted(contents(hub, "me/both")) == sorted([*FILES, "adapter_compact.safetensors"])
    push_lori_to_hub(folder, "me/small", include=("compact",))
    plain = {"adapter_config.json", "adapter_model.safetensors", "masks/code.safetensors"}
    assert {*contents(hub, "me/small")} == {*FILES, "adapter_compact.safetensors"} - plain
    assert 'load_lori_adapter(base, "me/small")' in contents(hub, "me/small")["README.md"].decode()
    model = load_lori_adapter(make_llama(), "me/small")
    assert model.lori_masks == {"code": LoriMasks.from_pretrained(folder)}
    assert LoriMasks.from_pretrained("me/small") == LoriMasks.from_pretrained(folder)


def set_template(folder: Path, template: str | dict[str, str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("include", [("peft",), ("compact",)])
def test_the_card_of_a_pushed_adapter_runs_with_its_own_tokenizer(hub, folder, include):
    set_template(folder, "{% for message in messages %}w1 {{ message['content'] }} w2{% endfor %}")
    change_record(folder, lambda values: values["training"]["dataset"].update(conversational=True))
    push_lori_to_hub(folder, REPO, include=include)
    usage = re.search(r"```python\n(.*?)```", contents(hub)["README.md"].decode(), re.DOTALL)[1]
    usage = usage.replace("path/to/the/base/model", str(model_folder()))
    usage = usage.replace(f'PeftModel.from_pretrained(base, "{REPO}")', f'PeftModel.from_pretrained(base, "{folder}")')
    names: dict = {}
    exec(usage, names)  # PEFT alone asks the Hub whose address it was imported with
    assert names["tokenizer"].chat_template.startswith("{% for message")
    assert names["inputs"]["input_ids"][0, 0] == names["tokenizer"].convert_tokens_to_ids("w1")
    with with_adapter(make_llama(), REPO) as (_, own):
        assert own.chat_template == names["tokenizer"].chat_template


def test_the_tokenizer_is_the_one_of_the_last_push(hub, folder):
    """Also beside another adapter in a folder of the same repository, and a whole model's is left alone."""
    hub.create(REPO, files={"math/tokenizer.json": b"math's", "math/adapter_config.json": b"{}"})
    set_template(folder, {"default": "one", "tool_use": "two"})
    push_lori_to_hub(folder, REPO)
    assert contents(hub)["additional_chat_templates/tool_use.jinja"] == b"two"
    shutil.rmtree(folder / "additional_chat_templates")
    set_template(folder, "three")
    push_lori_to_hub(folder, REPO)
    assert sorted(contents(hub)) == sorted(
        [*FILES, "chat_template.jinja", "math/adapter_config.json", "math/tokenizer.json"]
    )
    assert contents(hub)["chat_template.jinja"] == b"three"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    push_lori_to_hub(folder, REPO)
    assert not [name for name in contents(hub) if "/" not in name and ("tokenizer" in name or "template" in name)]
    hub.create("me/model", files={"config.json": b"{}", "tokenizer.json": b"the model's"})
    push_lori_to_hub(folder, "me/model")
    assert contents(hub, "me/model")["tokenizer.json"] == b"the model's"


# ---- faults while pushing --------------------------------------------------------------------------------------

COMMIT, INFO, CREATE, PREUPLOAD = "/commit/", rf"/api/models/{REPO}$", "/repos/create", "/preupload/"
PASSING = [
    ("POST", COMMIT, 503),
    ("POST", COMMIT, 429),
    ("POST", COMMIT, 412),
    ("POST", COMMIT, "html"),
    ("POST", COMMIT, "reset"),
    ("POST", COMMIT, "lost"),
    ("POST", COMMIT, "500-after"),
    ("POST", COMMIT, "503-after"),
    ("POST", COMMIT, "412-after"),
    ("GET", INFO, 503),
    ("GET", INFO, "reset"),
    ("POST", CREATE, 503),
    ("POST", CREATE, "503-after"),
    ("POST", CREATE, "lost"),
    ("POST", PREUPLOAD, 503),
    ("POST", "/validate-yaml", "html"),
    ("POST", "/validate-yaml", "reset"),
    ("POST", "/batch", 503),
    ("PUT", "/lfs/", "reset"),
    ("PUT", "/lfs/", 503),
    ("PUT", "/lfs/", 429),
    ("PUT", "/lfs/", "lost"),
    ("POST", "/lfs-verify", 503),
]


@pytest.mark.parametrize(("method", "path", "what"), PASSING)
def test_a_passing_fault_ends_in_one_whole_commit(hub, folder, method, path, what):
    hub.fail(method, path, what)
    push_lori_to_hub(folder, REPO)
    assert hub.faults[0].times == 0
    assert is_whole(hub, folder)
    assert len(titles(hub)) == 2


@pytest.mark.parametrize(
    ("method", "path", "what", "error", "says"),
    [
        ("POST", COMMIT, 503, RuntimeError, "HTTP 503.*4 attempts.*as it was.*Push again"),
        ("POST", COMMIT, 429, RuntimeError, "HTTP 429.*limiting.*Push again"),
        ("POST", COMMIT, 412, RuntimeError, "HTTP 412.*4 attempts.*as it was.*Push again"),
        ("POST", COMMIT, "reset", RuntimeError, "Push again"),
        ("POST", COMMIT, 401, PermissionError, "HTTP 401.*token.*hf auth login"),
        ("POST", COMMIT, 403, PermissionError, "HTTP 403.*token.*hf auth login"),
        ("POST", COMMIT, 400, ValueError, "HTTP 400.*Correct"),
        ("POST", PREUPLOAD, 403, PermissionError, "HTTP 403.*token"),
        ("GET", "/api/models/", 503, RuntimeError, "HTTP 503.*Nothing was sent"),
        ("PUT", "/lfs/", 503, RuntimeError, "HTTP 503.*as it was"),
        ("PUT", "/lfs/", "reset", RuntimeError, "as it was"),
    ],
)
def test_a_lasting_fault_leaves_the_branch_as_it_was(hub, folder, method, path, what, error, says):
    push_lori_to_hub(folder, REPO)
    before = hub.repos[REPO].branches["main"]
    change(folder)
    hub.objects.clear()
    change_tensors(folder, double_B)  # another large file
    hub.fail(method, path, what, times=1000)
    with pytest.raises(error, match=f"(?s){says}"):
        push_lori_to_hub(folder, REPO)
    assert hub.repos[REPO].branches["main"] == before
    hub.faults.clear()
    push_lori_to_hub(folder, REPO)
    assert is_whole(hub, folder)
    assert len(titles(hub)) == 3


def test_a_stored_commit_that_cannot_be_seen_is_found_by_the_next_push(hub, folder):
    hub.create(REPO)
    hub.fail("POST", COMMIT, "lost", first=lambda: hub.fail("GET", INFO, 503, times=20))
    with pytest.raises(RuntimeError, match="Whether the commit arrived could not be seen"):
        push_lori_to_hub(folder, REPO)
    hub.faults.clear()
    push_lori_to_hub(folder, REPO)
    assert is_whole(hub, folder)
    assert len(titles(hub)) == 2


def test_a_commit_that_comes_between_is_not_pushed_over(hub, folder):
    repo = hub.create(REPO)
    hub.fail("POST", COMMIT, "", first=lambda: repo.commit("main", "theirs", {"README.md": b"theirs"}))
    with pytest.raises(RuntimeError, match=r"(?s)newer commit on main.*nothing was changed.*create_pr=True"):
        push_lori_to_hub(folder, REPO)
    assert titles(hub) == ["theirs", "initial commit"]


@pytest.mark.parametrize(("method", "path"), [("POST", COMMIT), ("GET", INFO), ("POST", CREATE), ("PUT", "/lfs/")])
def test_a_server_that_says_nothing_is_given_up(hub, folder, monkeypatch, method, path):
    monkeypatch.setattr("lori_trl.hub.download.SILENCE", 0.2)
    before = get_session().timeout
    hub.fail(method, path, "reset", times=1000, first=lambda: threading.Event().wait(0.5))
    with pytest.raises(RuntimeError, match="(?s)timed out.*Push again"):
        push_lori_to_hub(folder, REPO)
    assert get_session().timeout == before
    hub.faults.clear()
    push_lori_to_hub(folder, REPO)
    assert is_whole(hub, folder)


def test_somebodys_newer_commit_is_not_pushed_over(hub, folder):
    push_lori_to_hub(folder, REPO)
    repo = hub.repos[REPO]
    theirs = repo.commit("main", "theirs", {**repo.log()[0].files, "README.md": b"better"})
    change(folder)
    for _ in range(2):  # insisting does not help
        with pytest.raises(RuntimeError, match="newer commit"):
            push_lori_to_hub(folder, REPO)
    assert repo.branches["main"] == theirs.sha
    commit = push_lori_to_hub(folder, REPO, create_pr=True)
    assert is_whole(hub, folder, revision=commit.pr_revision)
    (folder / ".cache" / "lori_trl" / "pushed.json").unlink()  # as the message says
    push_lori_to_hub(folder, REPO)
    assert is_whole(hub, folder)


@pytest.mark.parametrize(
    "damaged", ['{"http', "", "[]", "null", '{"%s": 5}', '{"%s": {"commit": 5}}', '{"%s": {"commit": "a", "sent": 1}}']
)
def test_a_memory_that_was_cut_stops_no_push(hub, folder, damaged):
    push_lori_to_hub(folder, REPO)
    memory = folder / ".cache" / "lori_trl" / "pushed.json"
    branch = next(iter(json.loads(memory.read_text())))
    memory.write_text(damaged.replace("%s", branch))
    change(folder)
    push_lori_to_hub(folder, REPO)
    assert is_whole(hub, folder)
    assert json.loads(memory.read_text())[branch]["commit"] == hub.repos[REPO].branches["main"]


def test_a_folder_that_cannot_be_written_is_pushed(hub, folder):
    (folder / ".cache").write_text("no folder")
    push_lori_to_hub(folder, REPO)
    assert is_whole(hub, folder)


@pytest.mark.parametrize("what", ["", "lost", "500-after", 503])
def test_there_is_one_pull_request(hub, folder, what):
    hub.create(REPO)
    hub.fail("POST", COMMIT, what)
    first = push_lori_to_hub(folder, REPO, create_pr=True)
    second = push_lori_to_hub(folder, REPO, create_pr=True)
    assert first.pr_url == second.pr_url
    assert len(hub.repos[REPO].pulls) == 1
    assert is_whole(hub, folder, revision="refs/pr/1")
    assert titles(hub) == ["initial commit"]


def test_of_five_writers_at_once_one_wins(hub, folder, tmp_path):
    hub.create(REPO)
    barrier, outcomes = threading.Barrier(5), []
    folders = [shutil.copytree(folder, tmp_path / f"writer{i}") for i in range(5)]
    for i, mine in enumerate(folders):
        (mine / "recipe.yaml").write_text(f"seed: {i}\n")

    def write(mine: Path) -> None:
        barrier.wait()
        try:
            push_lori_to_hub(mine, REPO)
            outcomes.append(mine)
        except RuntimeError as error:
            assert "newer commit" in str(error)

    hub.fail("POST", COMMIT, "", times=5, first=threading.Barrier(5).wait)  # all have looked before one writes
    threads = [threading.Thread(target=write, args=(mine,)) for mine in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 1
    assert is_whole(hub, outcomes[0])
    assert len(titles(hub)) == 2


# ---- tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [READ_TOKEN, REVOKED_TOKEN, TOKEN + "\n"])
def test_a_token_that_may_not_write_is_named_in_no_error(hub, folder, token, caplog):
    with pytest.raises(Exception) as caught:
        push_lori_to_hub(folder, REPO, token=token)
    assert token.strip() not in "".join(map(str, (caught.value, caught.value.__cause__, caplog.text)))
    assert not hub.objects


@pytest.mark.parametrize(("token", "says"), [(READ_TOKEN, "403"), (REVOKED_TOKEN, "401"), (False, "401")])
def test_without_the_right_nothing_is_sent(hub, folder, token, says):
    hub.create(REPO)
    with pytest.raises(PermissionError, match=f"(?s)HTTP {says}.*hf auth login"):
        push_lori_to_hub(folder, REPO, token=token)
    assert not hub.objects


def test_a_file_with_a_token_is_not_pushed(hub, folder):
    (folder / "recipe.yaml").write_text(f"hub_token: {TOKEN}\n")
    with pytest.raises(ValueError, match="recipe.yaml.*token") as caught:
        push_lori_to_hub(folder, REPO)
    assert TOKEN not in str(caught.value)
    assert not hub.repos


def test_no_token_gets_into_any_file(hub, tmp_path):
    trainer = make_trainer(tmp_path / "out", push_to_hub=True, hub_model_id=REPO, hub_token=TOKEN)
    trainer.recipe = {"hub_token": TOKEN, "model_init_kwargs": {"token": TOKEN, "dtype": "float32"}}
    trainer.train()
    trainer.push_to_hub()
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert sorted(contents(hub)) == FILES
    assert not [file for file in written if TOKEN.encode() in file.read_bytes()]
    assert not [name for name, content in contents(hub).items() if TOKEN.encode() in content]


# ---- the trainer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "pushes"), [("end", 0), ("every_save", 2), ("checkpoint", 2), ("all_checkpoints", 2)]
)
def test_every_strategy_pushes_the_adapter_and_nothing_else(hub, tmp_path, strategy, pushes):
    settings = {"hub_strategy": strategy, "hub_always_push": True, "save_strategy": "steps", "save_steps": 1}
    settings |= {"max_steps": 2, "calibration_max_steps": 2}
    trainer = make_trainer(tmp_path / "out", push_to_hub=True, hub_model_id=REPO, **settings)
    trainer.train()
    progress = [f"Training in progress, step {step}" for step in (2, 1)][:pushes]
    assert titles(hub) == [*progress, "initial commit"]
    trainer.push_to_hub(commit_message="End of training", dataset_name="me/rows")
    assert sorted(contents(hub)) == [name for name in FILES if name != "recipe.yaml"]
    assert titles(hub)[0] == "End of training"
    assert "datasets:\n- me/rows" in contents(hub)["README.md"].decode()
    assert push_lori_to_hub(trainer, REPO).oid == hub.repos[REPO].branches["main"]


@pytest.mark.parametrize("there", [True, False])
def test_rights_are_looked_at_before_a_model_is_loaded(hub, tmp_path, monkeypatch, capsys, there):
    """In Python and on the command line; a repository that is there and that others own looks like one's own."""
    if there:
        hub.create(REPO)
    settings = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": READ_TOKEN}

    def load(*arguments, **named):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", load)
    monkeypatch.setattr("lori_trl.training.base_model.create_model_from_path", load)
    with pytest.raises(PermissionError, match="HTTP 403.*A token that may write to"):
        make_trainer(tmp_path / "out", str(model_folder()), peft_config=lora_config(), **settings)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1", "completion": " w2"}\n')
    call = ["--model_name_or_path", model_folder(), "--dataset_path", tmp_path / "rows.jsonl", "--task_name", "t"]
    call += ["--output_dir", tmp_path / "run", "--bf16", "false", "--use_cpu", "true"]
    for name, value in settings.items():
        call += [f"--{name}", value]
    with pytest.raises(SystemExit, match="2"):
        cli.sft([str(word) for word in call])
    assert "A token that may write to" in capsys.readouterr().err


@pytest.mark.parametrize("what", [503, 401, "reset"])
def test_a_run_is_never_lost_to_the_hub(hub, tmp_path, what, caplog):
    """Rights that are missing are told before the run; those that are lost, and a Hub that is gone, cost no run."""

    def fail():
        for method in ("GET", "POST", "PUT"):
            hub.fail(method, "", what, times=10_000)

    settings = {"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": "every_save", "save_strategy": "epoch"}
    fail()
    if what == 401:
        with pytest.raises(PermissionError, match="HTTP 401.*A token that may write to"):
            make_trainer(tmp_path / "out", **settings)
        hub.faults.clear()
    trainer = make_trainer(tmp_path / "out", **settings)
    fail()
    trainer.train()
    trainer.save_model()
    assert trainer.push_to_hub() is None
    assert "the adapter is saved" in caplog.text
    assert LoriMasks.from_pretrained(tmp_path / "out") == trainer.masks
    hub.faults.clear()
    assert trainer.push_to_hub() is not None


# ---- another process -------------------------------------------------------------------------------------------


def run(hub, home, code: str, *arguments, **environment) -> subprocess.CompletedProcess:
    keep = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HOME") if name in os.environ}
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path + os.pathsep + keep.pop("PYTHONPATH", "")}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**keep, **threads, **hub.environment(str(home)), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.release
def test_plain_peft_in_a_new_process_gives_the_same_logits(hub, folder, tmp_path):
    push_lori_to_hub(folder, REPO, private=True)
    make_llama().save_pretrained(tmp_path / "base")
    code = """
import sys
sys.modules["lori_trl"] = None  # not to be imported
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2])
with torch.inference_mode():
    torch.save(model(torch.arange(3, 40)[None]).logits, sys.argv[3])
"""
    done = run(hub, tmp_path / "new", code, tmp_path / "base", REPO, tmp_path / "logits.pt", HF_TOKEN=READ_TOKEN)
    assert done.returncode == 0, done.stderr
    here = load_lori_adapter(make_llama(), folder)
    with torch.inference_mode():
        expected = here(torch.arange(3, 40)[None]).logits
        plain = make_llama()(torch.arange(3, 40)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)
    assert not torch.equal(plain, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the process to kill is a fork of this one")
@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize(("method", "path"), [("PUT", "/lfs/"), ("POST", COMMIT), ("POST", CREATE)])
@pytest.mark.parametrize("stored", [True, False])
def test_killed_while_pushing_and_pushed_again_is_one_commit(hub, folder, method, path, stored):
    pushing = threading.Event()
    hub.fail(method, path, "" if stored else 503, first=lambda: pushing.wait() and os.kill(child, signal.SIGKILL))
    close_session()  # connections are not to be shared with the child
    child = os.fork()
    if child == 0:
        push_lori_to_hub(folder, REPO)
        os._exit(0)
    pushing.set()
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with hub.lock:
        change(folder)  # it was trained on before it was pushed again
    push_lori_to_hub(folder, REPO)
    assert is_whole(hub, folder)
    assert len(titles(hub)) == (3 if path == COMMIT and stored else 2)


# ---- pulling ---------------------------------------------------------------------------------------------------


def test_an_adapter_from_the_hub_is_the_one_pushed_and_trains_on(hub, folder, tmp_path):
    push_lori_to_hub(folder, REPO, private=True)
    model = load_lori_adapter(make_llama(), REPO, is_trainable=True)
    assert model.lori_masks == {"code": LoriMasks.from_pretrained(folder)}
    assert model.lori_masks["code"].projection == LoriMasks.from_pretrained(folder).projection
    trainer = make_trainer(tmp_path / "out", model=model, task_name="safety")
    trainer.train()
    push_lori_to_hub(trainer, "me/two")
    again = load_lori_adapter(make_llama(), "me/two")
    assert list(again.lori_masks) == ["code", "safety"]
    assert "has learned 2 tasks one after another" in contents(hub, "me/two")["README.md"].decode()
    assert LoriMasks.from_pretrained("me/two") == trainer.masks
    assert LoriMasks.from_pretrained("me/two", task="code") == model.lori_masks["code"]


def test_masks_alone_are_pushed_and_pulled(hub, folder):
    masks = LoriMasks.from_pretrained(folder)
    masks.push_to_hub("me/masks")
    masks.push_to_hub("me/masks")
    assert titles(hub, "me/masks") == ["LoRI masks: code", "initial commit"]
    assert LoriMasks.from_pretrained("me/masks") == masks


def test_a_revision_is_pinned(hub, folder):
    first = push_lori_to_hub(folder, REPO)
    masks = LoriMasks.from_pretrained(REPO)
    flipped = LoriMasks({path: ~mask for path, mask in masks.items()}, **vars(masks.metadata))
    flipped.push_to_hub(REPO)
    assert LoriMasks.from_pretrained(REPO) == flipped
    assert LoriMasks.from_pretrained(REPO, revision=first.oid) == masks
    with pytest.raises(FileNotFoundError, match="revision=nowhere.*branch, a tag or a commit"):
        LoriMasks.from_pretrained(REPO, revision="nowhere")


def test_private_repositories_need_a_token(hub, folder, monkeypatch):
    push_lori_to_hub(folder, REPO, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match="is private.*hf auth login"):
        load_lori_adapter(make_llama(), REPO)
    with pytest.raises(PermissionError, match="HTTP 401.*hf auth login") as caught:
        LoriMasks.from_pretrained(REPO, token=REVOKED_TOKEN)
    assert REVOKED_TOKEN not in str(caught.value)
    assert load_lori_adapter(make_llama(), REPO, token=READ_TOKEN).lori_masks
    assert LoriMasks.from_pretrained(REPO, token=READ_TOKEN)


def test_a_wrong_byte_on_the_way_is_found(hub, folder):
    push_lori_to_hub(folder, REPO)
    hub.fail("GET", "/cdn/", "corrupt")
    assert LoriMasks.from_pretrained(REPO) == LoriMasks.from_pretrained(folder)  # fetched again
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.fail("GET", "/cdn/", "corrupt", times=100)
    with pytest.raises(ValueError, match="arrived altered, twice"):
        LoriMasks.from_pretrained(REPO)


@pytest.mark.parametrize("what", ["cut", "reset", 503])
def test_a_broken_download_is_made_good(hub, folder, what):
    push_lori_to_hub(folder, REPO)
    hub.fail("GET", "/cdn/", what)
    hub.fail("HEAD", "/resolve/", what)
    assert LoriMasks.from_pretrained(REPO) == LoriMasks.from_pretrained(folder)


def test_the_cache_serves_offline_and_a_wrong_byte_in_it_is_found(hub, folder, monkeypatch, caplog):
    push_lori_to_hub(folder, REPO)
    load_lori_adapter(make_llama(), REPO)
    go_offline(monkeypatch)
    hub.requests.clear()
    assert load_lori_adapter(make_llama(), REPO).lori_masks["code"] == LoriMasks.from_pretrained(folder)
    assert LoriMasks.from_pretrained(REPO) == LoriMasks.from_pretrained(folder)
    assert not hub.requests
    assert "comes from the cache" in caplog.text
    with pytest.raises(ConnectionError, match="cache does not have it"):
        LoriMasks.from_pretrained("me/other")
    cached = next(Path(constants.HF_HUB_CACHE).rglob("snapshots/*/adapter_model.safetensors")).resolve()
    cached.write_bytes(cached.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="altered in the cache"):
        load_lori_adapter(make_llama(), REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    load_lori_adapter(make_llama(), REPO)  # and it mends itself online
    assert cached.read_bytes() == (folder / "adapter_model.safetensors").read_bytes()


def test_an_old_copy_is_not_taken_for_the_new_commit(hub, folder):
    push_lori_to_hub(folder, REPO)
    LoriMasks.from_pretrained(REPO)
    change(folder)
    push_lori_to_hub(folder, REPO)
    hub.fail("HEAD", "/resolve/", 503, times=1000)
    with pytest.raises(ConnectionError, match="no older copy is taken"):
        LoriMasks.from_pretrained(REPO)


def test_a_commit_that_comes_while_files_are_fetched_changes_nothing(hub, folder, monkeypatch):
    push_lori_to_hub(folder, REPO)
    pushed = LoriMasks.from_pretrained(folder)
    flipped = LoriMasks({path: ~mask for path, mask in pushed.items()}, **vars(pushed.metadata))
    flipped.save_pretrained(folder / "newer")
    newer = contents(hub) | {"masks/code.safetensors": (folder / "newer/masks/code.safetensors").read_bytes()}
    hub.fail("GET", "/tree/", "", first=lambda: hub.repos[REPO].commit("main", "newer", newer))
    hub.fail("HEAD", "/resolve/", "", first=lambda: hub.repos[REPO].commit("main", "newest", newer))
    assert LoriMasks.from_pretrained(REPO) == pushed
    go_offline(monkeypatch)
    assert LoriMasks.from_pretrained(REPO) == pushed  # `main` is the commit of which all files are there


def test_names_that_are_patterns_are_names(hub):
    files = {"masks/a[1].pt": b"one", "masks/a1.pt": b"other", "masks/b*.pt": b"two", "masks/bc.pt": b"other"}
    hub.create(REPO, files=files)
    wanted = ["masks/a[1].pt", "masks/b*.pt"]
    folder = fetch_from_hub(REPO, lambda names: [name for name in names if name in wanted], max_bytes=lambda _: None)
    assert {file.relative_to(folder).as_posix() for file in folder.rglob("*.pt")} == {*wanted}


# ---- the authors' repositories ---------------------------------------------------------------------------------


@pytest.fixture
def authors(hub, folder):
    """A repository as the authors of LoRI keep theirs."""
    state = load_file(folder / "adapter_model.safetensors")
    masks = {
        name.replace("lora_B.weight", "lora_B.default.weight"): weight != 0
        for name, weight in state.items()
        if "lora_B" in name
    }
    torch.save(masks, folder / "0.9_mask.pt")
    files = {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    for sparsity in ("0.5", "0.9"):
        files[f"masks/{sparsity}_mask.pt"] = (folder / "0.9_mask.pt").read_bytes()
    hub.create("tomg/LoRI-D_code_rank_4", files=files)
    return masks


def test_the_authors_repositories_load(authors, folder):
    masks = LoriMasks.from_pretrained("tomg/LoRI-D_code_rank_4")
    assert masks.sparsity == 0.9
    assert masks == LoriMasks(authors)
    assert "model.layers.0.self_attn.q_proj" in masks
    model = load_lori_adapter(make_llama(), "tomg/LoRI-D_code_rank_4", is_trainable=True)
    assert model.lori_masks == {"LoRI-D_code_rank_4": masks}
    assert not [name for name, weight in model.named_parameters() if "lora_A" in name and weight.requires_grad]
    assert LoriMasks.from_pretrained(folder / "0.9_mask.pt") == masks


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_pickle_bomb_is_refused(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"q_proj": Bomb()}, "bomb.pt")
    Path("plain.pt").write_bytes(pickle.dumps({"q_proj": Bomb()}))
    torch.save({"q_proj": "text"}, "text.pt")
    torch.save(["q_proj"], "list.pt")
    with zipfile.ZipFile("bomb.pt") as stored, zipfile.ZipFile("packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in stored.namelist():
            packed.writestr(entry, stored.read(entry))
    for name in ("bomb", "plain", "text", "list", "packed"):
        hub.create(f"them/{name}", files={"masks/0.9_mask.pt": Path(f"{name}.pt").read_bytes()})
        with pytest.raises(ValueError, match="nothing of it was executed"):
            LoriMasks.from_pretrained(f"them/{name}")
    assert not Path("exploded").exists()


# ---- hostile repositories --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "masks/../../../x.safetensors", "a\\..\\x", "C:/x", "a\nb"])
def test_a_name_that_leads_outside_is_refused(hub, folder, tmp_path, name):
    push_lori_to_hub(folder, REPO)
    hub.repos[REPO].names.append(name)
    with pytest.raises(ValueError, match="outside the repository"):
        load_lori_adapter(make_llama(), REPO)
    with pytest.raises(ValueError, match="outside the repository"):
        LoriMasks.from_pretrained(REPO)
    assert not list(tmp_path.rglob("x"))


def test_huge_metadata_are_refused_before_they_are_parsed(hub, folder):
    push_lori_to_hub(folder, REPO)
    repo = hub.repos[REPO]
    files = repo.log()[0].files
    header = (100_000_000).to_bytes(8, "little") + b"{" + b" " * 100
    repo.commit("main", "mask", {**files, "masks/code.safetensors": header})
    with pytest.raises(ValueError, match="100 MB of metadata"):
        LoriMasks.from_pretrained(REPO)
    repo.commit("main", "adapter", {**files, "adapter_model.safetensors": header})
    with pytest.raises(ValueError, match="100 MB of metadata"):
        load_lori_adapter(make_llama(), REPO)
    repo.commit("main", "config", {**files, "lori_config.json": b" " * 11_000_000})
    sent = len(hub.requests)
    with pytest.raises(ValueError, match="11 MB"):
        load_lori_adapter(make_llama(), REPO)
    assert not [request for request in hub.requests[sent:] if "/resolve/" in request]
    large = b'{"version": "1.0"}' + b" " * 11_000_000  # as the vocabularies of many models are
    repo.commit("main", "vocabulary", {**files, "tokenizer.json": large})
    load_lori_adapter(make_llama(), REPO)


@pytest.mark.parametrize("task", ["a/b<script>", "../../x", "", None, 7, "a\nb"])
def test_a_hostile_task_is_refused(hub, folder, tmp_path, task):
    push_lori_to_hub(folder, REPO)
    repo = hub.repos[REPO]
    files = repo.log()[0].files
    config = json.loads(files["lori_config.json"])
    config["tasks"][0]["task"] = task
    hostile = json.dumps(seal(config))
    repo.commit("main", "hostile", {**files, "lori_config.json": hostile.encode()})
    with pytest.raises(ValueError, match=r"is unreadable .*(task_name=|tasks\[0\].task=)"):
        load_lori_adapter(make_llama(), REPO)
    (folder / "lori_config.json").write_text(hostile)
    with pytest.raises(ValueError, match=r"is unreadable .*(task_name=|tasks\[0\].task=)"):
        push_lori_to_hub(folder, "me/hostile")
    assert "me/hostile" not in hub.repos
    assert not list(tmp_path.rglob("x"))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model-00001-of-00002.safetensors"])
def test_other_forms_of_weights_are_told_how_to_convert(hub, folder, name):
    files = {"adapter_config.json": (folder / "adapter_config.json").read_bytes(), name: b"weights"}
    hub.create(REPO, files=files)
    with pytest.raises(FileNotFoundError, match=f"`{REPO}` has its weights in {name}.*Convert it: `"):
        load_lori_adapter(make_llama(), REPO)


def test_what_is_no_repository_is_said_so(hub):
    hub.create("me/empty")
    with pytest.raises(FileNotFoundError, match="holds no LoRI adapter or masks"):
        LoriMasks.from_pretrained("me/empty")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        LoriMasks.from_pretrained("me/nowhere")


# ---- the command line ------------------------------------------------------------------------------------------


def test_lori_push(hub, folder, capsys):
    assert cli.main(["push", str(folder), REPO, "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in FILES)
    assert not hub.requests
    assert cli.main(["push", str(folder), REPO, "--private", "--revision", "draft"]) == 0
    assert is_whole(hub, folder, revision="draft")
    assert re.search(rf"{REPO}/commit/\w{{40}}", capsys.readouterr().out)
    assert cli.main(["push", str(folder), REPO, "--create-pr"]) == 0
    assert f"{REPO}/discussions/1" in capsys.readouterr().out
    hub.fail("POST", COMMIT, 503, times=100)
    assert cli.main(["push", str(folder), REPO]) == 1
    assert "Push again" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["push", "nowhere", REPO])


def test_continual_learning_from_the_hub_in_one_line(hub, folder, tmp_path):
    base = tmp_path / "base"
    make_llama().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    make_rows().to_json(tmp_path / "rows.jsonl")
    push_lori_to_hub(folder, "me/safety")
    masks = LoriMasks.from_pretrained(folder)
    other = LoriMasks({path: ~mask for path, mask in masks.items()}, **{**vars(masks.metadata), "task": "other"})
    other.push_to_hub("me/code")
    out = tmp_path / "out"
    arguments = (
        f"--model_name_or_path {base} --dataset_path {tmp_path / 'rows.jsonl'} --output_dir {out} --max_steps 1"
    )
    arguments += " --task_name second --report_to none --use_cpu --adapter_name_or_path me/safety"
    arguments += " --mask_name_or_path me/code --mask_revision main"
    assert cli.sft(arguments.split()) == 0
    trained = load_lori_adapter(make_llama(), out)
    assert list(trained.lori_masks) == ["code", "second"]
    assert trained.lori_masks["second"] == other


@pytest.mark.parametrize("more", [[], ["--dry_run", "--private"]])
def test_a_name_without_its_namespace_is_the_user_s(hub, folder, capsys, more):
    assert cli.main(["push", str(folder), "code-lori-s", *more]) == 0
    if more:
        assert f"-> {REPO}, private" in capsys.readouterr().out.replace("\n", " ")
        assert REPO not in hub.repos
    else:
        assert f'"{REPO}"' in contents(hub)["README.md"].decode()


def test_a_name_without_its_namespace_and_without_a_user_is_refused(hub, folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", REVOKED_TOKEN)
    with pytest.raises(SystemExit) as end:
        cli.main(["push", str(folder), "code-lori-s", "--dry_run"])
    assert end.value.code == 2 and "token" in capsys.readouterr().err
