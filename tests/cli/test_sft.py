"""`lori-sft`: one command trains; wrong calls exit with 2, say why, and touch nothing."""

import json
import os
import re
import shutil
from dataclasses import fields

import pytest
import yaml
from peft import PeftModel
from tiny import make_chat_tokenizer
from transformers import AutoModelForCausalLM

from lori_trl import LoriArguments, LoriMasks
from lori_trl.cli import main, sft
from lori_trl.cli.training_options import training_parser
from lori_trl.training.compat import CheckpointingFields


@pytest.fixture
def data_folder(tmp_path, rows):
    folder = tmp_path / "my_task"
    folder.mkdir()
    rows.add_column("id", list(range(len(rows)))).to_json(folder / "train.jsonl")
    rows.select(range(6)).to_json(folder / "test.jsonl")
    return folder


@pytest.fixture
def call(tmp_path, model_folder, data_folder):
    """A call that works, as a list: a small recipe and a few options."""
    recipe = {
        "dataset_path": "my_task",
        "sparsity": 0.8,
        "lora_r": 4,
        "lora_dropout": 0.0,
        "max_steps": 2,
        "calibration_max_steps": 2,
        "learning_rate": "5e-3",
        "per_device_train_batch_size": 4,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": "none",
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    options = {"recipe": file, "model_name_or_path": model_folder, "output_dir": tmp_path / "out"}
    return [str(word) for key, value in options.items() for word in (f"--{key}", value)]


def test_one_command_trains_an_adapter(call, tmp_path, model_folder, capsys):
    assert sft([*call, "--eval_strategy", "epoch", "--eval_on_start", "--hub_token", "hf_secret"]) == 0
    out = tmp_path / "out"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), str(out))
    masks = LoriMasks.from_pretrained(out)
    assert masks.task == "my_task" and masks.num_selected == masks.numel // 5
    shown = capsys.readouterr().out
    assert f"{masks.num_selected:,} / {masks.numel:,} = {masks.density:.8f}" in shown and "held-out loss" in shown
    metrics = json.loads((out / "all_results.json").read_text())
    assert {"initial_eval_loss", "eval_loss", "train_loss", "calibration_train_loss"} <= metrics.keys()
    as_run = yaml.safe_load((out / "recipe.yaml").read_text())
    assert as_run["sparsity"] == 0.8 and as_run["eval_strategy"] == "epoch" and as_run["lora_r"] == 4
    assert "hub_token" not in as_run and "hf_secret" not in (out / "recipe.yaml").read_text()


def test_the_recipe_as_run_runs_again_and_gives_the_same(call, tmp_path):
    sft([*call, "--task_name", "again"])
    first = LoriMasks.from_pretrained(tmp_path / "out")
    again = ["--recipe", str(tmp_path / "out" / "recipe.yaml"), "--dataset_path", str(tmp_path / "my_task")]
    sft([*again, "--output_dir", str(tmp_path / "second")])
    assert LoriMasks.from_pretrained(tmp_path / "second") == first


def test_continuing_an_adapter(call, tmp_path):
    sft([*call, "--task_name", "first"])
    (tmp_path / "out" / "chat_template.jinja").write_text("the adapter's own")
    continued = ["--adapter_name_or_path", str(tmp_path / "out"), "--task_name", "second"]
    sft([*call[:4], "--output_dir", str(tmp_path / "two"), *continued])
    config = json.loads((tmp_path / "two" / "lori_config.json").read_text())
    assert [record["task"] for record in config["tasks"]] == ["first", "second"]
    assert (tmp_path / "two" / "chat_template.jinja").read_text() == "the adapter's own"


def test_lori_sft_is_lori_sft(call, tmp_path):
    assert main(["sft", *call]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_alpaca_rows_and_single_files(call, tmp_path):
    rows = [{"instruction": f"w{i}", "input": "w5" * (i % 2), "output": "w1 w2"} for i in range(8)]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    assert sft([*call, "--dataset_path", str(tmp_path / "alpaca.json")]) == 0
    assert LoriMasks.from_pretrained(tmp_path / "out").task.endswith("-alpaca")


def test_a_csv_file_whose_name_is_none_of_a_task(call, tmp_path, capsys):
    (tmp_path / "my_task" / "rows (v2).csv").write_text("prompt,completion\n" + "w1,7\n" * 8)
    call = [*call, "--dataset_path", str(tmp_path / "my_task" / "rows (v2).csv")]
    assert sft([*call, "--dry-run"]) == 0
    assert "task: my_task-rows-v2" in capsys.readouterr().out
    assert sft(call) == 0
    assert LoriMasks.from_pretrained(tmp_path / "out").task == "my_task-rows-v2"


def test_a_second_task_is_no_other_because_its_file_has_the_same_name(call, tmp_path, rows, capsys):
    for name in ("math", "code"):
        (tmp_path / name).mkdir()
        rows.to_json(tmp_path / name / "train.jsonl")
    math, code = (["--dataset_path", str(tmp_path / name / "train.jsonl")] for name in ("math", "code"))
    assert sft([*call, *math]) == 0
    continued = [*call[:4], "--adapter_name_or_path", str(tmp_path / "out"), "--output_dir", str(tmp_path / "two")]
    for more in ([], ["--dry-run"]):
        parts = ("the name that the data give, 'math', is that of a task", "or `--task_name math` to go on")
        fails([*continued, *math, *more], capsys, *parts)
    assert sft([*continued, *code, "--disjoint_masks"]) == 0
    assert [task["task"] for task in json.loads((tmp_path / "two" / "lori_config.json").read_text())["tasks"]] == [
        "math",
        "code",
    ]
    first, second = (LoriMasks.from_pretrained(tmp_path / "two", task=task) for task in ("math", "code"))
    assert (first & second).num_selected == 0


def test_dry_run_counts_without_weights(call, tmp_path, capsys):
    assert sft([*call, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "this run is LoRI-S" in shown and "s = 0.8" in shown
    assert all(count in shown for count in (" 409 ", " 2,048 ", " 4,096 ", "0.19970703"))
    assert "rows of prompt, completion" in shown
    assert not (tmp_path / "out").exists()


def test_a_dry_run_opens_the_data(call, tmp_path, capsys):
    (tmp_path / "odd.jsonl").write_text('{"question": "w1"}\n')
    call.append("--dry-run")
    fails([*call, "--dataset_path", str(tmp_path / "odd.jsonl")], capsys, "have the columns question", "Rename the")
    fails([*call, "--dataset_path", str(tmp_path / "none.jsonl")], capsys, "none.jsonl` does not exist", "Correct the")
    fails([*call, "--dataset_train_split", "training"], capsys, "dataset_train_split='training'", "Pass one of these")
    assert sft([*call, "--dataset_name", "some/data"]) == 0
    assert "some/data was not looked at, for the Hub cannot be reached" in capsys.readouterr().out


@pytest.mark.parametrize("rate", ["0", "-1e-4", "nan", "inf"])
@pytest.mark.parametrize("phase", ["", "calibration_"])
def test_a_rate_that_trains_nothing_is_refused_in_a_dry_run_too(call, capsys, rate, phase):
    fails([*call, "--dry-run", f"--{phase}learning_rate={rate}"], capsys, "outside (0, inf)", "Pass a number")


def test_dry_run_of_the_papers_bases_needs_no_network(capsys):
    assert sft(["--recipe", "code_lori_s.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("1.03 %", "0.54 %", "0.05 %", "4,404,019"))


def test_ones_own_data_replace_the_recipes(call, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        (tmp_path / "recipe.yaml").read_text().replace("dataset_path: my_task", "dataset_name: some/data")
    )
    assert sft([*call, "--dataset_path", str(tmp_path / "my_task")]) == 0
    as_run = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert as_run["dataset_path"] == str(tmp_path / "my_task") and "dataset_name" not in as_run


# ---- wrong calls ---------------------------------------------------------------------------------------------------


def fails(arguments, capsys, *parts):
    with pytest.raises(SystemExit) as exit:
        sft(arguments)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for part in parts:
        assert part in error, error


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        (["--recipe", "nosuch.yaml"], ["`nosuch.yaml` is neither", "`lori recipes list` shows all"]),
        (["--recipe", "code_lora.yaml"], ["is a baseline for TRL's own trainer", "Run it with `trl sft --config"]),
        (
            ["--recipe", "baselines/nlu_fft.yaml"],
            ["is a baseline", "it sets `use_peft`", "or pass a file of your own as `--config`"],
        ),
        (
            ["--recipe", "continual_safety_code_lori_s.yaml"],
            ["needs `adapter_name_or_path`, and it is not given (a tr"],
        ),
        (["--recipe", "continual_safety_nlu_lori_d.yaml", "--dry-run"], ["Pass `--adapter_name_or_path`"]),
        (["--lora_target_modules", "q_proj,k_proj"], ["one text with commas", "or q_proj k_proj on the command line"]),
        (["--report_to", "None"], ["`report_to=['None']` is the text None; for nothing, leave the key out"]),
        (["--task_name", "None"], ["`task_name=None` is the text None"]),
        (["--max_steps", "9" * 20], ["is more than 64 bits"]),
        (["--seed", "5000000000"], ["`seed=5000000000` is outside [0, 4294967295]"]),
        (["--num_processes", "two", "--dry-run"], ["`num_processes=two` is no number of processes"]),
        (["--test_split_size", "0.1"], ["without `datasets`"]),
        (["--use_peft", "False"], ["`use_peft=False` is no LoRI", "Leave `use_peft` out"]),
        (["--model_init_kwargs", "text"], ["`model_init_kwargs=text`", "Correct the call or the recipe"]),
        (["--lr_scheduler_type", "text"], ["text", "`lori-sft --help_all` lists what is allowed"]),
        (["--ddp_timeout", "9" * 30], ["too large", "Correct the call or the recipe"]),
        (["--sparcity", "0.5"], ["`--sparcity` is no option (did you mean --sparsity?)"]),
        (["--learning_rate", "fast"], ["invalid float value: 'fast'", "Correct the call"]),
        (["--sparsity", "1.5"], ["`sparsity=1.5` is outside [0, 1)", "leave it unset for 0.9"]),
        (["--calibration_fraction", "0"], ["`calibration_fraction=0.0` is outside (0, 1]"]),
        (["--lora_r", "-1", "--dry-run"], ["`lora_r=-1` is outside [1, inf)", "Pass one"]),
        (["--task_name", "a/b"], ["`task_name='a/b'` cannot name a file"]),
        (["--dataset_path", "nowhere"], ["`dataset_path=nowhere` does not exist"]),
        (
            ["--dataset_name", "some/data", "--dataset_path", "my_task"],
            ["`dataset_name=some/data`, `dataset_path=my_task`. Exactly one"],
        ),
        (["--dataset_train_split", "validation"], ["not in `my_task`, which has test, train"]),
        (
            ["--eval_strategy", "epoch", "--dataset_test_split", "dev"],
            ["`dataset_test_split='dev'` is not in `my_task`, which has test, train"],
        ),
        (["--use_dora"], ["`use_dora=True` is not possible with LoRI"]),
        (["--mask_name_or_path", "nowhere"], ["`nowhere` holds no masks"]),
        (["--adapter_name_or_path", "nowhere"], ["`nowhere` does not exist"]),
        (["--output_dir", "/proc/none/out"], ["`output_dir=/proc/none/out` cannot be written"]),
        (["--model_name_or_path", "/no/such/model"], ["/no/such/model"]),
        (["--resume_from_checkpoint", "True"], ["holds no complete checkpoint"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_wrong_calls_exit_with_2(call, extra, parts, capsys):
    fails([*call, *extra], capsys, *parts)


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--preview", "1"]])
def test_bad_rows_are_told_before_the_base_is_loaded(call, tmp_path, model_folder, monkeypatch, capsys, more):
    def load_base_model(*_, **__):
        pytest.fail("the base was loaded")

    monkeypatch.setattr("lori_trl.training.base_model.load_base_model", load_base_model)
    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    good, bad = {"messages": talk}, {"messages": [{"role": "narrator", "content": "w1"}]}
    base = shutil.copytree(model_folder, tmp_path / "chat")
    make_chat_tokenizer().save_pretrained(base)
    file = tmp_path / "talk.jsonl"
    call += ["--dataset_path", str(file), "--model_name_or_path", str(base), *more]
    for rows, part in (
        ([good, {"messages": []}], "Row 1 of `talk.jsonl` has `messages=[]`"),
        ([good, bad], "narrator"),
    ):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if part != "narrator" or more != ["--dry-run"]:
            fails(call, capsys, part)


def test_a_wrong_call_leaves_existing_outputs_alone(call, tmp_path, capsys):
    sft(call)
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    fails(call, capsys, "holds an adapter already", "--overwrite")
    fails([*call, "--overwrite", "--mask_name_or_path", str(tmp_path / "out")], capsys, "never replaces an input")
    fails([*call, "--overwrite", "--adapter_name_or_path", str(tmp_path / "out")], capsys, "never replaces an input")
    call += ["--overwrite"]
    masks = str(shutil.copytree(tmp_path / "out", tmp_path / "copy"))
    fails([*call, "--mask_name_or_path", masks, "--lora_r", "8"], capsys, "do not fit the adapter")
    (tmp_path / "my_task" / "train.jsonl").write_text("")
    fails(call, capsys, "no rows")
    assert before == {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}


def test_overwriting_leaves_nothing_of_the_adapter_that_was_there(call, tmp_path):
    sft([*call, "--task_name", "first"])
    sft([*call, "--task_name", "second", "--overwrite"])
    assert [file.stem for file in (tmp_path / "out" / "masks").iterdir()] == ["second"]
    assert "overwrite" not in (tmp_path / "out" / "recipe.yaml").read_text()


def test_an_output_folder_below_a_file(call, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    fails([*call, "--output_dir", str(tmp_path / "file" / "out")], capsys, "cannot be written", "Pass another")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_copied_baseline_is_still_one_in_a_dry_run_too(tmp_path, capsys):
    assert main(["recipes", "copy", "nlu_lora.yaml", str(tmp_path / "mine.yaml")]) == 0
    for more in ([], ["--dry-run"]):
        fails(["--recipe", str(tmp_path / "mine.yaml"), *more], capsys, "is a baseline for TRL's own trainer")


def test_trls_name_for_a_recipe_is_checked_too(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("sparsity: high\n")
    fails(["--config", str(tmp_path / "bad.yaml")], capsys, "has 1 fault")


def test_variables_of_a_recipe_are_set(call, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with (tmp_path / "recipe.yaml").open("a") as file:
        file.write("env: {OMP_NUM_THREADS: 3}\n")
    assert sft([*call, "--dry-run"]) == 0
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_a_pickled_base_is_not_read(call, tmp_path, model_folder, capsys):
    base = shutil.copytree(model_folder, tmp_path / "pickled")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch %s/ran'\ntR." % bytes(tmp_path))
    wrong = [*call, "--model_name_or_path", str(base)]
    fails(wrong, capsys, "has no model.safetensors", "convert them once", "Then pass that folder")
    fails(
        [*wrong, "--model_init_kwargs", '{"use_safetensors": false, "weights_only": false}'], capsys, "are left alone"
    )
    assert not (tmp_path / "ran").exists()
    (base / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    fails(wrong, capsys, "has a damaged file of weights", "Fetch or save the model again")


def test_debug_tells_the_traceback_of_what_is_one_line_else(call, capsys):
    for arguments in (
        [*call, "--dataset_path", "nowhere", "--debug"],
        ["--debug", *call, "--dataset_path", "nowhere"],
    ):
        with pytest.raises(SystemExit, match="2"):
            sft(arguments)
        error = capsys.readouterr().err
        assert "Traceback (most recent call last)" in error and "in split_files" in error
        assert "lori-sft: `dataset_path=nowhere` does not exist" in error
    fails([*call, "--debug", "underflow_overflow", "--dataset_path", "nowhere"], capsys, "does not exist")


def test_the_recipe_as_it_was_run_says_no_where_no_was_said(call, tmp_path):
    assert sft([*call, "--no_average_tokens_across_devices", "--no-skip-memory-metrics", "--logging-steps=3"]) == 0
    as_run = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert as_run["average_tokens_across_devices"] is False and as_run["skip_memory_metrics"] is False
    assert as_run["logging_steps"] == 3 and not {name for name in as_run if name.startswith("no_")}


def test_trls_own_file_runs(call, tmp_path, rows, capsys):
    """`trl sft --config FILE`: a mixture of data sets, split by TRL, for a LoRA adapter."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        rows.to_json(tmp_path / name / "data.jsonl")
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    del recipe["dataset_path"]
    sets = [{"path": str(tmp_path / "one")}, {"path": "json", "data_files": str(tmp_path / "two" / "data.jsonl")}]
    recipe |= {"datasets": sets, "test_split_size": 0.25, "use_peft": True, "eval_strategy": "epoch"}
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump(recipe))
    call = ["--config", str(tmp_path / "trl.yaml"), *call[2:]]
    assert sft([*call, "--dry-run"]) == 0
    assert "task: one-two" in capsys.readouterr().out
    assert sft(call) == 0
    as_run = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert as_run["datasets"] == sets and "use_peft" not in as_run
    assert json.loads((tmp_path / "out" / "lori_config.json").read_text())["training"]["dataset"]["rows"] == 48
    own = [*call, "--dataset_path", str(tmp_path / "my_task"), "--overwrite"]
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump(recipe | {"test_split_size": None, "eval_strategy": "no"}))
    assert sft(own) == 0
    assert "datasets" not in yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    for sets, fault in (
        ([{"pth": "a"}], "no such key pth (did you mean path?)"),
        (["a"], "where a mapping is needed"),
    ):
        (tmp_path / "trl.yaml").write_text(yaml.safe_dump(recipe | {"datasets": sets}))
        fails(call, capsys, fault)


def test_streams_of_trls_file(call, tmp_path, rows):
    rows.to_json(tmp_path / "data.jsonl")
    stream = {"datasets": [{"path": "json", "data_files": str(tmp_path / "data.jsonl")}], "streaming": True}
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text()) | stream
    del recipe["dataset_path"]
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump(recipe))
    assert sft(["--config", str(tmp_path / "trl.yaml"), *call[2:]]) == 0


def test_a_model_is_needed(capsys):
    fails(["--sparsity", "0.5"], capsys, "`model_name_or_path` is missing")


def test_faulty_recipes_fail_before_anything_is_loaded(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("learnig_rate: 1\nsparsity: high\n")
    fails(["--recipe", str(tmp_path / "bad.yaml")], capsys, "has 2 faults", "did you mean learning_rate?")


# ---- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2", "fsdp2_multinode", "zero2", "zero3"])
def test_launch_files_by_name(name, monkeypatch, tmp_path):
    launched = {}
    launch = "accelerate.commands.launch.launch_command"
    monkeypatch.setattr(launch, lambda arguments: launched.update(vars(arguments)))
    assert sft(["--accelerate_config", name, "--num_processes", "3", "--recipe", "quickstart.yaml"]) == 0
    assert launched["num_processes"] == 3 and launched["module"]
    assert launched["training_script"] == "lori_trl.cli"
    assert launched["training_script_args"] == ["sft", "--recipe", "quickstart.yaml"]
    kind = yaml.safe_load(open(launched["config_file"]))["distributed_type"]
    kinds = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert kind == kinds[name.removesuffix("_multinode")]


@pytest.fixture
def launched(monkeypatch):
    """What accelerate is asked to launch, in place of a launch."""
    asked = {}
    launch = "accelerate.commands.launch.launch_command"
    monkeypatch.setattr(launch, lambda arguments: asked.update(vars(arguments), environ=dict(os.environ)))
    return asked


@pytest.mark.parametrize(
    ("options", "in_recipe"),
    [
        (["--accelerate_config=ddp", "--num_processes=2"], ""),
        (["--accelerate-config", "ddp", "--num-processes", "2"], ""),
        (["--accelerate_config", "multi_gpu", "--num_processes", "2"], ""),
        (["--num_processes", "2"], ""),
        ([], "accelerate_config: ddp\nnum_processes: 2\n"),
        (["--num_processes", "2"], "accelerate_config: ddp\nnum_processes: 4\n"),
        (["--gpu_ids", "0,1", "--num_processes", "2", "--multi_gpu"], "main_process_port: 29501\n"),
    ],
)
def test_launch_options_in_every_spelling_and_in_a_recipe(launched, call, tmp_path, options, in_recipe):
    with (tmp_path / "recipe.yaml").open("a") as file:
        file.write(in_recipe)
    assert main(["recipes", "validate", str(tmp_path / "recipe.yaml")]) == 0
    assert sft([*call, *options, "--debug"]) == 0
    assert launched["num_processes"] == 2 and launched["training_script_args"] == ["sft", *call, "--debug"]
    named = "accelerate" in "".join(options) + in_recipe
    assert (launched["config_file"] or "").endswith("ddp.yaml" if named else "")
    assert launched["multi_gpu"] == ("--multi_gpu" in options)
    assert launched["main_process_port"] == (29501 if "port" in in_recipe else None)
    assert launched["environ"]["LORI_LAUNCHED"] == "1" and "LORI_LAUNCHED" not in os.environ


@pytest.mark.parametrize("variable", ["LORI_LAUNCHED", "LOCAL_RANK"])
def test_a_process_that_was_launched_launches_no_others(variable, launched, call, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, "1")
    with (tmp_path / "recipe.yaml").open("a") as file:
        file.write("num_processes: 2\n")
    fails_with = [*call, "--dataset_path", str(tmp_path / "nowhere")]
    with pytest.raises(SystemExit, match="2"):
        sft(fails_with)
    assert not launched


def test_a_dry_run_or_a_preview_is_not_launched(launched, call, capsys):
    assert sft([*call, "--num_processes", "2", "--dry-run"]) == 0
    assert "each of 2 devices under DDP" in capsys.readouterr().out
    assert sft([*call, "--num_processes", "2", "--preview=1"]) == 0
    assert "row 0" in capsys.readouterr().out and not launched


def test_a_launch_file_that_is_none(call, tmp_path, capsys):
    for text in ("a: [", "a: 1", "[]"):
        (tmp_path / "launch.yaml").write_text(text)
        fails([*call, "--accelerate_config", str(tmp_path / "launch.yaml"), "--dry-run"], capsys, "is no launch file")


def test_an_unknown_launch_file(capsys):
    fails(["--accelerate_config", "tpu"], capsys, "neither a file nor a shipped", "ddp, fsdp2, fsdp2_multinode")


@pytest.mark.parametrize(
    ("engine", "base", "state", "extra"),
    [
        (["fsdp2"], "2.008 │ a share of 1/8", "0.066 │ a share of 1/8", "mask"),
        (["zero2", "--num_processes", "4"], "16.061 │ whole", "0.015 │ a share of 1/4", "positions"),
    ],
)
def test_a_dry_run_says_what_each_device_holds(engine, base, state, extra, capsys):
    assert sft(["--accelerate_config", *engine, "--recipe", "code_lori_s.yaml", "--dry-run"]) == 0
    rows = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert base in rows["base weights"] and state in rows["adaptation: gradients, optimizer"]
    assert f"adaptation: {extra}" in rows


@pytest.mark.parametrize(
    ("name", "backend", "rows_a_step"),
    [
        ("single", "packed", 32),
        ("ddp", "packed", 256),
        ("fsdp2", "hook", 256),
        ("fsdp2_multinode", "hook", 512),
        ("zero2", "packed", 256),
        ("zero3", "hook", 256),
    ],
)
def test_the_default_recipe_runs_with_every_launch_file(name, backend, rows_a_step, capsys):
    assert sft(["--accelerate_config", name, "--recipe", "code_lori_s.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"sparse_backend: {backend} (" in shown and f"rows a step: {rows_a_step} = 8 x " in shown
    assert "at the peak, in the " in shown


def test_a_dry_run_counts_what_the_run_trains(call, tmp_path, capsys):
    """Whole modules, pools that are rounded down by themselves, given masks, and the optimizer's backend."""
    sft([*call, "--task_name", "first"])
    selected = LoriMasks.from_pretrained(tmp_path / "out").num_selected
    capsys.readouterr()
    call = [*call[:4], "--output_dir", str(tmp_path / "two"), "--dry-run"]

    def trained(*more) -> tuple[int, str]:
        assert sft([*call, *more]) == 0
        shown = capsys.readouterr().out
        row = next(line.split("│")[1:-1] for line in shown.splitlines() if "│ trained" in line)
        return int(row[-1].replace(",", "")), shown

    assert trained()[0] == selected
    by_matrix, _ = trained("--mask_granularity", "matrix", "--sparsity", "0.83")
    assert by_matrix < trained("--sparsity", "0.83")[0]
    with_head, shown = trained("--lora_modules_to_save", "lm_head")
    assert with_head == selected + 3200 and "whole modules and tokens" in shown
    given, shown = trained("--mask_name_or_path", str(tmp_path / "out"), "--sparsity", "0.5")
    assert given == selected and "calibration" not in shown
    assert "sparse_backend: hook (the update of Adafactor depends on" in trained("--optim", "adafactor")[1]
    shown = trained("--gradient_accumulation_steps", "6", "--calibration_max_steps", "-1")[1]
    assert "rows a step: 24 = 4 x 1 devices x 6 accumulated" in shown and "32 rows of prompt, completion" in shown
    assert "steps of the calibration: 2\nsteps of the adaptation: 2\n" in shown


def test_a_dry_run_counts_steps_as_the_trainer_does(call, tmp_path, capsys):
    """30 batches of rows are in no whole number of steps; the calibration sees half of the rows, twice."""
    epochs = ["--max_steps", "-1", "--num_train_epochs", "1.5", "--per_device_train_batch_size", "3"]
    calibration = [
        "--calibration_max_steps",
        "-1",
        "--calibration_fraction",
        "0.5",
        "--calibration_num_train_epochs",
        "2",
    ]
    options = [*epochs, *calibration, "--gradient_accumulation_steps", "2"]
    assert sft([*call, *options, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert sft([*call, *options]) == 0
    run = json.loads((tmp_path / "out" / "lori_config.json").read_text())
    assert f"steps of the calibration: {run['calibration']['steps']}\n" in shown
    assert f"steps of the adaptation: {run['training']['steps']}\n" in shown
    assert sft([*call, *epochs, "--packing", "--dry-run"]) == 0
    assert "at most, for rows are packed" in capsys.readouterr().out
    assert sft([*call, *epochs, "--calibration_max_steps", "-1", "--dataset_name", "a/b", "--dry-run"]) == 0
    assert "steps of the adaptation: not known before" in capsys.readouterr().out


def test_help_shows_lori_s_own_options_first_in_groups():
    shown = training_parser().format_help()
    groups = re.findall(r"^(\S.*):\n(?=  -)", shown, re.MULTILINE)
    assert [group for group in groups if group.startswith("LoRI: ")] == groups[:4] and len(groups) == 7
    first_of_trl = shown.index("\n  --dataset_name ")
    for name in {field.name for field in fields(LoriArguments)} - {
        field.name for field in fields(CheckpointingFields)
    }:
        assert 0 < shown.index(f"\n  --{name} ") < first_of_trl, name
    assert shown.count("\n  --learning_rate ") == 1 and "--learning-rate" not in shown


def test_help_is_short_and_help_all_is_not(capsys):
    short, everything = training_parser().format_help(), training_parser(help_all=True).format_help()
    assert len(short.splitlines()) < 260 < 700 < len(everything.splitlines())
    assert "--ddp_timeout" in everything and "--ddp_timeout" not in short and "--help_all" in short
    assert sft(["--help-all"]) == 0 and "--ddp_timeout" in capsys.readouterr().out


def test_that_all_turns_bear_loss_is_told(call, tmp_path, model_folder, capsys):
    """Before the run, in its dry run and in a preview; not where the assistant's words alone bear it."""
    base = shutil.copytree(model_folder, tmp_path / "chat")
    tokenizer = make_chat_tokenizer()
    content = "{{ m['content'] }} </s> "
    marked = (
        f"{{% if m['role'] == 'assistant' %}}{{% generation %}}{content}{{% endgeneration %}}{{% else %}}{content}"
    )
    tokenizer.chat_template = tokenizer.chat_template.replace(content, marked + "{% endif %}")
    tokenizer.save_pretrained(base)
    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    (tmp_path / "talk.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 8)
    call += ["--dataset_path", str(tmp_path / "talk.jsonl"), "--model_name_or_path", str(base)]
    told = "loss: every turn of `messages` bears it, what the system and the user say, too."
    for more in (["--preview", "1"], ["--dry-run"], []):
        assert sft([*call, *more]) == 0
        shown = capsys.readouterr().out
        assert told in shown and "`--assistant_only_loss`" in shown
    assert sft([*call, "--preview", "1", "--assistant_only_loss"]) == 0
    shown = capsys.readouterr().out
    assert told not in shown and "⟦w2 </s>⟧" in shown and "⟦w1" not in shown
    (tmp_path / "bare.jinja").write_text(make_chat_tokenizer().chat_template)
    bare = ["--overwrite", "--assistant_only_loss", "--chat_template_path", str(tmp_path / "bare.jinja")]
    fails(
        [*call, *bare], capsys, "bare.jinja` has no {% generation %}", "pass it as `--chat_template_path FILE.jinja`"
    )


def test_preview_shows_rows_and_trains_nothing(call, tmp_path, capsys):
    assert sft([*call, "--preview", "2"]) == 0
    shown = capsys.readouterr().out
    assert "row 1: 10 tokens, 5 bear loss" in shown and "row 2" not in shown and "</s>⟧" in shown
    assert not (tmp_path / "out").exists()
    fails([*call, "--preview", "0"], capsys, "`preview=0` is outside [1, inf)")
