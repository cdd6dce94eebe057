"""Conversations: every turn costs its own tokens, answers stream as they are, rows answer as each alone would."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import shutil
from unittest import mock

import pytest
import torch
from families import tiny_model

from longext.compressor.backbone import Backbone
from longext.compressor.base import build_compressor
from longext.compressor.checkpoint import find_base, save_compressor
from longext.compressor.config import GenerateConfig, MemoryConfig
from longext.compressor.reading import readers
from longext.compressor.reading.continuing import Choice
from longext.compressor.reading.memory_file import describe_memory
from longext.compressor.reading.window import WindowSession
from longext.compressor.spec import CompressorSpec
from longext.compressor.writing import opening
from longext.compressor.writing.conversation import Conversation, Writing
from longext.compressor.writing.generation import open_writer
from longext.compressor.writing.opening import Opened, open_text
from longext.compressor.writing.pieces import TextStream
from longext.errors import CheckpointError, ConfigError
from longext.models.chat import template_turns
from longext.models.methods import remap_request

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
SPEC = CompressorSpec(segment=32, ratios=(4, 8), rank=4, alpha=8)
SPECS = ("thinned:8", "h2o:16", "attention-matching:16", "ada-snapkv:16", "streaming:4+16")
STORY = "The keeper climbed the stairs every night and looked out over the sea. " * 14
QUESTIONS = ["Who climbed?", "What did the keeper look at, and when?", "Where"]


@pytest.fixture(scope="module", autouse=True)
def one_loading(loaded_books):
    """books-5m is loaded once: nothing here changes it."""
    with contextlib.ExitStack() as stack:
        for module in (opening, readers):
            stack.enter_context(mock.patch.object(module, "load_language_model", lambda *_: copy.copy(loaded_books)))
        yield


@pytest.fixture(scope="module")
def uio(tmp_path_factory):
    """The directory of an untrained compressor on books-5m."""
    opened = open_text(MemoryConfig(model="books-5m", device="cpu"))
    torch.manual_seed(0)
    compressor = build_compressor(
        Backbone(opened.model.model), CompressorSpec(segment=32, ratios=(4, 8), rank=4, alpha=8)
    )
    directory = tmp_path_factory.mktemp("uio")
    save_compressor(directory, compressor, find_base("books-5m"))
    return str(directory)


def opened(spec, uio, **more):
    """What `--memory SPEC` opens on books-5m; "" is a plain window, "uio" the compressor."""
    if spec == "uio":
        return open_text(MemoryConfig(model=uio, device="cpu", **more))
    segment = 32 if spec else None
    return open_text(MemoryConfig(model="books-5m", device="cpu", memory=spec or None, segment=segment, **more))


def window(books, **more):
    return Conversation(Opened(books, WindowSession(books)), **more)


def rendered(books, messages, **more):
    text = books.tokenizer.apply_chat_template(messages, tokenize=False, **more)
    return books.encode(text, add_bos=False)


# --- a plain window ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("method", [None, "leaky-rerope:window=64:factor=4"])
def test_a_text_in_parts_is_the_text_at_once_and_each_token_is_read_once(books, method):
    if method:
        books.remap(remap_request(method))
    ids = books.encode(STORY)[:200]
    session = WindowSession(books)
    for part in (ids[:90], ids[90:91], ids[91:150], ids[150:]):
        session.absorb(part)
        torch.testing.assert_close(
            session.logits(), books.model(torch.tensor([ids[: session.num_tokens]])).logits[0, -1], rtol=0, atol=2e-4
        )
    assert session.num_computed == len(ids)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "gemma3", "qwen3"])
def test_every_kind_of_cache_goes_on_and_back(books, family):
    """Sliding windows cannot be cut once they have dropped something: the text is read again."""
    books.model = tiny_model(family).eval()
    rows = books.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(3, rows, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    session = WindowSession(books)
    session.absorb(ids[:20])
    with session.snapshot():
        session.absorb(ids[5:15])
        session.logits()
    session.absorb(ids[20:])
    expected = books.model(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(session.logits(), expected, rtol=0, atol=2e-4)
    with session.rows(2):
        session.absorb(torch.tensor([ids[:3], ids[3:6]]))
        both = session.next_logits()
    for row, more in enumerate((ids[:3], ids[3:6])):
        expected = books.model(torch.tensor([[*ids, *more]])).logits[0, -1]
        torch.testing.assert_close(both[row], expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(session.logits(), books.model(torch.tensor([ids])).logits[0, -1], rtol=0, atol=2e-4)


def test_turns_are_what_the_template_renders_and_cost_their_own_tokens(books):
    books.tokenizer.chat_template = TEMPLATE
    talk = window(books, system="Be kind.", writing=Writing(max_new_tokens=7))
    messages = [{"role": "system", "content": "Be kind."}]
    for question in QUESTIONS:
        before = talk.text.num_computed
        answer = talk.ask(question)
        assert talk.text.num_computed - before <= answer.num_read + 7 - (before and before - 1)
        messages += [{"role": "user", "content": question}]
        known = rendered(books, messages, add_generation_prompt=True)
        assert talk.text._ids[0, : answer.num_read].tolist() == known
        assert talk.text._ids[0, answer.num_read :].tolist() == list(answer.tokens)
        messages += [{"role": "assistant", "content": answer.text}]
    assert talk.messages == messages[1:]
    assert talk.text.num_computed == talk.text.num_tokens - 1  # the last token waits for the next turn


def test_a_document_a_question_and_an_earlier_answer_are_one_text(books):
    books.tokenizer.chat_template = TEMPLATE
    talk = window(books)
    talk.read("The sea is deep.", "sea.txt")
    talk.read("The sky is high.")
    talk.add("user", "What is deep?")
    talk.add("assistant", "The sea.")
    talk.ask("And high?", max_new_tokens=1)
    asked = "The sea is deep.\n\nThe sky is high.\n\nWhat is deep?"
    whole = f"<s>[user] {asked}</s>\n[assistant] The sea.</s>\n[user] And high?</s>\n[assistant] "
    assert books.tokenizer.decode(talk.text._ids[0, :-1].tolist()) == whole
    assert [one["name"] for one in talk.opened.documents] == ["sea.txt", "text"]
    with pytest.raises(ConfigError, match="cannot stand here"):
        talk.add("assistant", "Again.")


def test_a_model_without_a_template_talks_plainly_and_says_so(books):
    talk = window(books)
    assert "no chat template: plain turns" in talk.take_notes()[0] and not talk.take_notes()
    talk.ask("Who are you?", max_new_tokens=40)
    assert "User:" not in talk.answer.text
    talk.ask("Where?", max_new_tokens=1)
    text = books.tokenizer.decode(talk.text._ids[0, 1:-1].tolist())
    assert text.startswith("User: Who are you?\nAssistant:") and text.endswith("\nUser: Where?\nAssistant:")
    assert text.count("User:") == 2


def test_a_template_that_drops_or_trims_is_told(books):
    books.tokenizer.chat_template = "{% for m in messages %}{{ loop.index }} {{ m['content'] }}</s>{% endfor %}"
    assert not template_turns(books).is_exact
    assert any("stay as they were" in note for note in window(books).take_notes())
    books.tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(ConfigError, match="does not write each message once"):
        window(books)


# --- full -------------------------------------------------------------------------------------------------------------


def test_a_full_window_forgets_its_oldest_turns_and_reads_the_rest_again(books):
    books.tokenizer.chat_template = TEMPLATE
    talk = window(books, writing=Writing(max_new_tokens=30))
    for number in range(30):
        talk.ask(f"Question {number}: {STORY[:180]}")
        notes = talk.take_notes()
        if notes:
            break
    assert "window is full: the first" in notes[0] and "are read again" in notes[0]
    kept = talk.messages
    assert 2 <= len(kept) < 2 * number and kept[-2]["content"].startswith(f"Question {number}")
    first = rendered(books, kept[:-1], add_generation_prompt=True)
    assert talk.text._ids[0, : talk.answer.num_read].tolist() == first
    assert talk.text.num_tokens <= talk.text.limit == 512


def test_a_window_that_may_not_forget_refuses_and_goes_on(books):
    talk = window(books, when_full="refuse")
    talk.read(STORY[:900])
    before = talk.text.num_tokens
    with pytest.raises(ConfigError, match="exceed the 512 positions"):
        talk.ask(STORY * 3)
    assert (talk.text.num_tokens, talk.state) == (before, "user")
    assert talk.ask("Who?", max_new_tokens=3).tokens
    with pytest.raises(ConfigError, match="cannot be thinned"):
        window(books, when_full="thin")


def test_an_answer_ends_where_the_window_does(books):
    talk = window(books, when_full="refuse", writing=Writing(max_new_tokens=500))
    while talk.text.num_tokens < 440:
        talk.read(STORY[:140])
    talk.ask("Go on", temperature=3.0)
    assert talk.text.num_tokens == 512
    assert "the answer ends here" in talk.take_notes()[-1]


# --- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["", "uio"])
def test_pieces_are_the_answer_and_nobody_listening_ends_it(books, uio, spec):
    talk = Conversation(opened(spec, uio), writing=Writing(max_new_tokens=16))
    talk.read(STORY[:150])
    whole = talk.ask_all(["What then?"])[0]
    stream = talk.stream("What then?")
    first = next(stream)
    stream.close()
    assert whole.text.startswith(first) and talk.messages[-1]["content"] == talk.answer.text
    assert len(talk.answer.tokens) < len(whole.tokens)
    again = list(talk.stream("What then?"))
    assert "".join(again) == talk.answer.text and len(again) > 3
    told = []
    for piece in talk.stream("More?", is_stopped=lambda: len(told) > 2):
        told.append(piece)
    assert "".join(told) == talk.answer.text and len(talk.answer.tokens) < 16


@pytest.mark.parametrize("spec", ["", "uio", "snapkv:64"])
def test_a_stop_string_across_tokens_ends_text_and_memory(books, uio, spec):
    """What was generated behind it is undone: the next turn is as if the answer had been given."""
    talk = Conversation(opened(spec, uio), writing=Writing(max_new_tokens=24))
    talk.read(STORY[:150])
    free = talk.ask_all(["What then?"])[0]
    words = free.text.split()
    stop = f"{words[3][-2:]} {words[4][:1]}"  # in the middle of words, over a space
    pieces = list(talk.stream("What then?", stop=(stop, "never said")))
    expected = free.text[: free.text.index(stop)]
    assert "".join(pieces) == talk.answer.text == expected
    assert talk.ask_all(["A"], stop="\u20ac", max_new_tokens=2)  # one alone may be given as text
    other = Conversation(opened(spec, uio))
    other.read(STORY[:150])
    other.text.absorb(other._user_ids("What then?", other.turns.after))
    other.text.absorb(_tokens_of(talk, expected))
    assert talk.text.num_tokens == other.text.num_tokens
    torch.testing.assert_close(talk.text.logits(), other.text.logits(), rtol=0, atol=2e-3)


def _tokens_of(talk, text):
    """The generated tokens whose text is within `text`, and the rest of it in new ones."""
    tokens = list(talk.answer.tokens)
    while not text.startswith(talk.model.decode(tokens)):
        tokens.pop()
    return [*tokens, *talk.model.encode(text[len(talk.model.decode(tokens)) :], add_bos=False)]


@pytest.mark.parametrize("stop", ["STOP", "S\u00e9a", "\U0001f600!", "aab"])
def test_stop_strings_are_found_wherever_tokens_end(books, stop):
    text = f"A caf\u00e9 S and ST and \U0001f600 aaab SSTO {stop} and behind {stop}"
    said: list[str] = []
    stream = TextStream(books, said.append, stop=(stop, "x" * 50))
    for token in books.encode(text, add_bos=False):
        if stream.add(token):
            break
    stream.end()
    assert "".join(said) == stream.text == text.partition(stop)[0]
    assert not any("\ufffd" in piece for piece in said)
    rest = TextStream(books, stop=(f"{stop} and behind {stop}?",))  # its beginning is there, its end is not
    for token in books.encode(text, add_bos=False):
        rest.add(token)
    rest.end()
    assert rest.text == text and not rest.is_over


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "temperature"), [("", 0.0), ("", 0.7), ("uio", 0.7), ("attention-matching:48", 0.0), ("window:64", 0.0)]
)
def test_several_questions_at_once_are_each_asked_alone(uio, spec, temperature):
    """Of different lengths, over the end of a segment, and each drawing as it would alone."""
    talk = Conversation(opened(spec, uio), writing=Writing(max_new_tokens=12, temperature=temperature, seed=3))
    talk.read(STORY[:240])
    before = talk.text.num_tokens
    together = talk.ask_all(QUESTIONS)
    assert (talk.text.num_tokens, talk.state) == (before, "user")
    alone = [talk.ask_all([question])[0] for question in QUESTIONS]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert talk.ask(QUESTIONS[1]).tokens == alone[1].tokens
    assert [one.num_read for one in together] == [one.num_read for one in alone]


# --- on disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["uio", *SPECS])
def test_a_file_read_back_is_the_session_that_stayed(uio, spec, tmp_path):
    path = tmp_path / "a.memory"
    stayed = opened(spec, uio)
    stayed.text.absorb(stayed.model.encode(STORY[:200]))
    stayed.save(path)
    back = open_text(MemoryConfig(memory=str(path), device="cpu"))
    assert back.text.num_tokens == stayed.text.num_tokens and back.text.facts() == stayed.text.facts()
    more = stayed.model.encode(STORY[:150], add_bos=False)  # what goes on evicts and compresses further
    for text in (stayed.text, back.text):
        text.absorb(more)
    assert torch.equal(stayed.text.logits(), back.text.logits())
    assert stayed.text.generate(10) == back.text.generate(10)
    again = tmp_path / "b.memory"
    back.save(again)
    assert describe_memory(again).origin == describe_memory(path).origin


@pytest.mark.parametrize("spec", ["uio", "snapkv:64"])
def test_a_long_text_takes_bounded_bytes(uio, spec, tmp_path):
    sizes = []
    for times in (3, 5):
        one = opened(spec, uio)
        one.text.absorb(one.model.encode(STORY * times))
        one.save(tmp_path / f"{times}.memory")
        sizes.append((one.text.facts()["num_bytes"], (tmp_path / f"{times}.memory").stat().st_size))
    window = 512 * 4 * 2 * 2 * 64 * 4  # positions, layers, keys and values, heads, width, float32
    assert all(num_bytes <= window and size < window + 2**16 for num_bytes, size in sizes)


def test_a_conversation_goes_on_from_its_file(books, uio, tmp_path):
    talk = Conversation(opened("uio", uio), writing=Writing(max_new_tokens=9))
    talk.read(STORY, "story.txt")
    talk.ask("Who climbed?")
    talk.save(tmp_path / "a.memory")
    back = Conversation(open_text(MemoryConfig(memory=str(tmp_path / "a.memory"), device="cpu")))
    assert back.state == talk.state and back.opened.documents[0]["name"] == "story.txt"
    assert back.ask("And then?", max_new_tokens=9).tokens == talk.ask("And then?").tokens
    with pytest.raises(ConfigError, match="has begun"):
        Conversation(open_text(MemoryConfig(memory=str(tmp_path / "a.memory"), device="cpu")), system="Be kind.")


def writer(**settings):
    return open_writer(GenerateConfig(device="cpu", **settings))


def test_generate_asks_the_next_question_of_a_conversation(books, uio, tmp_path, monkeypatch):
    books.tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(readers, "load_language_model", lambda *_: copy.copy(books))
    talk = Conversation(opened("thinned:8", uio))
    talk.read(STORY)
    talk.ask("Who climbed?", max_new_tokens=3)
    path = str(tmp_path / "a.memory")
    talk.save(path)
    one = writer(memory=path, prompt="Where?", max_new_tokens=5)
    one.read(lambda amount: None)
    assert one.write(lambda piece: None).tokens == talk.ask("Where?", max_new_tokens=5).tokens
    assert writer(memory=path).num_unread == 0  # no question: the answer goes on
    books.tokenizer.chat_template = None
    assert writer(memory=path, prompt="Where?").num_unread == len(books.encode("Where?", add_bos=False))


def test_a_compressor_that_moved_may_have_an_at_in_its_name(uio, tmp_path):
    shutil.copytree(uio, tmp_path / "u@h")
    one = open_text(MemoryConfig(model=str(tmp_path / "u@h"), device="cpu"))
    one.text.absorb(range(3, 80))
    one.text.save(tmp_path / "a.memory")
    path, moved = str(tmp_path / "a.memory"), str(shutil.move(tmp_path / "u@h", tmp_path / "moved"))
    back = open_text(MemoryConfig(model=moved, memory=path, device="cpu"))
    back.save(tmp_path / "b.memory")  # names the place where it lies now
    assert open_text(MemoryConfig(memory=str(tmp_path / "b.memory"), device="cpu")).text.num_tokens == 77
    with pytest.raises(CheckpointError, match="u@h, which is not there"):
        writer(memory=path, prompt="a")
    # what there is no room for is told before anything is written
    with pytest.raises(ConfigError, match="--when-full thin"):
        writer(model=moved, prompt="a", max_new_tokens=10**4, when_full="refuse")


def test_positions_are_those_that_the_next_token_sees(uio):
    """Memories inside the overlap take none."""
    for spec, held in (("uio", 1 + 3 * 32 // 4), ("thinned:8+32", 1 + 2 * 32 // 8 + 32), ("", 96)):
        text = opened(spec, uio).text
        text.absorb(range(3, 3 + 3 * 32 + 5))
        text.logits()
        assert text.positions() == (held + 5, 512)
        decoder = getattr(text, "_decoder", None)
        assert decoder is None or decoder.length == held + 5


def test_what_no_file_stands_for_is_refused(uio, tmp_path):
    for spec, text in (
        ("", "window is no memory"),
        ("window:64", "no keys or values"),
        ("snapkv-aware:64", "question"),
    ):
        with pytest.raises(ConfigError, match=text):
            opened(spec, uio).save(tmp_path / "a.memory")
    assert not list(tmp_path.iterdir())
    one = opened("thinned:8", uio)
    one.model.adapter = {"base": "m"}
    with pytest.raises(ConfigError, match="merge it"):  # before documents are read
        one.check_saving()
    with pytest.raises(ConfigError, match="--method selfextend moves positions"):
        opened("thinned:8", uio, method="selfextend", factor=4.0)


def test_a_file_for_another_model_or_damaged_is_one_line(uio, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "a.memory"
    one = opened("h2o:48", uio)
    one.text.absorb(one.model.encode(STORY))
    one.text.origin = dataclasses.replace(one.find_origin(), weights="0-0")
    one.text.save(path)
    with pytest.raises(CheckpointError, match="another base model"):
        open_text(MemoryConfig(memory=str(path), device="cpu"))
    one.text.origin = one.find_origin()
    one.text.trail.layers[1].notes = {"count": torch.tensor(3.0), "sum": torch.ones(1, 2, 4)}
    one.text.save(path)
    notes = open_text(MemoryConfig(memory=str(path), device="cpu")).text.trail.layers[1].notes
    assert notes["count"] == 3 and torch.equal(notes["sum"], torch.ones(1, 2, 4))
    with pytest.raises(ConfigError, match="leave --when-full out"):
        open_text(MemoryConfig(memory=str(path), when_full="thin", device="cpu"))
    with pytest.raises(ConfigError, match="written with --segment 32"):
        open_text(MemoryConfig(memory=str(path), segment=64, device="cpu"))
    with safe_open(path, "pt") as file:
        said, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    breaks = {
        "held.keys.1": tensors["held.keys.1"] * float("nan"),
        "held.values.0": tensors["held.values.0"][..., :3].contiguous(),
        "origins.2": tensors["origins.2"] + 10**6,
        "kept.sum.0": tensors["kept.sum.0"][..., 1:].contiguous(),
        "held.bias.0": torch.full(tensors["held.keys.0"].shape[:-1], float("inf")),
        "origins.0": tensors["origins.0"].where(tensors["origins.0"] > 0, -1),  # a hole that nothing hides
        "held.keys.9": tensors["held.keys.1"].clone(),
        "tail": tensors["tail"][1:],
    }
    for name, tensor in breaks.items():
        save_file({**tensors, name: tensor}, path, said)
        with pytest.raises(CheckpointError, match="damaged"):
            open_text(MemoryConfig(memory=str(path), device="cpu"))
    save_file({**tensors, "tail": torch.full_like(tensors["tail"], -1)}, path, said)  # a compressor's token alone
    with pytest.raises(ConfigError, match="Token id -1"):
        open_text(MemoryConfig(memory=str(path), device="cpu"))


def test_rows_draw_as_their_choice_says(books):
    session = WindowSession(books)
    session.absorb(books.encode("The old man"))
    with session.snapshot(), session.rows(2):
        steps = list(session.steps([[], []], 6, Choice(2.0, 0.9, 5)))
    assert len(steps) == 6 and all(a == b for a, b in steps)
