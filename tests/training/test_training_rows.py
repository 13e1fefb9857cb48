"""Rows that hold no text are refused by number, before the first step; only completions bear loss; the EOS stays."""

import pytest
from datasets import Dataset, DatasetDict, DatasetInfo
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_chat_tokenizer

from lori_trl.training.training_rows import kept_positions, name_of_data

TALK = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["w1", "w2"], "completion": ["w3", None]}, "Row 1 of `train_dataset` has `completion=None`"),
        ({"messages": [[{"role": "user", "content": "w1"}], None]}, "Row 1 .*`messages=None`. Allowed is text, or a"),
        ({"prompt": ["w1"], "completion": [["w2"]]}, r"Row 0 .*`completion=\['w2'\]`"),
        ({"text": ["w1 w2", None]}, "Row 1 .*`text=None`.*Correct the row"),
        ({"prompt": [5], "completion": ["w1"]}, "Row 0 .*`prompt=5`"),
        ({"messages": [TALK, []]}, r"Row 1 .*`messages=\[\]`"),
        ({"prompt": ["w1"], "completion": [TALK[1:]]}, "Row 0 .* has text in `prompt` and messages in `completion`"),
        ({"prompt": ["w1"], "chosen": ["w2"]}, "The rows of `train_dataset` have the columns prompt, chosen"),
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


def test_the_columns_of_one_format_are_taken_whole(make_trainer, tokenizer):
    """`text` beside a completion would get the EOS in its place."""
    rows = Dataset.from_list([{"prompt": "w1", "completion": " w2", "text": "w1 w2", "score": 1}])
    trained = make_trainer(train_dataset=rows, eval_dataset={"held out": rows})
    for data in (trained.train_dataset, trained.eval_dataset["held out"]):
        assert tokenizer.convert_ids_to_tokens(data["input_ids"][0]) == ["w1", "w2", "</s>"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("columns", [{}, {"prompt": "w1", "prompt_id": "a"}], ids=["", "prompt beside"])
@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_sharegpts_speakers_are_user_and_assistant(make_trainer, name, columns, streaming):
    tokenizer = make_chat_tokenizer()
    said = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]
    rows = Dataset.from_list([{name: said, **columns}] * 4)
    data = make_trainer(
        train_dataset=rows.to_iterable_dataset() if streaming else rows, processing_class=tokenizer
    ).train_dataset
    assert tokenizer.decode(next(iter(data))["input_ids"]) == "w3 w1 </s> w4 w2 </s>"


@pytest.mark.parametrize(
    ("info", "name"),
    [
        ({"dataset_name": "ai2_arc", "config_name": "ARC-Easy"}, "ai2_arc-ARC-Easy"),
        ({"dataset_name": "gsm8k", "config_name": "main"}, "gsm8k"),
        ({"dataset_name": "json", "config_name": "default-abc"}, "data-"),
        ({"dataset_name": "data", "config_name": "default"}, "data-"),
        ({}, "data-"),
    ],
)
def test_a_data_set_in_python_names_its_task(info, name):
    rows, others = (Dataset.from_list([{"text": text}], info=DatasetInfo(**info)) for text in ("w1", "w2"))
    assert name_of_data(rows).startswith(name)
    assert (name_of_data(rows) == name_of_data(others)) == (name != "data-")


# ---- truncation ----------------------------------------------------------------------------------------------------

BOS, EOS = 1, 2


@given(prompt=st.integers(0, 30), completion=st.integers(1, 30), max_length=st.integers(2, 40), bos=st.booleans())
def test_the_prompts_end_and_the_eos_always_stay(prompt, completion, max_length, bos):
    ids = [BOS if bos and i == 0 else 10 + i for i in range(prompt)] + [100 + i for i in range(completion - 1)] + [EOS]
    positions = kept_positions(ids, prompt, max_length, BOS, EOS)
    kept = [ids[position] for position in positions]
    assert len(kept) == min(len(ids), max_length) and positions == sorted(set(positions))
    assert kept[-1] == EOS
    assert not prompt or prompt - 1 in positions
    if bos and prompt and sum(position < prompt for position in positions) > 1:
        assert kept[0] == BOS
    in_prompt = sum(position < prompt for position in positions)
    assert in_prompt >= min(prompt, max_length // 2) and len(kept) - in_prompt >= min(completion, max_length // 2)


def test_truncation_by_token_ids():
    prompt, completion = [BOS, 11, 12, 13, 14, 15], [21, 22, 23, 24, 25, EOS]

    def cut(max_length, ids=prompt + completion):
        return [ids[position] for position in kept_positions(ids, 6, max_length, BOS, EOS)]

    assert cut(12) == prompt + completion
    assert cut(10) == [BOS, 12, 13, 14, 15, 21, 22, 23, 24, EOS]
    assert cut(11) == [BOS, 12, 13, 14, 15] + completion
    assert cut(8) == [BOS, 13, 14, 15, 21, 22, 23, EOS]
    assert cut(8, prompt + completion[:3] + [EOS]) == [BOS, 13, 14, 15, 21, 22, 23, EOS]
    assert cut(5, prompt + [EOS]) == [BOS, 13, 14, 15, EOS]
    assert cut(8, prompt + completion[:5] + [EOS, 99]) == [BOS, 13, 14, 15, 21, 22, EOS, 99]  # a chat's line end


def test_the_trainer_truncates_so_and_only_completions_bear_loss(make_trainer, tokenizer):
    words = [f"w{i}" for i in range(20)]
    rows = Dataset.from_list(
        [
            {"prompt": " ".join(words[:3]), "completion": " w30 w31"},
            {"prompt": " ".join(words), "completion": " w30 w31"},
            {"prompt": " ".join(words), "completion": " " + " ".join(words)},
            {"prompt": " ".join(words[:3]), "completion": " " + " ".join(words)},
        ]
    )
    trained = make_trainer(train_dataset=rows, eval_dataset=rows, max_length=10)
    eos = tokenizer.eos_token_id
    for data in (trained.train_dataset, trained.eval_dataset):
        tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in data["input_ids"]]
        end = "</s>"
        assert tokens[0] == ["w0", "w1", "w2", "w30", "w31", end]
        assert tokens[1] == [*words[-7:], "w30", "w31", end]
        assert tokens[2] == [*words[-5:], *words[:4], end]
        assert tokens[3] == [*words[:3], *words[:6], end]
        for ids, labels, prompt_length in zip(data["input_ids"], data["labels"], (3, 7, 5, 3), strict=True):
            assert labels == [-100] * prompt_length + ids[prompt_length:] and labels[-1] == eos
    everything = make_trainer(train_dataset=rows, max_length=10, completion_only_loss=False).train_dataset
    assert everything["labels"] == everything["input_ids"] == trained.train_dataset["input_ids"]


def test_trls_own_truncation_is_still_there(make_trainer, tokenizer):
    rows = Dataset.from_list([{"prompt": "w0 w1 w2", "completion": " w3 w4 w5"}])
    kept = make_trainer(train_dataset=rows, max_length=4, truncation_mode="keep_start").train_dataset["input_ids"]
    assert tokenizer.decode(kept[0]) == "w0 w1 w2 w3"
    text = Dataset.from_list([{"text": "w0 w1 w2 w3 w4"}])
    kept = make_trainer(train_dataset=text, max_length=4).train_dataset["input_ids"]
    assert tokenizer.decode(kept[0]) == "w0 w1 w2 w3"
