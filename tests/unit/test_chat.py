"""Chat templates around prompts: what transformers renders, BOS once, needle prompts of exact length."""

from __future__ import annotations

import re

import pytest

from longext.errors import ConfigError
from longext.evals.base import Work
from longext.evals.suites.needle import Needle
from longext.models.chat import chat_frame, chat_tokens, render_chat, uses_template

WITH_BOS = (  # writes BOS, has a system message, and strips messages, as Llama 3's
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
WITHOUT_BOS = "{% for m in messages %}USER: {{ m['content'] }} ASSISTANT:{% endfor %}"  # as Vicuna's
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + WITHOUT_BOS
TEMPLATES = pytest.mark.parametrize("template", [WITH_BOS, WITHOUT_BOS])


def questions(model, **settings):
    defaults = {"num_trials": 1, "num_needles": 2, "max_new_tokens": 32, "lengths": (500, 601)}
    return Needle(model="m", **{**defaults, **settings}).questions(model, None)


def text_of(model, ids):
    return model.tokenizer.decode(ids, skip_special_tokens=False)


@TEMPLATES
@pytest.mark.parametrize("scoring", ["match", "exact"])
def test_needle_prompts_are_the_rendered_message_and_the_answers_beginning(books, template, scoring):
    books.tokenizer.chat_template = template
    for question in questions(books, scoring=scoring, haystack="noise"):
        prompt = question.prompt
        text = text_of(books, prompt.input_ids)
        start, end = re.search("(A|Some) special magic", text).start(), text.rindex("provided text?")
        end += len("provided text?")
        message = text[start:end]
        rendered = books.tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
        opening = text[end:].partition(rendered.rpartition("provided text?")[2])[2]
        assert opening.startswith(" The special magic") and opening.endswith((" is", " are"))
        bos = "" if template is WITH_BOS else books.tokenizer.decode(list(books.prefix))
        assert text == bos + rendered + opening
        assert prompt.input_ids.count(books.tokenizer.bos_token_id) == 1
        budget = 32 if scoring == "match" else len(prompt.answer_ids)
        assert len(prompt.input_ids) + budget == question.length


@TEMPLATES
def test_the_haystack_gives_room_to_the_template(books, template):
    (plain,) = questions(books, tasks=("single",), lengths=(400,))
    books.tokenizer.chat_template = template
    (chat,) = questions(books, tasks=("single",), lengths=(400,))
    assert len(chat.prompt.input_ids) == len(plain.prompt.input_ids)
    assert chat.prompt.answers == plain.prompt.answers and chat.prompt.answer_ids == plain.prompt.answer_ids
    assert questions(books, tasks=("single",), lengths=(400,), chat_template=False) == [plain]


def test_a_length_too_short_for_the_template_says_what_is_needed(books):
    books.tokenizer.chat_template = "x " * 300 + WITHOUT_BOS
    with pytest.raises(ConfigError, match=r"needs at least \d{3} tokens, got 300"):
        questions(books, lengths=(300,))


@pytest.mark.parametrize("asked", [None, True])
def test_the_record_says_whether_the_template_was_used(books, asked):
    task = Needle(model="m", tasks=("single",), lengths=(256,), num_trials=1, scoring="exact", chat_template=asked)
    books.tokenizer.chat_template = WITH_BOS
    assert task.measure(books, None, Work()).record["protocol"]["chat_template"] is True


def test_a_missing_template_is_refused_only_where_it_is_asked_for(books):
    assert not uses_template(books, None) and not uses_template(books, False)
    with pytest.raises(ConfigError, match="books-5m has no chat template: leave --chat-template out"):
        uses_template(books, True)


@TEMPLATES
def test_tokens_of_a_message_have_one_bos(books, template):
    books.tokenizer.chat_template = template
    ids = chat_tokens(books, " Hello there ")
    assert ids.count(books.tokenizer.bos_token_id) == 1 and ids[0] == books.tokenizer.bos_token_id
    frame = chat_frame(books)
    assert frame.begins == (template is WITH_BOS)
    assert text_of(books, ids).endswith(frame.after)


def test_an_answer_that_is_begun_stays_open(books):
    books.tokenizer.chat_template = WITH_BOS
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "It is"}]
    assert render_chat(books, messages, answer_begun=True) == "<s>[user]\nWhere?</s>[assistant]\nIt is"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "does not write a message once"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages .roles must alternate."),
    ],
)
def test_templates_that_cannot_be_used_are_told(books, template, message):
    books.tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=message):
        chat_frame(books)
