"""`lori recipes`: the shipped ones are listed, shown, checked and copied."""

import os

import pytest

from lori_trl.cli import main, sft
from lori_trl.recipes.find import shipped_folder


def test_recipes_list_show_copy_validate(tmp_path, capsys):
    assert main(["recipes", "list"]) == 0
    shown = capsys.readouterr().out
    assert "run here: quickstart.yaml: 310 s on 2 CPU cores; held-out loss 3.654 -> 2.197" in shown
    listed = {line.split()[0]: line for line in shown.splitlines() if ".yaml" in line}
    for name, *parts in (
        ("quickstart.yaml", "SmolLM2-135M-Instruct", "LoRI-S", "32"),
        ("math_lori_d_mistral_r64.yaml", "math", "Mistral-7B-v0.1", "LoRI-D", "64", "Table 5"),
        ("continual_safety_nlu_lori_s.yaml", "nlu", "LoRI-S", "kept", "Figure 3"),
        ("loraf_nlu.yaml", "LoRAF", "64", "LoRAF paper, Table 2"),
        ("safety_dora.yaml", "safety", "Meta-Llama-3-8B", "DoRA", "32", "Table 7"),
        ("code_fft.yaml", "code", "full", "Table 6"),
    ):
        assert all(part in listed[name] for part in parts), listed[name]
    assert main(["recipes", "show", "quickstart"]) == 0
    text = capsys.readouterr().out
    assert main(["recipes", "copy", "quickstart", str(tmp_path / "mine.yaml")]) == 0
    schema = shipped_folder("recipes") / "recipe.schema.json"
    assert (tmp_path / "mine.yaml").read_text() == text.replace("$schema=recipe.schema.json", f"$schema={schema}")
    assert main(["recipes", "validate", str(tmp_path / "mine.yaml")]) == 0
    assert "no faults" in capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text("sparsity: high\n")
    for arguments in (["copy", "quickstart", str(tmp_path / "mine.yaml")], ["validate", str(tmp_path / "mine.yaml")]):
        with pytest.raises(SystemExit) as exit:
            main(["recipes", *arguments])
        assert exit.value.code == 2
    assert (tmp_path / "mine.yaml").read_text() == "sparsity: high\n"


def validate(tmp_path, capsys, text):
    """Return exit code, standard output and error of `lori recipes validate` for a text."""
    (tmp_path / "mine.yaml").write_text(text)
    try:
        code = main(["recipes", "validate", str(tmp_path / "mine.yaml")])
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("lr_scheduler_type: text", "text"),
        ("env: {'A=B': '1'}", "env: 'A=B' is no name of an environment variable"),
        ("env: {1: 2}", "env: 1 is no name of an environment variable"),
        ("env: {A: [1]}", "env: A=[1]: text or a number is needed"),
        ('env: {A: "\\0"}', "text or a number is needed"),
        ("help: 1", "help: no such field"),
        ("recipe: quickstart.yaml", "recipe: no such field"),
        ("output_dir: [a]", "a list is not allowed here"),
        ("lora_target_modules: []", "one value at least is needed"),
        ("model_init_kwargs: {1: 2}", "the keys of a mapping must be text"),
        ("model_init_kwargs: text", "a mapping is needed"),
        ("model_init_kwargs: '{\"trust_remote_code\": true}'", "leave the quotes out"),
        ("deepspeed: text", "deepspeed"),
        ("lora_target_modules: q_proj,k_proj", "one text with commas; several are a list, [q_proj,k_proj]"),
        ("report_to: [wandb, 'None']", "the text None; for nothing, leave the key out or write null"),
        ("report_to: None", "the text None"),
        ("max_steps: 99999999999999999999", "more than 64 bits"),
        ("seed: 1:30", "not a valid int"),
        ("requires: [adapter]", "requires=['adapter']: a list of fields is needed"),
        ("requires: adapter_name_or_path", "a list of fields is needed"),
        ("datasets: [{name: a}]", "`path` is missing"),
        ("dataset_name: a\ndatasets: [{path: a}]", "they exclude each other"),
        ("load_best_model_at_end: true", "load_best_model_at_end"),
        ("adapters: [a]\nenv: {A: b}", "env: no such field"),
    ],
)
def test_what_the_run_would_refuse_is_a_fault(line, fault, tmp_path, capsys):
    code, _, error = validate(tmp_path, capsys, line)
    assert code == 2 and fault in error and "Correct the" in error


def test_the_data_that_are_here_are_looked_for(tmp_path, capsys):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("")
    assert validate(tmp_path, capsys, "dataset_path: rows")[0] == 0
    for text in ("dataset_path: rows\ndataset_train_split: training", "dataset_path: rows\neval_strategy: epoch"):
        code, _, error = validate(tmp_path, capsys, text)
        assert code == 2 and "is not in `rows`, which has train. Pass one of these" in error
    code, shown, _ = validate(tmp_path, capsys, "dataset_path: nowhere")
    assert code == 0 and "`nowhere` is not here, so its splits were not looked at" in shown


@pytest.fixture
def dry_run(tmp_path, model_folder):
    """Return a function that runs mine.yaml dry, on a model and rows that are there."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1 w2", "completion": "w3"}\n')
    options = ["--model_name_or_path", str(model_folder), "--dataset_path", str(tmp_path / "rows.jsonl"), "--dry-run"]
    return lambda: sft(["--recipe", str(tmp_path / "mine.yaml"), *options])


@pytest.mark.parametrize(
    "line",
    [
        "calibration_sparsities: 0.5",
        "calibration_sparsities: ['0.5', 9.5e-1]",
        "lora_target_modules: all-linear",
        "lora_alpha: null",
        "max_length: null",
        "report_to: [none]",
        "env: {A: 1, B: text}",
        "lora_target_modules: '.*[qv]_proj{1,2}'",
        "max_steps: 0100",
        "num_processes: 2",
        "{mixed_precision: 'no', main_process_port: 29501, multi_gpu: false}",
    ],
)
def test_what_is_valid_the_run_takes(line, tmp_path, capsys, dry_run):
    assert validate(tmp_path, capsys, line)[0] == 0
    assert dry_run() == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("trust_remote_code: true", "trust_remote_code=True"),
        ("model_init_kwargs: {trust_remote_code: true}", "trust_remote_code=True"),
        ("attn_implementation: some/kernel", "attn_implementation=some/kernel"),
        ("env: {LD_PRELOAD: /tmp/a.so, PYTHONPATH: /tmp, OMP_NUM_THREADS: 1}", "env=LD_PRELOAD, PYTHONPATH:"),
        ("env: {OMP_NUM_THREADS: 1}\ntrust_remote_code: false", None),
    ],
)
def test_code_from_elsewhere_is_told_before_it_runs(text, told, tmp_path, capsys, dry_run, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    code, _, error = validate(tmp_path, capsys, text)
    assert code == 0 and (told in error and "Go on only if you trust" in error if told else error == "")
    dry_run()
    assert not told or told in capsys.readouterr().err


def test_baselines_are_for_trl(tmp_path, capsys):
    for name in ("nlu_lora.yaml", "baselines/nlu_fft"):
        assert main(["recipes", "validate", name]) == 0
        assert "no faults, for `trl sft --config`" in capsys.readouterr().out
    code, _, error = validate(tmp_path, capsys, "use_peft: true\nsparsity: 0.9")
    assert code == 2 and "sparsity: no such field" in error


def test_a_recipe_is_found_by_its_relative_path(capsys):
    for name in ("baselines/nlu_lora.yaml", "merge/table8_lori_s_concat"):
        assert main(["recipes", "show", name]) == 0
    with pytest.raises(SystemExit, match="2"):
        main(["recipes", "show", "nope.yaml"])
    error = capsys.readouterr().err
    assert "`nope.yaml` is neither a file nor a shipped recipe" in error and "--recipe" not in error


def test_many_faults_are_counted_not_listed(tmp_path, capsys):
    code, _, error = validate(tmp_path, capsys, "\n".join(f"key_{number}: {'x' * 999}" for number in range(300)))
    assert code == 2 and "has 300 faults" in error and "and 290 more" in error and len(error) < 1500
    code, _, error = validate(tmp_path, capsys, f"{'k' * 900}: 1\ntask_name: [{'x' * 999}]\nsparsity: {'9' * 30}")
    assert code == 2 and len(error) < 800
