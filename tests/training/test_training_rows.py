"""Rows that hold no text are refused by number, before the first step."""

import pytest
from datasets import Dataset, DatasetDict


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["w1", "w2"], "completion": ["w3", None]}, "Row 1 of `train_dataset` has `completion=None`"),
        ({"messages": [[{"role": "user", "content": "w1"}], None]}, "Row 1 .*`messages=None`. Allowed is text, or a"),
        ({"prompt": ["w1"], "completion": [["w2"]]}, r"Row 0 .*`completion=\['w2'\]`"),
        ({"text": ["w1 w2", None]}, "Row 1 .*`text=None`.*Correct the row"),
        ({"prompt": [5], "completion": ["w1"]}, "Row 0 .*`prompt=5`"),
    ],
)
def test_a_bad_row(make_trainer, columns, message, streaming):
    rows = Dataset.from_dict(columns)
    with pytest.raises(ValueError, match=message):
        make_trainer(train_dataset=rows.to_iterable_dataset() if streaming else rows)


@pytest.mark.parametrize("columns", [{"prompt": [], "completion": []}, {}])
def test_no_rows(make_trainer, columns):
    with pytest.raises(ValueError, match="has no rows"):
        make_trainer(train_dataset=Dataset.from_dict(columns))


def test_columns_that_are_not_used_may_hold_anything(make_trainer):
    make_trainer(train_dataset=Dataset.from_list([{"prompt": "w1", "completion": "w2", "score": None}]))


@pytest.mark.parametrize("rows", [[{"prompt": "w1", "completion": "w2"}], DatasetDict()])
def test_what_is_no_data_set(make_trainer, rows):
    with pytest.raises(TypeError, match="`train_dataset` is a (list|DatasetDict). Allowed is a `datasets.Dataset`"):
        make_trainer(train_dataset=rows)


def test_a_bad_row_to_evaluate_on(make_trainer):
    with pytest.raises(ValueError, match="Row 0 of `eval_dataset` has `completion=None`"):
        make_trainer(eval_dataset=Dataset.from_list([{"prompt": "w1", "completion": None}]))
