"""Passkey prompts to the token, and the one-pass score against real greedy decoding."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from extensions import books_config

from longext.errors import ConfigError
from longext.evals.passkey import Prompts, Trial, accuracy_by_length, evaluate_passkey
from longext.evals.passkey_prompts import (
    FILLER,
    NAMES,
    QUESTION,
    TASK,
    PromptTokens,
    draw_keys,
    exact_prompt,
    longlora_prompt,
    published_text,
    yarn_prompt,
)
from longext.evals.suites.passkey import Passkey


@pytest.fixture
def tokens(books):
    return PromptTokens(lambda text: books.encode(text, add_bos=False), books.prefix)


@pytest.fixture
def filler(books):
    return Prompts(books, Passkey(model="books-5m", lengths=(2048,))).filler


@pytest.mark.parametrize("length", [128, 511, 512, 2048])
@pytest.mark.parametrize("depth", [0.0, 0.33, 1.0])
@pytest.mark.parametrize("num_needles", [1, 3])
def test_prompts_have_exactly_the_length_asked_for(tokens, filler, length, depth, num_needles):
    if num_needles == 3 and length == 128:
        pytest.skip("three needles need more room")
    prompt = exact_prompt(tokens, filler, length=length, depth=depth, seed=3, num_needles=num_needles)
    assert len(prompt.input_ids) + len(prompt.answer_ids) == length


def test_prompt_text_is_the_landmark_prompt_with_the_needle_at_its_depth(books, tokens, filler):
    prompt = exact_prompt(tokens, filler, length=400, depth=0.5, seed=0)
    text = books.decode(prompt.input_ids)
    assert prompt.input_ids[0] == books.tokenizer.bos_token_id
    assert text.startswith(f"{TASK}\n{FILLER}")
    assert text.endswith(f"\n{QUESTION}")
    needle = f"\nThe pass key is {prompt.key}. Remember it. {prompt.key} is the pass key.\n"
    assert text.count(needle) == 1
    assert 0.35 < text.index(needle) / len(text) < 0.6
    assert books.decode(prompt.answer_ids) == f" {prompt.key}"
    assert 10_000 <= prompt.key <= 99_999


def test_several_needles_name_their_owners_and_ask_for_one(books, tokens, filler):
    prompt = exact_prompt(tokens, filler, length=800, depth=0.0, seed=0, num_needles=4)
    text = books.decode(prompt.input_ids)
    told = dict(re.findall(r"The pass key of (\w+) is (\d+)\.", text))
    asked = re.search(r"What is the pass key of (\w+)\?", text)
    assert len(told) == 4
    assert set(told) <= set(NAMES)
    assert asked is not None
    assert told[asked.group(1)] == str(prompt.key)


def test_prompts_are_seeded_and_differ_by_seed(tokens, filler):
    def key(seed):
        return exact_prompt(tokens, filler, length=256, depth=0.5, seed=seed).key

    assert key(1) == key(1)
    assert len({key(seed) for seed in range(10)}) == 10


def test_keys_have_a_fixed_number_of_digits_and_differ():
    keys = draw_keys(np.random.default_rng(0), 9, 2)
    assert len(set(keys)) == 9
    assert all(10 <= key <= 99 for key in keys)


def test_longlora_prompt_is_as_published(books, tokens):
    prompt = longlora_prompt(tokens, length=2000, seed=4)
    rng = np.random.RandomState(4)
    prefix, key = int(rng.randint(0, 7168)), int(rng.randint(1, 50_000))  # int(3.75 * 2000 // 1024 * 1024) = 7168
    assert books.decode(prompt.input_ids) == published_text(7168, prefix, key)
    assert prompt.key == key


def test_yarn_prompt_is_the_longest_in_steps_of_128_characters(books, tokens):
    prompt = yarn_prompt(tokens, length=700, seed=1)
    text = books.decode(prompt.input_ids)
    lines = text.split("\n")
    assert (len(lines[1]) + len(lines[3])) % 128 == 0
    assert 700 - 64 < len(prompt.input_ids) <= 700


def test_too_short_a_length_says_what_is_needed(tokens, filler):
    with pytest.raises(ConfigError, match="needs at least"):
        exact_prompt(tokens, filler, length=70, depth=0.5, seed=0)


@pytest.mark.parametrize("method", ["none", "yarn", "dynamic"])
def test_one_pass_accuracy_is_greedy_decoding(books, method):
    """The score of prompt + answer equals generating the answer's tokens one by one."""
    books.set_rope(books_config(method, 8.0 if method != "none" else 1.0))
    config = Passkey(model="books-5m", lengths=(400, 700), depths=(0.2, 0.9), num_trials=3)
    asked = Prompts(books, config)
    for cell in evaluate_passkey(books, config):
        prompts = [asked.make(Trial(cell["length"], cell["depth"], seed)) for seed in range(3)]
        decoded = [books.greedy(p.input_ids, len(p.answer_ids)) for p in prompts]
        assert cell["num_correct"] == sum(d == list(p.answer_ids) for d, p in zip(decoded, prompts, strict=True))
        assert cell["num_tokens"] == cell["length"]


def test_the_bundled_model_knows_the_task_inside_its_window(books):
    cells = evaluate_passkey(books, Passkey(model="books-5m", lengths=(384,), num_trials=2))
    assert accuracy_by_length(cells)[0]["accuracy"] == 1.0


@pytest.mark.parametrize("protocol", ["longlora", "yarn"])
def test_published_protocols_run_and_report_the_measured_length(books, protocol):
    config = Passkey(model="books-5m", lengths=(400,), num_trials=3, protocol=protocol)
    (cell,) = evaluate_passkey(books, config)
    assert cell["depth"] is None
    assert cell["num_trials"] == 3
    assert cell["num_correct"] == 3
    assert 250 < cell["num_tokens"] < 420


@pytest.mark.parametrize("num_prompt", [505, 700])
def test_dynamic_generation_has_one_rotation_throughout(books, num_prompt):
    """Cached decoding equals one pass over prompt + output, also where the prompt alone fits the trained window."""
    books.set_rope(books_config("dynamic", 8.0))
    prompt = [(7 * i) % 8000 + 3 for i in range(num_prompt)]
    tokens = books.greedy(prompt, 12)
    assert len(tokens) == 12
    one_pass = books.score(torch.tensor([[*prompt, *tokens]]), num_prompt)
    assert one_pass.is_top1.all()
    books.score(torch.tensor([prompt[:400]]), 1)  # and the model is back to normal afterwards
    assert books.model.model.rotary_emb.rope_type == "dynamic"


def test_the_filler_is_long_enough_where_a_tokenizer_adds_a_token_per_call(books, monkeypatch):
    """Llama-2's fast tokenizer puts a prefix token before every text."""
    plain = books.encode
    monkeypatch.setattr(books, "encode", lambda text, *, add_bos=True: [5, *plain(text, add_bos=add_bos)])
    config = Passkey(model="books-5m", lengths=(8192,))
    assert len(Prompts(books, config).filler) >= 8192
