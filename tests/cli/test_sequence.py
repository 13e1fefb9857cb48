"""`lori sft --sequence`: task after task, resumable, with the matrix of what was forgotten."""

import json

import pytest
import yaml

from lori_trl import LoriMasks
from lori_trl.adapter.record import read_record
from lori_trl.cli import sft


@pytest.fixture
def call(tmp_path, model_folder, rows, monkeypatch):
    """A call that trains two tasks."""
    monkeypatch.chdir(tmp_path)
    for task in ("first", "second"):
        (tmp_path / task).mkdir()
        rows.to_json(tmp_path / task / "train.jsonl")
        rows.select(range(4)).to_json(tmp_path / task / "test.jsonl")
        write(tmp_path, task, {})
    options = {"model_name_or_path": model_folder, "output_dir": tmp_path / "out"}
    given = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    return ["--sequence", "first.yaml", "second.yaml", *given]


def write(folder, task, changes):
    recipe = {
        "task_name": task,
        "dataset_path": task,
        "sparsity": 0.8,
        "lora_r": 4,
        "max_steps": 2,
        "calibration_max_steps": 2,
        "learning_rate": 5.0e-3,
        "per_device_train_batch_size": 4,
        "activation_checkpointing": False,
        "disjoint_masks": True,
        "save_strategy": "no",
        "report_to": "none",
    }
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(recipe | changes))


def test_each_stage_goes_on_with_the_last_ones_adapter_and_the_matrix_is_left(call, tmp_path, capsys):
    assert sft([*call, "--dry-run"]) == 0 and not (tmp_path / "out").exists()
    assert "stage 2 of 2: second, in" in capsys.readouterr().out
    assert sft(call) == 0
    record = read_record(tmp_path / "out" / "2-second")
    assert [task.task for task in record.history] == ["first", "second"]
    masks = [LoriMasks.from_pretrained(tmp_path / "out" / "2-second", task=task) for task in ("first", "second")]
    assert not (masks[0] & masks[1]).num_selected
    matrix = json.loads((tmp_path / "out" / "matrix.json").read_text())
    assert matrix["stages"] == ["base", "1-first", "2-second"] and matrix["sets"] == ["first", "second"]
    assert "Forgetting" in capsys.readouterr().out


@pytest.mark.release
def test_a_sequence_that_was_stopped_goes_on_at_its_first_unfinished_stage(call, tmp_path, capsys, monkeypatch):
    write(tmp_path, "second", {"save_strategy": "steps", "save_steps": 1, "max_steps": 3})
    from lori_trl.training.sft_trainer import LoriSFTTrainer

    saved = LoriSFTTrainer.save_model

    def save_model(self, folder=None, **named):
        if folder is None and self.task_name == "second":
            raise KeyboardInterrupt
        return saved(self, folder, **named)

    with monkeypatch.context() as patch:
        patch.setattr(LoriSFTTrainer, "save_model", save_model)
        with pytest.raises(KeyboardInterrupt):
            sft(call)
    first = (tmp_path / "out" / "1-first" / "adapter_model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert sft(call) == 0
    shown = capsys.readouterr().out
    assert "stage 1 of 2: first" in shown and "1-first: done" in shown.replace("\n", "")
    assert first == (tmp_path / "out" / "1-first" / "adapter_model.safetensors").stat().st_mtime_ns
    assert "resume_from_checkpoint" in (tmp_path / "out" / "2-second" / "recipe.yaml").read_text()
    assert (tmp_path / "out" / "matrix.json").is_file()
    write(tmp_path, "first", {"sparsity": 0.7})
    fails(call, capsys, "was trained with sparsity=0.8, and the recipe now says 0.7")


def fails(arguments, capsys, *parts):
    with pytest.raises(SystemExit) as exit:
        sft(arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and not [part for part in parts if part not in error], error


def test_what_can_be_known_is_refused_before_the_first_stage(call, tmp_path, capsys):
    fails(call[:5], capsys, "`--sequence` without `--output_dir`")
    fails([*call[:2], "nowhere.yaml", *call[3:]], capsys, "`nowhere.yaml` is neither")
    fails([*call, "--task_name", "one"], capsys, "has the tasks one, one on", "Each stage needs a task of its own")
    (tmp_path / "second" / "test.jsonl").unlink()
    fails(call, capsys, "Task 'second' has no held-out rows", "--held_out first=ROWS.jsonl second=ROWS.jsonl")
    write(tmp_path, "second", {"dataset_path": "second/train.jsonl"})
    fails(call, capsys, "are no local folder")
    assert not (tmp_path / "out").exists()


def test_it_starts_its_processes_itself(call, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(call, capsys, "`--sequence` was started in 2 processes", "Pass `--num_processes 2`")


@pytest.mark.release
def test_held_out_rows_of_neither_task_are_measured_too(call, tmp_path):
    sets = [f"{name}={tmp_path}/first/test.jsonl" for name in ("first", "second", "general")]
    assert sft([*call, "--held_out", *sets]) == 0
    matrix = json.loads((tmp_path / "out" / "matrix.json").read_text())
    assert matrix["sets"] == ["first", "second", "general"] and set(matrix["lost"]) == {"general"}
