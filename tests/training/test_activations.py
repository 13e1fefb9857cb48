"""A from activations in a run: which rows, that it is kept, and what it is not for."""

import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny import lora_config, make_llama, make_rows, make_tokenizer, make_trainer

from lori_trl import LoriMasks, load_lori_adapter
from lori_trl.adapter.moments_file import read_moments
from lori_trl.compact import expand, export_compact
from lori_trl.method.contrastive import contrastive_projections
from lori_trl.method.projections import projections
from lori_trl.training import activations
from lori_trl.training.activations import spread
from lori_trl.training.trainers import LoriDPOConfig, LoriDPOTrainer

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture
def protected(tmp_path):
    """Rows of other words than the task's."""
    lines = [{"prompt": f"w{number} w{number + 1} ", "completion": f"w{number % 7} w3"} for number in range(60)]
    file = tmp_path / "earlier.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.fixture
def make(tmp_path, protected):
    def make(output_dir="run", **changes):
        contrastive = {"projection_init": "contrastive", "protect": [str(protected)], "protect_rows": 20}
        return make_trainer(tmp_path / output_dir, **contrastive | changes)

    return make


def same_A(first, second) -> bool:
    return all(torch.equal(first[path], second[path]) for path in first) and first.keys() == second.keys()


def test_A_comes_from_the_rows_as_they_are_trained_on(make, protected):
    trainer = make()
    A = projections(trainer.model, "default")
    assert trainer.projection.init == "contrastive" and trainer.projection.protected == ("earlier.jsonl",)
    assert not any(layer.lora_A["default"].weight.requires_grad for layer in trainer.lora_layers.values())

    def tokens(rows: list[dict], count: int) -> list[list[int]]:
        chosen = [rows[number * len(rows) // count] for number in range(count)]
        return [make_tokenizer()(row["prompt"] + row["completion"] + "</s>")["input_ids"] for row in chosen]

    earlier = [json.loads(line) for line in protected.read_text().splitlines()]
    rows, others = tokens(list(make_rows()), 20), tokens(earlier, 20)
    again = contrastive_projections(trainer.model, "default", rows=rows, protected=others, epsilon=0.1)
    assert same_A(A, again)
    seen: list[list[torch.Tensor]] = []
    for kind in (rows, others):  # from outside: hidden states that plain transformers return
        layer, inputs = make_llama().model.layers[1].mlp.down_proj, []
        model = make_llama()
        model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, x, kept=inputs: kept.append(x[0][0]))
        for row in kind:
            model(torch.tensor([row]))
        seen.append(inputs)
        assert layer.in_features == A[LAYER].shape[1]
    C2, C1 = (torch.cat(inputs).detach().double() for inputs in seen)
    C2, C1 = (tokens.T @ tokens / len(tokens) for tokens in (C2, C1))
    M = C1 + 0.1 * C1.trace() / len(C1) * torch.eye(len(C1), dtype=C1.dtype)
    values, vectors = torch.linalg.eig(torch.linalg.solve(M, C2))
    leading = vectors.real[:, values.real.argsort(descending=True)[:4]]
    inside = [torch.linalg.qr(matrix).Q for matrix in (leading, A[LAYER].double().T)]
    assert torch.linalg.matrix_norm(inside[1] - inside[0] @ (inside[0].T @ inside[1]), ord=2) < 1e-3


def test_layers_with_one_input_have_one_A(make):
    A = projections(make().model, "default")
    q, k, o = (A[f"model.layers.0.self_attn.{name}_proj"] for name in "qko")
    assert torch.equal(q, k) and not torch.equal(q, o)


def test_a_run_trains_on_it_and_plain_peft_loads_it(make, tmp_path):
    trainer = make()
    A = {path: weight.clone() for path, weight in projections(trainer.model, "default").items()}
    trainer.train()
    trainer.save_model()
    plain = PeftModel.from_pretrained(make_llama(), tmp_path / "run")
    assert same_A(A, projections(plain, "default"))
    loaded = load_lori_adapter(make_llama(), tmp_path / "run")
    assert loaded.lori_masks["code"].projection == trainer.projection
    card = (tmp_path / "run" / "README.md").read_text()
    assert "contrastive" in card and "earlier.jsonl" in card and "its seed is not on record" not in card


def test_a_run_that_is_resumed_keeps_its_A(make, tmp_path, monkeypatch):
    """Another machine computes other last digits."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = make(**saving)
    whole.train()
    compute = activations.contrastive_projections
    monkeypatch.setattr(
        activations,
        "contrastive_projections",
        lambda *args, **named: {path: A * (1 + 1e-6) for path, A in compute(*args, **named).items()},
    )
    for checkpoint in ("calibration/checkpoint-2", "calibration", "checkpoint-2"):
        resumed = make(**saving)
        assert resumed.projection != whole.projection
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / checkpoint))
        assert resumed.projection == whole.projection and resumed.masks == whole.masks
        assert all(torch.equal(resumed.weights[path], whole.weights[path]) for path in whole.weights)
    with pytest.raises(ValueError, match="protect_epsilon its default, this run has 0.5"):
        make(protect_epsilon=0.5, **saving).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_the_compact_form_stores_it(make, tmp_path, dtype):
    trainer = make()
    trainer.train()
    trainer.save_model()
    file = export_compact(tmp_path / "run", tmp_path / "compact.safetensors", dtype=dtype)
    expand(file, tmp_path / "expanded")
    A = projections(load_lori_adapter(make_llama(), tmp_path / "expanded"), "default")
    mine = projections(trainer.model, "default")
    if dtype is None:
        assert same_A(A, mine)
    else:
        assert all((A[path] - mine[path]).abs().max() <= mine[path].abs().max() / 127 for path in A)
        assert not same_A(A, mine)
    masks = LoriMasks.from_pretrained(tmp_path / "expanded")
    assert masks.projection.init == "contrastive" and masks.projection.protected == ("earlier.jsonl",)


def test_an_adapter_carries_its_moments_and_is_left_alone_without_its_rows(make, tmp_path, protected):
    earlier = make_trainer(
        tmp_path / "earlier",
        train_dataset=Dataset.from_json(str(protected)),
        task_name="earlier",
        save_moments=True,
        protect_rows=20,
    )
    earlier.train()
    earlier.save_model()
    moments = read_moments(tmp_path / "earlier")
    assert moments["model.layers.0.self_attn.q_proj"] is moments["model.layers.0.self_attn.v_proj"]
    assert moments[LAYER].factor.shape == (64, 64) and moments[LAYER].tokens == 20 * 5
    from_rows = make()
    from_moments = make("other", protect=[str(tmp_path / "earlier")])
    assert from_moments.projection.protected == ("earlier",)
    A, B = (projections(trainer.model, "default") for trainer in (from_rows, from_moments))
    for path in A:  # bfloat16 is all that differs where the factor has all dimensions
        bases = [torch.linalg.qr(each[path].double().T).Q for each in (A, B)]
        assert torch.linalg.matrix_norm(bases[1] - bases[0] @ (bases[0].T @ bases[1]), ord=2) < 0.1, path
    from_rows.train()
    from_rows.save_model()
    with pytest.raises(FileNotFoundError, match="carries no moments"):
        make("third", protect=[str(tmp_path / "run")])
    file = tmp_path / "earlier" / "moments" / "earlier.safetensors"
    file.write_bytes(file.read_bytes()[:-9] + b"123456789")
    with pytest.raises(ValueError, match="is no readable file of moments"):
        read_moments(tmp_path / "earlier")


def test_other_trainers_make_it_too(tmp_path, protected):
    rows = Dataset.from_list([{"prompt": f"w{n} w5", "chosen": f" w{n + 1}", "rejected": " w9"} for n in range(40)])
    args = LoriDPOConfig(
        str(tmp_path / "dpo"), projection_init="contrastive", protect=[str(protected)], use_cpu=True, report_to="none",
        task_name="preferences", per_device_train_batch_size=4,
    )  # fmt: skip
    trainer = LoriDPOTrainer(
        make_llama(), args=args, train_dataset=rows, processing_class=make_tokenizer(), peft_config=lora_config()
    )
    assert trainer.projection.init == "contrastive"


def test_rows_are_spread_over_the_data():
    data = Dataset.from_dict({"number": range(10)})
    assert [row["number"] for row in spread(data, 4)] == [0, 2, 5, 7]
    assert len(list(spread(data, 99))) == 10
    assert [row["number"] for row in spread(data.to_iterable_dataset(), 3)] == [0, 1, 2]


def test_rows_of_one_token_make_no_A(make):
    """As a tokenizer that knows none of the words gives them."""
    rows = Dataset.from_list([{"prompt": "unknown words here", "completion": " and there"}] * 8)
    with pytest.raises(ValueError, match="in fewer than 4 directions: most of them are the same token"):
        make(train_dataset=rows)


def test_what_it_is_not_for_is_refused(make, tmp_path, protected):
    with pytest.raises(ValueError, match="`protect=.*has no effect with `projection_init='gaussian'`"):
        make(projection_init="gaussian")
    with pytest.raises(ValueError, match="`projection_seed=3` has no effect"):
        make(projection_seed=3)
    with pytest.raises(ValueError, match="with r = 40, but the input of .* has 32 directions"):
        make(peft_config=lora_config(r=40))
    with pytest.raises(FileNotFoundError, match="missing.jsonl"):
        make(protect=["missing.jsonl"])
    trainer = make()
    trainer.train()
    trainer.save_model()
    model = load_lori_adapter(make_llama(), tmp_path / "run", is_trainable=True)
    with pytest.raises(ValueError, match="an adapter that is continued"):
        make("again", model=model)
    with pytest.raises(ValueError, match="calibrated on a contrastive A"):
        make_trainer(tmp_path / "masks", mask_name_or_path=str(tmp_path / "run"))
    assert make("masks", mask_name_or_path=str(tmp_path / "run")).masks == trainer.masks
