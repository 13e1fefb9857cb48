"""Losses equal to hand computation."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from tiny import make_chat_tokenizer
from trl import SFTConfig, SFTTrainer

from lori_trl.evaluation import (
    completion_loss,
)

_CHAT = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"


@pytest.fixture(scope="module")
def chat_tokenizer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = _CHAT
    return tokenizer


def conversational(rows):
    return rows.map(
        lambda row: {
            "prompt": [{"role": "w1", "content": row["prompt"]}],
            "completion": [{"role": "w2", "content": row["completion"]}],
        }
    )


@pytest.mark.parametrize("convert", [lambda rows: rows, conversational], ids=["plain", "conversational"])
@pytest.mark.parametrize("max_length", [None, 8])
def test_completion_loss_is_that_of_the_rows_as_trl_tokenizes_them(
    model, chat_tokenizer, rows, convert, max_length, tmp_path
):
    rows = convert(rows.select(range(7)))
    config = SFTConfig(output_dir=str(tmp_path), max_length=max_length, report_to="none", use_cpu=True)
    prepared = SFTTrainer(model, config, train_dataset=rows, processing_class=chat_tokenizer).train_dataset
    total, tokens = 0.0, 0
    for row in prepared:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        labels = torch.tensor(row["labels"][1:])
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()  # ignores -100
        tokens += int((labels != -100).sum())
    measured = completion_loss(model, chat_tokenizer, rows, batch_size=3, max_length=max_length)
    assert measured.tokens == tokens
    assert measured.loss == pytest.approx(total / tokens, rel=1e-5)


def test_completion_loss_does_not_depend_on_the_batches(model, tokenizer, rows):
    rows = [{"prompt": "w1 w2", "completion": " w3" * (1 + i % 5)} for i in range(9)]
    losses = [completion_loss(model, tokenizer, rows, batch_size=size) for size in (1, 4, 9)]
    assert losses[0].loss == pytest.approx(losses[1].loss, rel=1e-6) == pytest.approx(losses[2].loss, rel=1e-6)
    assert losses[0].tokens == sum(2 + i % 5 for i in range(9))  # EOS counts
    model.train()
    completion_loss(model, tokenizer, rows)
    assert model.training


def test_standard_error_of_the_loss(model, tokenizer):
    """The linearised error of a ratio; for rows of one length it is that of the mean of the rows' means."""
    rows = [{"prompt": "w1", "completion": f" w{i} w{i + 1}"} for i in range(2, 12)]
    single = [completion_loss(model, tokenizer, [row]) for row in rows]
    assert all(math.isnan(measured.stderr) for measured in single)
    means = torch.tensor([measured.loss for measured in single], dtype=torch.float64)
    assert completion_loss(model, tokenizer, rows).stderr == pytest.approx((means.std() / 10**0.5).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "max_length", "part"),
    [
        ([], None, "`rows` has no rows"),
        ([{"text": "w1"}, {"score": 1}], None, "Row 1 of `rows` has score and nothing that is completed"),
        (
            [{"messages": [{"role": "user", "content": "w1"}]}],
            None,
            "Row 0 of `rows` has messages and nothing that is",
        ),
        ([{"prompt": "w1 w2 w3", "completion": " w4"}], 3, "`max_length=3` leaves no completion token"),
    ],
)
def test_rows_without_a_completion(model, tokenizer, rows, max_length, part):
    with pytest.raises(ValueError, match=part):
        completion_loss(model, tokenizer, rows, max_length=max_length)


def test_every_answer_of_a_conversation_is_a_completion(model):
    tokenizer = make_chat_tokenizer()
    roles = ["system", "user", "assistant", "user", "assistant"]
    talk = [{"role": role, "content": f"w{10 + number}"} for number, role in enumerate(roles)]
    answers = [{"prompt": talk[:number], "completion": [talk[number]]} for number in (2, 4)]
    measured = completion_loss(model, tokenizer, [{"messages": talk}])
    assert measured == completion_loss(model, tokenizer, answers) and measured.tokens == 2 * len("w12 </s>".split())
    greeting = [{"role": "assistant", "content": "w9"}, *talk]
    assert completion_loss(model, tokenizer, [{"messages": greeting}]).tokens == measured.tokens


def test_of_text_all_counts_but_for_its_first_token(model, tokenizer, tmp_path):
    rows = Dataset.from_list([{"text": "w1 w2 w3"}, {"text": "w4"}])
    measured = completion_loss(model, tokenizer, rows)
    config = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    trainer = SFTTrainer(model, config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    assert measured.tokens == 3 + 1
    assert measured.loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
