"""A sequence of tasks: what each stage did to every task."""

import json

import pytest
from datasets import Dataset
from tiny import lora_config, make_rows, make_trainer, model_folder

from lori_trl import load_lori_adapter
from lori_trl.cli import main
from lori_trl.evaluation import completion_loss, load_model
from lori_trl.evaluation.sequence import SequenceResults


def results(values, metrics=("loss",) * 4, sets=("a", "b", "c", "general")) -> SequenceResults:
    stages = ("base", "A", "B", "C")
    return SequenceResults(stages, sets, metrics, values, ((None,) * len(sets),) * len(stages))


MATRIX = (  # after base, A, B, C; of a, b, c and general text
    (3.0, 3.0, 3.0, 2.0),
    (1.0, 2.5, 3.0, 2.1),
    (1.4, 1.0, 2.8, 2.1),
    (1.2, 1.3, 0.5, 2.3),
)


def test_the_measures_are_those_of_the_literature():
    """On numbers small enough to do by hand: a went from 1.0 to 1.2, b from 1.0 to 1.3."""
    found = results(MATRIX)
    assert found.backward_transfer == pytest.approx(-(0.2 + 0.3) / 2)
    assert found.forgetting == pytest.approx((0.2 + 0.3) / 2)
    assert found.learnt == pytest.approx([2.0, 1.5, 2.3])
    assert found.lost == pytest.approx({"general": 0.3})


def test_forgetting_counts_from_the_best_stage():
    """b got better after C had learnt something, and then it is the later stage that it falls from."""
    better = (*MATRIX[:2], (0.4, 1.0, 2.8, 2.1), (1.2, 0.9, 0.5, 2.3))
    assert results(better).forgetting == pytest.approx((0.8 + 0.0) / 2)
    assert results(better).backward_transfer == pytest.approx((-0.2 + 0.1) / 2)


def test_of_scores_more_is_better():
    turned = tuple(tuple(-value for value in row) for row in MATRIX)
    of_scores, of_losses = results(turned, ("accuracy",) * 4), results(MATRIX)
    for name in ("backward_transfer", "forgetting", "learnt", "lost"):
        assert getattr(of_scores, name) == getattr(of_losses, name)


def test_a_task_without_rows_is_refused():
    with pytest.raises(ValueError, match="3 adapters have 2 sets of rows, a, b"):
        results((), (), ("a", "b"))


@pytest.fixture(scope="module")
def sequence(tmp_path_factory):
    """Two tasks, one on top of the other, with rows of each and of neither."""
    folder = tmp_path_factory.mktemp("sequence")
    rows = {"first": list(make_rows()), "general": [{"prompt": "w3 w4", "completion": " w5 w6"}] * 3}
    rows["second"] = [{"prompt": row["prompt"], "completion": " w9 w8 w9"} for row in rows["first"]]
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some[:8])))
    for number, task in enumerate(("first", "second")):
        model = (
            str(model_folder())
            if not number
            else load_lori_adapter(load_model(str(model_folder()))[0], folder / "stage-first", is_trainable=True)
        )
        trainer = make_trainer(
            folder / f"stage-{task}",
            model,
            peft_config=None if number else lora_config(),
            train_dataset=Dataset.from_list(rows[task]),
            task_name=task,
            max_steps=8,
            learning_rate=2e-2,
        )
        trainer.train()
        trainer.save_model()
    return folder


def test_the_command_measures_every_task_after_every_stage(sequence, tmp_path, capsys):
    file = tmp_path / "matrix.json"
    sets = [f"{name}={sequence / name}.jsonl" for name in ("first", "second", "general")]
    stages = [str(sequence / name) for name in ("stage-first", "stage-second")]
    assert main(["eval", "--sequence", *stages, "--dataset_path", *sets, "--output_path", str(file)]) == 0
    printed, found = capsys.readouterr().out, json.loads(file.read_text())
    assert found["stages"] == ["base", "stage-first", "stage-second"] and found["sets"] == [
        "first",
        "second",
        "general",
    ]
    model, tokenizer = load_model(str(model_folder()))
    for stage, adapter in enumerate((None, *stages)):
        adapted = model if adapter is None else load_lori_adapter(model, adapter)
        for column, name in enumerate(found["sets"]):
            rows = map(json.loads, (sequence / f"{name}.jsonl").read_text().splitlines())
            assert found["values"][stage][column] == pytest.approx(
                completion_loss(adapted, tokenizer, rows).loss, rel=1e-6
            )
        if adapter is not None:
            model = adapted.unload()
    assert found["values"][1][0] < found["values"][0][0] and found["values"][2][1] < found["values"][1][1]
    assert f"Forgetting {found['forgetting']:.4f}" in printed and "general" in printed
    assert (tmp_path / "matrix.png").stat().st_size > 5000
    assert str(sequence) not in file.read_text()


def test_a_wrong_sequence_is_one_message(sequence, capsys):
    stages = [str(sequence / name) for name in ("stage-first", "stage-second")]
    one = [f"first={sequence / 'first.jsonl'}"]
    for arguments, says in (
        ([*stages, "--dataset_path", *one], "2 adapters have 1 sets of rows"),
        ([*stages, "--dataset_path", *one, "--tasks", "gsm8k"], "`--sequence` with `--tasks gsm8k`"),
        ([str(model_folder()), "--dataset_path", *one], "are whole models"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["eval", "--sequence", *arguments])
        assert end.value.code == 2 and says in capsys.readouterr().err
