"""An output has one writer, takes nobody's place unless it is told to, and tells nobody's secrets or places."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer, trained_adapter

from lori_trl import LoriMasks, cli, load_lori_adapter, merge_lori_adapters
from lori_trl.adapter.folder import open_adapter
from lori_trl.adapter.gguf_export import export_gguf
from lori_trl.adapter.write import check_output, staged
from lori_trl.compact import expand, export_compact
from lori_trl.inputs.files import replacing, sole_writer


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
with sole_writer(Path(sys.argv[1])):
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def another_process(tmp_path):
    """Another process that writes to `out`, until it is told to stop."""
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", WRITER, tmp_path / "out"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.communicate()


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
    mine = {"notes.txt": "mine", "README.md": "# Mine", "runs/events": "mine", "lori_run.txt": "run", "LICENSE": "mine"}
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
    monkeypatch.chdir(tmp_path)
    text = "adapters: [code]\nweights: [1.0]\n"
    Path("recipe.yaml").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["merge", "--recipe", "recipe.yaml", "--output_dir", "merged/.."])
    assert "holds recipe.yaml already" in capsys.readouterr().err.replace("\n", " ")
    assert Path("recipe.yaml").read_text() == text
    check_output("elsewhere", ["code"])


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


def written_recipe(recipe: dict, tmp_path) -> dict:
    from lori_trl.adapter.write import public_recipe

    return public_recipe(recipe)
