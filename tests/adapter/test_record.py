"""The record: typed, whole, and the same file as ever."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from files_by_hand import seal

from lori_trl.adapter.record import LoriRecord, hash_settings, read_record
from lori_trl.adapter.record_fields import Calibration, TaskRecord

GOLDEN = Path(__file__).parents[1] / "golden"


def two_tasks() -> LoriRecord:
    return LoriRecord.from_dict(json.loads((GOLDEN / "record.json").read_text()))


def values() -> dict:
    """A record in plain values, without its checksum."""
    values = two_tasks().to_dict()
    del values["sha256"]
    return values


@pytest.mark.parametrize("name", ["record.json", "record_merged.json"])
def test_a_record_is_written_as_it_was_read(name):
    """Golden: as format 2 was first written."""
    text = (GOLDEN / name).read_text()
    assert LoriRecord.from_dict(json.loads(text)).to_json() == text


def test_the_history_has_every_tasks_own_run():
    record = two_tasks()
    code, safety = record.history
    assert code == record.tasks[0] and code.calibration.loss == 4.604353427886963
    assert (safety.calibration, safety.training) == (record.calibration, record.training)
    merged = LoriRecord.from_dict(json.loads((GOLDEN / "record_merged.json").read_text()))
    assert merged.history == list(merged.tasks) and merged.history[0].calibration is not None
    assert TaskRecord.from_dict(safety.to_dict()) == safety


def test_keeping_the_first_task_is_never_having_learnt_the_second():
    record, facts = two_tasks(), {"sparsity": 0.9, "granularity": "model", "threshold": None, "selected": 204}
    first = record.keeping(["code"], **facts)
    assert first.task == "code" and first.tasks == (TaskRecord("code", 204),)
    assert (first.calibration, first.training) == (record.tasks[0].calibration, record.tasks[0].training)
    assert record.keeping(["code", "safety"], **{**facts, "threshold": record.threshold}) == record


def test_a_run_resumes_where_it_began_and_nowhere_else():
    record = two_tasks()
    record.check_same_run(record, "there")
    for change, says in (
        ({"task": "math"}, "task math, this run has safety"),
        ({"sparsity": 0.5}, "sparsity 0.5, this run has 0.9"),
        ({"training": replace(record.training, world_size=2)}, "num_processes 2, this run has 1"),
        (
            {"training": replace(record.training, hyperparameters={"disjoint_masks": True})},
            "disjoint_masks True, this run has its default",
        ),
    ):
        with pytest.raises(ValueError, match=f"`there` was trained with {says}.*Correct these"):
            record.check_same_run(replace(record, **change), "there")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda values: values.update(format_version=float("nan")), "format_version=nan"),
        (lambda values: values.update(format_version=True), "format_version=True"),
        (lambda values: values.update(format_version=0), "format_version=0"),
        (lambda values: values.update(format_version=1), "format_version=1"),
        (lambda values: values.update(format_version=3), "format_version 3"),
        (lambda values: values.pop("counts"), "counts"),
        (lambda values: values.pop("tensors"), "tensors={}"),
        (lambda values: values.pop("adapter_config"), "adapter_config=''"),
        (lambda values: values["counts"].update(lora_B=-1), "counts"),
        (lambda values: values["counts"].update(selected="204"), "counts.selected='204'"),
        (lambda values: values.update(training=[]), "training="),
        (lambda values: values["training"].update(steps=True), "training.steps='True'"),
        (lambda values: values["training"]["losses"][0].update(loss=float("inf")), r"losses\[0\].loss='inf'"),
        (lambda values: values["calibration"].update(learning_rate="5e-5"), "calibration.learning_rate"),
        (lambda values: values["calibration"].update(rate=1), "unknown key 'rate'"),
        (lambda values: values.update(sparsity=1.0), "sparsity=1.0"),
        (lambda values: values.update(granularity="block"), "granularity='block'"),
        (lambda values: values["tasks"].append(values["tasks"][0]), "tasks="),
        (lambda values: values["tasks"][0].update(task="../../x"), "task_name='../../x'"),
        (lambda values: values.update(variant="merged"), "variant='merged'"),
        (lambda values: values["projection"].update(fingerprint="md5:0"), "projection="),
    ],
)
def test_what_is_no_record_is_one_clear_error(change, says):
    changed = values()
    change(changed)
    with pytest.raises(ValueError, match=f"`lori_config.json` .*{says}.*(again|Upgrade)"):
        LoriRecord.from_dict(seal(changed))


def test_a_record_that_was_changed_says_so():
    changed = {**seal(values()), "threshold": 0.5}
    with pytest.raises(ValueError, match="was changed after it was saved.*allow_modified=True"):
        LoriRecord.from_dict(changed)
    assert LoriRecord.from_dict(changed, allow_modified=True).threshold == 0.5


@pytest.mark.parametrize(
    "text", ["null", "[]", "5", "{", "[" * 5000 + "]" * 5000, '{"format_version": NaN}', "\udcff"]
)
def test_a_file_that_holds_none_is_one_clear_error(tmp_path, text):
    (tmp_path / "lori_config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"lori_config\.json` is unreadable .*again"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    "rewritten",
    [
        {"peft_version": "9", "inference_mode": True, "use_new": None, "base_model_name_or_path": "/elsewhere"},
        {"target_modules": ["v_proj", "q_proj"], "modules_to_save": ["b", "a"]},
        {"target_modules": "all-linear", "lora_dropout": 0.1, "task_type": "CAUSAL_LM"},
        {"megatron_core": None, "qalora_group_size": 8, "runtime_config": {"ephemeral_gpu_offload": False}},
        {"rank_pattern": None, "alpha_pattern": None, "layer_replication": [], "use_dora": None},
    ],
)
def test_another_version_of_peft_may_write_the_config_anew(rewritten):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["a", "b"]}
    assert hash_settings(settings) == hash_settings({**settings, **rewritten})


@pytest.mark.parametrize(
    "changed",
    [
        {"r": 8},
        {"lora_alpha": 9},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 16}},
        {"use_dora": True},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"init_lora_weights": "pissa"},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
    ],
)
def test_what_decides_the_delta_counts(changed):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    assert hash_settings(settings) != hash_settings({**settings, **changed})


def test_calibration_by_other_means_is_on_record():
    plain = Calibration(method="random", seed=3)
    record = replace(two_tasks(), calibration=plain)
    assert LoriRecord.from_dict(record.to_dict()).calibration == plain
