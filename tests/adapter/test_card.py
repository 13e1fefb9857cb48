"""The card: compared whole, valid, and nothing but plain text from outside in it."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from files_by_hand import seal
from huggingface_hub import ModelCard
from tiny import make_trainer, trained_adapter

from lori_trl import LoriMasks
from lori_trl.adapter.card import GENERATED, install_command, render_model_card
from lori_trl.adapter.heatmaps import draw_density
from lori_trl.adapter.record import LoriRecord, read_record
from lori_trl.adapter.record_fields import Losses, Training
from lori_trl.adapter.write import write_card
from lori_trl.training.card_facts import CardFacts

INSTALL = "pip install git+https://example.org/lori_trl"


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The address that a release gives, wherever these tests run."""
    monkeypatch.setattr("lori_trl.adapter.card.install_command", lambda: INSTALL)


GOLDEN = Path(__file__).parents[1] / "golden"

PEFT = {
    "base_model_name_or_path": "meta-llama/Meta-Llama-3-8B",
    "r": 32,
    "lora_alpha": 64,
    "lora_dropout": 0.05,
    "target_modules": ["v_proj", "q_proj"],
}
LORI = {
    "format_version": 2,
    "task": "code",
    "phase": "adapting",
    "variant": "LoRI-S",
    "sparsity": 0.9,
    "granularity": "model",
    "threshold": 0.00012345678,
    "projection": {"init": "gaussian", "seed": 123456789, "fingerprint": "sha256:" + "0" * 64},
    "calibration": {"learning_rate": 5e-5, "steps": 300, "samples": 18000, "loss": 0.71234},
    "counts": {"lora": 83886080, "lora_B": 44040192, "selected": 4404019},
    "tasks": [{"task": "code", "selected": 4404019}],
    "training": {
        "base_model": {
            "id": "meta-llama/Meta-Llama-3-8B",
            "name": "Meta-Llama-3-8B",
            "architecture": "LlamaForCausalLM",
            "parameters": 8030261248,
        },
        "dataset": {"id": "sahil2801/CodeAlpaca-20k", "rows": 18000, "conversational": False},
        "license": "llama3",
        "tags": ["sft"],
        "hyperparameters": {"learning_rate": 5e-4, "num_train_epochs": 2},
        "world_size": 8,
        "device": "NVIDIA H100",
        "steps": 1126,
        "epochs": 2.0,
        "losses": [
            {"step": 0, "loss": None, "eval_loss": 0.9101},
            {"step": 563, "loss": 0.5211, "eval_loss": None},
            {"step": 1126, "loss": 0.4012, "eval_loss": 0.4823},
        ],
    },
    "versions": {"lori_trl": "0.1.0", "trl": "1.16.0", "peft": "0.21.2"},
    "adapter_config": "0" * 64,
    "tensors": {"base_model.model.a.lora_A.weight": "0" * 64},
}
RESULTS = {
    "format_version": 1,
    "results": [
        {
            "task": "humaneval",
            "metric": "pass@1",
            "value": 0.432,
            "stderr": 0.0387,
            "dataset": "openai/openai_humaneval",
        },
        {"task": "mbpp", "metric": "pass@1", "value": 0.5},
    ],
}


def masks(task: str = "code") -> LoriMasks:
    modules = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qv"]
    entries = {path: torch.arange(40).view(10, 4) % (5 + 3 * number) == 0 for number, path in enumerate(modules)}
    return LoriMasks(entries, task=task, sparsity=0.9)


def changed(**changes) -> dict:
    return json.loads(json.dumps({**LORI, **changes}))


def record(values: dict = LORI) -> LoriRecord:
    return LoriRecord.from_dict(seal(values))


def single() -> str:
    return render_model_card(
        record(), PEFT, masks(), eval_results=RESULTS, repo_id="me/code-lori-s", recipe=True, picture=True
    )


def test_a_baseline_is_no_result_of_the_model():
    baseline = {"task": "boolq", "metric": "majority_baseline", "value": 0.65}
    alone = {"format_version": 1, "results": [baseline]}
    text = render_model_card(record(), PEFT, masks(), eval_results=alone)
    assert "majority_baseline" in text and ModelCard(text).data.eval_results is None
    with_both = {**RESULTS, "results": [*RESULTS["results"], baseline]}
    card = ModelCard(render_model_card(record(), PEFT, masks(), eval_results=with_both))
    assert [result.metric_type for result in card.data.eval_results].count("majority_baseline") == 0


def continual() -> str:
    config = changed(
        task="code",
        calibration=None,
        projection={"init": None, "seed": None, "fingerprint": "sha256:" + "0" * 64},
        tasks=[{"task": "safety", "selected": 4404019}, {"task": "code", "selected": 4404019}],
    )
    config["training"] |= {
        "base_model": {"id": None, "name": "my-llama", "architecture": "LlamaForCausalLM", "parameters": 8030261248},
        "dataset": {"id": None, "rows": 18000, "conversational": True},
        "license": None,
        "losses": [],
    }
    base = {**PEFT, "base_model_name_or_path": "/home/somebody/models/my-llama"}
    return render_model_card(record(config), base, masks())


def merged() -> str:
    other = {"weight": 0.5, "source": "me/x", "rank": 32, "offset": 0, "sha256": {}}
    merge = {"method": "concat", "adapters": [{"task": "code", **other}, {"task": "math", **other}]}
    facts = {"variant": "merged", "task": "code-math", "merge": merge, "sparsity": None, "tasks": []}
    config = changed(**facts, calibration=None, training=None)
    config["counts"]["selected"] = None
    return render_model_card(record(config), PEFT, None, repo_id="me/code-math", forms=("compact",))


@pytest.mark.parametrize("render", [single, continual, merged])
def test_the_card_is_the_golden_one(render):
    """Set LORI_UPDATE_GOLDEN=1 to write them anew, and read what changed."""
    file = GOLDEN / f"card_{render.__name__}.md"
    if os.environ.get("LORI_UPDATE_GOLDEN"):
        file.write_text(render(), encoding="utf-8")
    assert render() == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("render", [single, continual, merged])
def test_a_card_says_nothing_empty_and_is_valid(render):
    text = render()
    assert not re.search(r"None|nan|More Information Needed|/home/|\{\{|\{%", text)
    assert "\n\n\n" not in text
    card = ModelCard(text)  # parses, and validates the model-index
    data = card.data.to_dict()
    assert {"lori", "trl", "peft"} <= set(data["tags"])
    assert data["library_name"] == "peft"
    assert all(value not in ("", [], {}) for value in data.values())
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(code, "card", "exec")


def test_the_metadata_are_the_facts():
    card = ModelCard(single())
    data = card.data.to_dict()
    assert data["base_model"] == "meta-llama/Meta-Llama-3-8B"
    assert data["base_model_relation"] == "adapter"
    assert data["datasets"] == ["sahil2801/CodeAlpaca-20k"]
    assert data["license"] == "llama3"
    found = [(result.dataset_name, result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert found == [("humaneval", "pass@1", 0.432), ("mbpp", "pass@1", 0.5)]
    assert card.data.eval_results[0].dataset_type == "openai/openai_humaneval"


def test_a_local_base_is_called_local():
    text = continual()
    data = ModelCard(text).data.to_dict()
    assert not {"base_model", "base_model_relation", "datasets", "license", "model-index"} & set(data)
    assert "a local base model called my-llama" in text
    assert "local data, not on the Hub, 18,000 rows, conversations" in text
    assert "apply_chat_template" in text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"r": 16}, "--lora-modules code=me/x\n"),
        ({"r": 17}, "--lora-modules code=me/x --max-lora-rank 32\n"),
        ({"r": 96}, "--max-lora-rank 128\n"),
        ({"r": 513}, None),
        ({"rank_pattern": {"q_proj": 8}}, None),
        ({"modules_to_save": ["lm_head"]}, None),
    ],
)
def test_the_line_for_vllm(changes, says):
    text = render_model_card(record(), PEFT | changes, None, repo_id="me/x")
    line = re.search("vllm serve meta-llama/Meta-Llama-3-8B --enable-lora .*\n", text)
    assert line is None if says is None else line[0].endswith(says)


GRADIENT = {"method": "gradient", "steps": 3, "samples": 48, "loss": 0.7}
DENSE = {"variant": "LoRI-D", "sparsity": 0.0, "calibration": None, "threshold": None}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "those that moved most when all of B was trained for 300 steps, after which B was set back"),
        ({"calibration": GRADIENT}, "those on whose sign the gradients of 3 batches agreed most"),
        ({"calibration": {"method": "random", "seed": 7}}, "They were drawn at random."),
        ({"calibration": None}, "The mask that names them was given to the run."),
        ({"granularity": "matrix"}, "Then the 10 % of each matrix that moved most"),
        (DENSE, "all of B was trained, without a mask. That is 52.5 % of what LoRA trains."),
        ({"projection": {**LORI["projection"], "init": "contrastive"}}, "A was computed from the base model's activ"),
    ],
)
def test_a_card_tells_what_its_run_did(changes, says):
    """And nothing of other variants, nor what was not measured: how tasks go together."""
    config = changed(**changes)
    if config["variant"] == "LoRI-D":
        config["counts"]["selected"] = config["counts"]["lora_B"]
    text = render_model_card(record(config), PEFT, None if changes is DENSE else masks())
    assert says in text
    assert not re.search("short|hardly|interfere(?!nce in Multi)|apart", text)
    assert ("Losses while training on the mask" in text) == (changes is not DENSE)


@pytest.mark.parametrize(("samples", "says"), [(18000, "300 steps on 18,000 rows at"), (None, "300 steps at")])
def test_a_card_counts_rows_and_says_that_they_were_packed(samples, says):
    config = changed(calibration={**LORI["calibration"], "samples": samples})
    config["training"]["hyperparameters"]["packing"] = True
    text = render_model_card(record(config), PEFT, masks())
    assert says in text and "18,000 rows, packed: a sequence of the training holds several rows." in text
    assert "packed:" not in single()


def test_a_card_says_that_the_base_was_in_4_bits():
    config = changed()
    assert "bitsandbytes" not in render_model_card(record(config), PEFT, masks())
    config["training"]["base_model"]["quantization"] = "4-bit"
    assert "packed to 4-bit by bitsandbytes" in render_model_card(record(config), PEFT, masks())


def test_where_the_package_is_to_be_had_is_one_address(monkeypatch):
    """That of [project.urls]; a card says none rather than a wrong one."""
    assert f"(`{INSTALL}`)" in single()
    monkeypatch.setattr("lori_trl.adapter.card.install_command", lambda: None)
    assert "with `lori_trl`, which keeps" in single()
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    address = re.search(r'^Repository = "(.*)"$', project, re.MULTILINE)[1]
    assert install_command() in (None, f"pip install git+{address}")
    for folder in ("lori_trl", "recipes", "model_cards", "docs"):
        for file in (Path(__file__).parents[2] / folder).rglob("*.*"):
            if file.suffix in (".py", ".md", ".yaml", ".jinja"):
                assert not re.search(r"pip install .?lori[-_]trl(\[\w+\])?['`]", file.read_text()), file


HOSTILE = 'x"\n---\nlicense: mit\n<script>alert(1)</script> [a](javascript:b) `c` {{ 7 * 7 }} | d'


def test_nothing_is_injected_through_a_name():
    config = changed(versions={"trl": HOSTILE})
    config["training"] |= {
        "base_model": {"id": HOSTILE, "name": HOSTILE, "architecture": HOSTILE, "parameters": 1},
        "dataset": {"id": HOSTILE, "rows": 1, "conversational": False},
        "license": HOSTILE,
        "device": HOSTILE,
        "hyperparameters": {HOSTILE: HOSTILE},
    }
    results = {"format_version": 1, "results": [{"task": HOSTILE, "metric": HOSTILE, "value": 1, "dataset": HOSTILE}]}
    peft = {**PEFT, "base_model_name_or_path": HOSTILE, "r": HOSTILE}
    text = render_model_card(record(config), peft, masks(), eval_results=results)
    _, header, body = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    assert not {"license", "base_model", "datasets"} & set(yaml.safe_load(header))
    body = body.replace(GENERATED, "")
    assert not re.search(r"[<>]|\]\(javascript|\n---\n|`c`|49|\n *license:", body)
    ModelCard(text)


@pytest.mark.parametrize(
    "results", [[], {"results": [{"task": "x"}]}, {"results": [{"task": "x", "metric": "m", "value": "?"}]}]
)
def test_results_of_another_form_are_refused(results):
    with pytest.raises(ValueError, match="eval_results.json.*is not of its form"):
        render_model_card(record(), PEFT, None, eval_results=results)


# ---- the facts of a run ----------------------------------------------------------------------------------------


def test_a_run_writes_its_own_card(tmp_path):
    folder = trained_adapter()
    text = (folder / "README.md").read_text()
    config = json.loads((folder / "lori_config.json").read_text())
    facts = config["training"]
    assert facts["base_model"] == {
        "id": None,
        "name": "tiny-llama",
        "architecture": "LlamaForCausalLM",
        "parameters": 24992,
    }
    assert len(facts["dataset"].pop("fingerprint")) == 64
    assert facts["dataset"] == {"id": None, "rows": 32, "conversational": False}
    assert facts["tags"] == ["sft"]
    assert facts["steps"] == 4
    assert [row["step"] for row in facts["losses"]] == [1, 2, 3, 4]
    assert facts["hyperparameters"]["learning_rate"] == 0.005
    assert "output_dir" not in facts["hyperparameters"]
    assert f"seed `{config['projection']['seed']}`" in text
    assert f"this trains | {config['counts']['selected']:,}," in text
    assert "4 steps on 16 rows at learning rate 0.005" in text  # of 32, each once: that is all they saw
    assert str(folder) not in text
    assert str(folder.parent) not in (folder / "lori_config.json").read_text()
    assert "[`recipe.yaml`](recipe.yaml)" in text
    assert "![Density of the mask by layer and projection](density.png)" in text
    assert not re.search(r"None|nan|\n\n\n", text)


def test_a_card_edited_by_hand_is_kept(tmp_path):
    trainer = make_trainer(tmp_path, sparsity=0.0)
    trainer.train()
    trainer.save_model()
    card = tmp_path / "README.md"
    assert "all of B is trained (LoRI-D)" in card.read_text()
    assert not (tmp_path / "density.png").exists()  # nothing to see
    edited = card.read_text().replace(GENERATED, "") + "Mine.\n"
    card.write_text(edited)
    trainer.save_model()
    assert card.read_text() == edited
    (tmp_path / "elsewhere").mkdir()
    again = write_card(tmp_path, read_record(tmp_path), None, beside=tmp_path, target=tmp_path / "elsewhere")
    assert again.read_text() == edited


def test_evaluation_results_beside_the_adapter_get_onto_the_card(tmp_path):
    (tmp_path / "eval_results.json").write_text(json.dumps(RESULTS))
    folder = trained_adapter()
    place = {"target": tmp_path, "repo_id": "me/x"}
    card = write_card(folder, read_record(folder), masks(), beside=tmp_path, **place).read_text()
    assert "| humaneval | pass@1 | 0.432 ± 0.039 |" in card
    assert ModelCard(card).data.model_name == "me/x"


def test_a_card_that_fails_never_costs_the_run(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    trainer.train()
    (tmp_path / "eval_results.json").write_text("{")
    trainer.save_model()
    assert "card" in caplog.text
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert (tmp_path / "lori_config.json").is_file()


def test_losses_are_thinned_to_a_short_table():
    facts = CardFacts.__new__(CardFacts)
    facts.training = Training(base_model=None)
    log = [{"step": step, "loss": 1 / (step + 1)} for step in range(1000)] + [{"step": 999, "eval_loss": 0.5}]
    state = type("State", (), {"log_history": log, "global_step": 999, "epoch": 1.0})()
    facts.on_log(None, state, None, logs=log[-1])
    losses = facts.training.losses
    assert len(losses) == 20
    assert losses[0] == Losses(step=0, loss=1.0, eval_loss=None)
    assert losses[-1] == Losses(step=999, loss=0.001, eval_loss=0.5)


def test_the_picture_is_the_same_every_time(tmp_path):
    pytest.importorskip("matplotlib")
    assert draw_density(masks(), tmp_path / "a.png")
    assert draw_density(masks(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    everything = LoriMasks({path: torch.ones_like(mask) for path, mask in masks().items()}, task="code")
    assert not draw_density(everything, tmp_path / "c.png")
