"""The preview shows what the trainer trains on: the same tokens, with loss on the same ones."""

import pytest
from datasets import Dataset
from tiny import tiny_args

from lori_trl.training.preview import preview_rows

CHAT = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% if loop.last %}</s>{% endif %}"
CHAT += "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"


def text_of(row, bears_loss):
    return " ".join(piece for piece, has_loss in row.pieces if has_loss == bears_loss).split()


def test_prompts_bear_no_loss_and_completions_do(rows, tokenizer, tmp_path):
    (row, *others) = preview_rows(rows, tiny_args(tmp_path), tokenizer, 3)
    assert len(others) == 2
    assert text_of(row, False) == rows[0]["prompt"].split()
    assert text_of(row, True) == [*rows[0]["completion"].split(), "</s>"]
    assert (row.num_tokens, row.num_with_loss) == (10, 5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"max_length": 6}, {"packing": True, "max_length": 24}, {}], ids=str)
def test_it_is_what_the_trainer_trains_on(changes, rows, tokenizer, make_trainer, tmp_path):
    trainer = make_trainer(**changes)
    batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset.take(1))))
    labels = batch["labels"][0].tolist()
    (row,) = preview_rows(rows, tiny_args(tmp_path, **changes), tokenizer, 1)
    assert " ".join(piece for piece, _ in row.pieces).split() == tokenizer.decode(batch["input_ids"][0]).split()
    assert (row.num_tokens, row.num_with_loss) == (len(labels), sum(label != -100 for label in labels[1:]))


def test_plain_text_bears_loss_but_for_its_first_token(tokenizer, tmp_path):
    (row,) = preview_rows(Dataset.from_dict({"text": ["w1 w2 w3"]}), tiny_args(tmp_path), tokenizer, 1)
    assert (text_of(row, False), text_of(row, True)) == (["w1"], ["w2", "w3", "</s>"])
