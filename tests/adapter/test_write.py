"""An output has one writer, takes nobody's place unless it is told to, and tells nobody's secrets or places."""

import json
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from files_by_hand import change_config, change_tensors
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import make_llama, make_tokenizer, trained_adapter

from lori_trl import LoriMasks, cli, load_lori_adapter, merge_lori_adapters
from lori_trl.adapter.folder import open_adapter
from lori_trl.adapter.gguf_export import export_gguf
from lori_trl.adapter.push import adapter_files
from lori_trl.adapter.write import recipe_text, staged
from lori_trl.compact import expand, export_compact
from lori_trl.inputs.files import replacing, sole_writer
from lori_trl.merging import merge_into_base
from lori_trl.method.layers import module_path


@pytest.fixture
def folder(tmp_path) -> Path:
    return shutil.copytree(trained_adapter(), tmp_path / "code")


@pytest.fixture
def compact(folder, tmp_path) -> Path:
    return export_compact(folder, tmp_path / "code.safetensors")


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---- one writer ------------------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from lori_trl.inputs.files import sole_writer
with sole_writer(Path(sys.argv[1]), beside=len(sys.argv) > 2):
    print("writing", flush=True)
    sys.stdin.read()
"""


@contextmanager
def writing(*arguments):
    """Another process that writes to an output, until it is told to stop."""
    command = [sys.executable, "-c", WRITER, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


@pytest.fixture
def another_process(tmp_path):
    """Another process that writes to the folder `out`."""
    (tmp_path / "out").mkdir()
    with writing(tmp_path / "out") as process:
        yield process


WRITERS = {
    "merge": lambda folder, compact, out: merge_lori_adapters([folder], 1.0, output_dir=out),
    "expand": lambda folder, compact, out: expand(compact, out),
    "merge over": lambda folder, compact, out: merge_lori_adapters([folder], 1.0, output_dir=out, overwrite=True),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_an_output_that_is_being_written_is_refused(writer, another_process, folder, compact, tmp_path):
    with pytest.raises(FileExistsError, match="out` is being written by another process.*pass another"):
        WRITERS[writer](folder, compact, tmp_path / "out")
    another_process.communicate()  # ends it
    WRITERS[writer](folder, compact, tmp_path / "out")
    with open_adapter(tmp_path / "out") as adapter:
        adapter.verify()
    assert not [name for name in everything(tmp_path / "out") if name.startswith(".")]


FILE_WRITERS = {
    "compact": lambda folder, out: export_compact(folder, out),
    "gguf": lambda folder, out: export_gguf(folder, out),
    "base": lambda folder, out: merge_into_base([folder], output_dir=out, dtype="float32"),
}


@pytest.mark.parametrize("writer", FILE_WRITERS)
def test_a_file_and_a_model_have_one_writer_too(writer, folder, tmp_path):
    """Another process has the place, though nothing is there yet; what a killed one left goes, and nothing else."""
    there = {".out.0123abcd.partial", ".out.merging-abc_defg"}
    kept = {".out.notes.partial", ".out2.0123abcd.partial", ".out-settings", ".out2.merging-abc_defg"}
    for name in there | kept:
        if name.endswith(".partial"):
            (tmp_path / name).write_text("half")
        else:
            (tmp_path / name).mkdir()
    with writing(tmp_path / "out", "beside") as process:
        with pytest.raises(FileExistsError, match="out` is being written by another process.*pass another"):
            FILE_WRITERS[writer](folder, tmp_path / "out")
        assert not (tmp_path / "out").exists() and there | kept <= {path.name for path in tmp_path.iterdir()}
        process.communicate()
    FILE_WRITERS[writer](folder, tmp_path / "out")
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert left == kept | {next(name for name in there if ("merging" in name) != (writer == "base"))}


def test_a_model_whose_replacement_was_killed_comes_back(folder, tmp_path):
    """Killed between the two moves: the model is in the killed writer's folder alone."""
    before = tmp_path / ".out.merging-abc_defg" / "before"
    before.mkdir(parents=True)
    (before / "model.safetensors").write_text("a model")
    with pytest.raises(FileExistsError, match="is not empty"):
        merge_into_base([folder], output_dir=tmp_path / "out", dtype="float32")
    assert everything(tmp_path / "out") == {"model.safetensors": b"a model"} and not before.exists()


def test_a_training_that_runs_keeps_others_out(another_process, tmp_path, capsys):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1", "completion": " w2"}\n')
    call = ["--model_name_or_path", tmp_path / "model", "--dataset_path", tmp_path / "rows.jsonl", "--task_name", "t"]
    with pytest.raises(SystemExit, match="2"):
        cli.sft([*map(str, call), "--output_dir", str(tmp_path / "out"), "--bf16", "false", "--use_cpu", "true"])
    assert "is being written by another process" in capsys.readouterr().err


def test_a_killed_writer_keeps_nobody_out(another_process, tmp_path):
    another_process.kill()
    another_process.wait()
    with staged(tmp_path / "out") as stage:
        (stage / "file").write_text("x")
    assert everything(tmp_path / "out") == {"file": b"x"}


def test_who_writes_may_write_within(tmp_path):
    """A run holds its folder while it saves into it."""
    with sole_writer(tmp_path):
        with staged(tmp_path) as stage:
            (stage / "file").write_text("x")
        with pytest.raises(FileExistsError, match="another process"):
            in_a_thread(lambda: sole_writer(tmp_path).__enter__())
    in_a_thread(lambda: sole_writer(tmp_path).__enter__())


def test_a_save_waits_for_its_turn(another_process, folder, tmp_path):
    threading.Timer(1, another_process.stdin.close).start()
    with staged(tmp_path / "out", seconds=30) as stage:
        (stage / "file").write_text("x")
    assert everything(tmp_path / "out") == {"file": b"x"}


def in_a_thread(function) -> None:
    errors = []

    def run():
        try:
            function()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_partial_files_have_names_of_their_own(tmp_path):
    with replacing(tmp_path / "file") as first, replacing(tmp_path / "file") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert everything(tmp_path) == {"file": b"first"}


EXPORTS = {
    "compact": (export_compact, "lori_trl.compact.write_compact"),
    "gguf": (export_gguf, "lori_trl.adapter.gguf_export._write"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_looks_again_before_it_takes_a_files_place(name, folder, tmp_path, monkeypatch):
    export, writes = EXPORTS[name]
    file = tmp_path / "file"

    def other_writer(*arguments):
        file.write_text("another process was faster")

    monkeypatch.setattr(writes, other_writer)
    with pytest.raises(FileExistsError, match=r"exists\. An adapter goes to a new file"):
        export(folder, file)
    assert file.read_text() == "another process was faster"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code", "file"]


def test_a_merge_looks_again_before_it_takes_a_folders_place(folder, tmp_path, monkeypatch):
    def other_writer(*arguments, **options):
        (tmp_path / "out" / "adapter_model.safetensors").write_text("another program was faster")

    monkeypatch.setattr("lori_trl.merging.merge.complete", other_writer)
    with pytest.raises(FileExistsError, match="holds an adapter already"):
        merge_lori_adapters([folder], 1.0, output_dir=tmp_path / "out")
    assert everything(tmp_path / "out") == {"adapter_model.safetensors": b"another program was faster"}


# ---- what is there ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "recipe.yaml",
        "masks/other.safetensors",
        "adapter_config.json",
        "adapter_model.bin",
        "adapter_model-00001-of-00002.safetensors",
        "tokenizer.json",
        "additional_chat_templates/tool.jinja",
        "config.json",
        "eval_results.json",
        "density.png",
    ],
)
def test_what_an_adapter_would_replace_is_asked_for(name, compact, tmp_path):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(FileExistsError, match=rf"holds {name} already.*--overwrite"):
        expand(compact, tmp_path / "out")
    assert everything(tmp_path / "out") == {name: b"mine"}


def test_other_files_and_a_readme_of_ones_own_are_no_obstacle(compact, tmp_path):
    mine = {
        "notes.txt": "mine",
        "README.md": "# Mine",
        "runs/events": "mine",
        "lori_run.txt": "run",
        "LICENSE": "mine",
    }
    for name, text in mine.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    expand(compact, tmp_path / "out")
    there = everything(tmp_path / "out")
    assert {name: there[name].decode() for name in mine} == mine


def test_masks_that_belong_to_no_adapter_there_are_not_removed(folder, compact, tmp_path):
    other = LoriMasks.from_pretrained(folder)
    other.task = "other"
    file = other.save_pretrained(tmp_path / "out")
    expand(compact, tmp_path / "out", overwrite=True)
    assert LoriMasks.from_pretrained(file) == other
    expand(compact, tmp_path / "out", overwrite=True)  # now an adapter is there, and its masks go with it
    assert not file.exists()


def test_the_recipe_that_is_run_is_not_replaced_by_its_outcome(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    text = "adapters: [../code]\nweights: [1.0]\n"
    Path("recipe.yaml").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["merge", "--recipe", "recipe.yaml", "--output_dir", "."])
    assert "`output_dir=.` holds recipe.yaml already" in capsys.readouterr().err
    assert Path("recipe.yaml").read_text() == text


FILE_OUTPUTS = {
    "--json": ["inspect", "code", "--json", "notes.json"],
    "--html": ["inspect", "code", "--html", "notes.html"],
    "--save": ["inspect", "code", "--save", "notes.png"],
    "--output_path": ["eval", "--base_model", "none", "--metrics", "loss", "--output_path", "results.json"],
}


@pytest.mark.parametrize("option", FILE_OUTPUTS)
def test_a_file_is_replaced_where_that_is_asked_for(option, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call = FILE_OUTPUTS[option]
    Path(call[-1]).write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        cli.main(call)
    assert f"`{option} {call[-1]}` exists" in capsys.readouterr().err
    assert Path(call[-1]).read_text() == "mine"
    if call[0] == "inspect":
        assert cli.main([*call, "--overwrite"]) == 0
        assert Path(call[-1]).read_bytes() != b"mine"


def test_pictures_of_an_earlier_inspection_are_not_mixed_with_new_ones(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", "code", "--save", "pictures"]) == 0
    with pytest.raises(SystemExit, match="2"):
        cli.main(["inspect", "code", "--save", "pictures"])
    assert "`--save pictures` holds pictures already" in capsys.readouterr().err
    assert cli.main(["inspect", "code", "--save", "pictures", "--overwrite"]) == 0


# ---- secrets and places ----------------------------------------------------------------------------------------


SECRETS = {
    "hub_token": "hf_secret",
    "HF_TOKEN": "hf_secret",
    "wandb": [{"API_KEY": "secret", "project": "mine"}, {"apikey": "secret"}],
    "Password": "secret",
    "storage": {"options": {"aws_secret_access_key": "secret", "passwd": "secret", "region": "eu"}},
    "headers": {"Authorization": "Bearer secret"},
}


def test_no_secret_is_written_and_nothing_else_is_left_out():
    kept = {"eos_token": "<end>", "pad_token": "<pad>", "max_new_tokens": 5, "average_tokens_across_devices": False}
    text = recipe_text(SECRETS | kept)
    assert "secret" not in text
    assert yaml.safe_load(text) == {"wandb": [{"project": "mine"}, {}], "storage": {"options": {"region": "eu"}}} | {
        "headers": {},
        **kept,
    }


def test_places_of_this_machine_are_marked_and_run_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models/tiny").mkdir(parents=True)
    Path("rows.jsonl").touch()
    recipe = {
        "model_name_or_path": "models/tiny",
        "mask_name_or_path": "me/on-the-hub",
        "dataset_path": "rows.jsonl",
        "heldout": ["models/tiny", "./rows.jsonl", str(tmp_path / "rows.jsonl")],
        "target_modules": r".*\.(up|q)_proj",
    }
    marked = {"model_name_or_path": "./models/tiny", "heldout": ["./models/tiny", *recipe["heldout"][1:]]}
    assert yaml.safe_load(recipe_text(recipe)) == recipe | marked


@pytest.mark.parametrize("place", [".", "/"])
def test_a_pushed_recipe_tells_no_place_wherever_it_is_pushed_from(place, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("clients/mueller").mkdir(parents=True)
    Path("clients/mueller/train.jsonl").touch()
    Path("models/tiny").mkdir(parents=True)
    recipe = {
        "model_name_or_path": "models/tiny",
        "adapter_name_or_path": "me/on-the-hub",
        "dataset_path": "clients/mueller/train.jsonl",
        "output_dir": "clients/out",
        "mask_name_or_path": "models/tiny",
    }
    (folder / "recipe.yaml").write_text(recipe_text(recipe))
    change_config(folder, base_model_name_or_path="models/tiny")
    shutil.rmtree("clients")
    shutil.rmtree("models")
    monkeypatch.chdir(place)
    with adapter_files(folder, "me/x") as files:
        pushed = yaml.safe_load(files["recipe.yaml"].read_text())
        base = json.loads(files["adapter_config.json"].read_text())["base_model_name_or_path"]
        together = "".join(file.read_text(errors="replace") for file in files.values())
    names = {"model_name_or_path": "tiny", "dataset_path": "train.jsonl", "output_dir": "out"}
    assert pushed == recipe | names | {"mask_name_or_path": "tiny"} and base == "tiny"
    assert not [word for word in ("mueller", "clients", "models/tiny") if word in together]


# ---- numbers and room ------------------------------------------------------------------------------------------

B = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_what_does_not_fit_into_fewer_bits_is_refused(dtype, folder, tmp_path, capsys):
    value = {"float16": 70000.0, "bfloat16": 3.4e38, "int8": float("inf")}[dtype]
    change_tensors(folder, lambda tensors: tensors[B].masked_fill_(tensors[B] != 0, value))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", "--compact", str(folder), str(tmp_path / "file"), "--dtype", dtype])
    assert f"cannot hold all values of {module_path(B)}" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "file").exists()
    assert cli.main(["export", "--compact", str(folder), str(tmp_path / "file")]) == 0


NO_ROOM = """
import resource, signal, sys
from lori_trl import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "call",
    [
        ["export", "--compact", "code", "out"],
        ["export", "--gguf", "code", "out"],
        ["expand", "code.safetensors", "out"],
        ["merge", "code", "--output_dir", "out"],
        ["tasks", "code", "--extract", "code", "--output_dir", "out"],
        ["inspect", "code.safetensors"],
        ["push", "code", "me/x", "--include", "compact", "--dry-run"],
    ],
    ids=lambda call: " ".join(call[:2]),
)
def test_a_full_disk_is_one_sentence(call, folder, compact, tmp_path):
    before = everything(tmp_path)
    done = subprocess.run([sys.executable, "-c", NO_ROOM, *call], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert re.search(r"lori: `\S*` cannot be written: .*Make room for it", done.stderr)
    assert everything(tmp_path) == before and not (tmp_path / "out").exists()


# ---- other forms of weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["adapter_model.bin"], r"adapter_model\.bin.*PeftModel\.from_pretrained\(base, .*save_pretrained"),
        (["adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors"], "save_file"),
    ],
)
def test_other_forms_of_weights_are_told_how_to_convert(names, says, folder):
    state = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    keys = sorted(state)
    if names[0].endswith(".bin"):
        torch.save(state, folder / names[0])
    else:
        for number, name in enumerate(names):
            save_file({key: state[key] for key in keys[number::2]}, folder / name)
    with pytest.raises(FileNotFoundError, match=says) as caught:
        load_lori_adapter(make_llama(), folder)
    code = re.search(r"Convert it: `(.+)`", str(caught.value))[1]
    names_known = {"base": make_llama(), "PeftModel": PeftModel, "load_file": load_file, "save_file": save_file}
    exec(code, names_known | {"Path": Path, "folder": folder})
    load_lori_adapter(make_llama(), folder)
