"""Rows that a tokenizer or its chat template does not take are told by their number; it costs no base model."""

import pytest
from datasets import Dataset
from tiny import make_chat_tokenizer, make_tokenizer, tiny_args

from lori_trl.training.tokenizer_checks import check_tokenizer, tokenizer_as_trained

TALK = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
ODD = [{"role": "narrator", "content": "w1"}, TALK[1]]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": TALK}] * 3 + [{"messages": ODD}],
        [{"prompt": TALK[:1], "completion": TALK[1:]}] * 3 + [{"prompt": ODD[:1], "completion": ODD[1:]}],
        [{"prompt": TALK[:1], "completion": TALK[1:]}] * 3 + [{"prompt": TALK[:1], "completion": ODD[:1]}],
    ],
)
def test_a_role_that_the_template_refuses(rows, streaming, make_trainer):
    rows = Dataset.from_list(rows)
    rows = rows.to_iterable_dataset() if streaming else rows
    tokenizer = make_chat_tokenizer()
    with pytest.raises(
        ValueError, match="Row 3 of `d.jsonl` does not go through .*unknown role narrator.*Correct the"
    ):
        check_tokenizer(rows, tokenizer, "d.jsonl")
    with pytest.raises(ValueError, match="Row 3 of `train_dataset` does not go through the chat template"):
        make_trainer(train_dataset=rows, processing_class=tokenizer)


def test_of_rows_that_are_alike_one_is_rendered(monkeypatch):
    tokenizer, rendered = make_chat_tokenizer(), []
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda messages, **_: rendered.append(messages))
    short, empty = TALK[:1], [{"role": "user", "content": ""}]
    check_tokenizer(
        Dataset.from_list([{"messages": each} for each in (TALK, TALK, short, empty, short)]), tokenizer, ""
    )
    assert rendered == [TALK, short, empty]


def test_rows_that_are_right(make_trainer):
    tools = {"tools": "[]", "chat_template_kwargs": {"thinking": False}}
    for row in ({"messages": TALK, **tools}, {"prompt": TALK[:1], "completion": TALK[1:]}, {"text": "w1"}):
        rows = Dataset.from_list([row] * 4)
        check_tokenizer(rows, make_chat_tokenizer(), "d.jsonl")
        make_trainer(train_dataset=rows, processing_class=make_chat_tokenizer())
    check_tokenizer(Dataset.from_list([{"input_ids": [1]}]), make_tokenizer(), "d.jsonl")


def test_messages_without_a_template():
    with pytest.raises(ValueError, match="has no chat template, and `d.jsonl` has messages.*--chat_template_path"):
        check_tokenizer(Dataset.from_list([{"messages": TALK}]), make_tokenizer(), "d.jsonl")


@pytest.mark.parametrize("row", [{"text": "w1"}, {"prompt": "w1", "completion": "w2"}])
def test_text_without_an_eos_token(row, make_trainer, tmp_path):
    tokenizer = make_chat_tokenizer()
    tokenizer.eos_token = None
    rows = Dataset.from_list([row] * 4)
    with pytest.raises(ValueError, match="has no EOS token.*--eos_token"):
        make_trainer(train_dataset=rows, processing_class=tokenizer)
    check_tokenizer(rows, tokenizer_as_trained(tokenizer, tiny_args(tmp_path, eos_token="</s>")), "d.jsonl")
    make_trainer(train_dataset=rows, processing_class=tokenizer, eos_token="</s>")
    check_tokenizer(Dataset.from_list([{"messages": TALK}]), make_chat_tokenizer(), "d.jsonl")


def test_a_run_brings_its_own_template(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['role'] }}")
    make_chat_tokenizer().save_pretrained(tmp_path / "chat")
    by_file, by_model = (
        tokenizer_as_trained(make_tokenizer(), tiny_args(tmp_path, chat_template_path=str(tmp_path / name)))
        for name in ("mine.jinja", "chat")
    )
    assert by_file.chat_template == "{{ messages[0]['role'] }}"
    assert by_model.chat_template == make_chat_tokenizer().chat_template


def test_the_assistants_words_alone_need_a_template_that_marks_them(tmp_path):
    tokenizer = make_chat_tokenizer()
    args = tiny_args(tmp_path, assistant_only_loss=True)
    with pytest.raises(ValueError, match="has no {% generation %}.*chat_template.jinja|chat_template.jinja` has no"):
        tokenizer_as_trained(tokenizer, args)
    content = "{{ m['content'] }} </s> "
    marked = tokenizer.chat_template.replace(content, f"{{% generation %}}{content}{{% endgeneration %}}")
    (tmp_path / "marked.jinja").write_text(marked)
    args.chat_template_path = str(tmp_path / "marked.jinja")
    assert tokenizer_as_trained(tokenizer, args).chat_template == marked
    args.chat_template_path = str(tmp_path / "bare.jinja")
    (tmp_path / "bare.jinja").write_text(tokenizer.chat_template)
    with pytest.raises(ValueError, match=r"bare.jinja` has no \{% generation %\}.*Copy the file"):
        tokenizer_as_trained(tokenizer, args)
