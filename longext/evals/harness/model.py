"""A `LanguageModel` as lm-evaluation-harness asks one: log-probabilities, rolling log-probabilities, greedy answers.

Tokens, windows and truncation are those of the harness's own model for transformers (`HFLM`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from longext.errors import ConfigError, DataError
from longext.models.answer_file import Journal, fingerprint_of, tokens_hash
from longext.models.answers import Prediction, Request, generate_predictions
from longext.models.batching import batch_size, batched_by
from longext.models.chat import render_chat, user_text, with_prefix
from longext.models.protocol import LanguageModel
from longext.models.turns import control_tokens
from longext.processes.dealing import deal, workers_of

_MAX_NEW_TOKENS = 256  # lm-eval's, if a task names none
_KNOWN_SETTINGS = {
    "until",
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
    "do_sample",
    "temperature",
}
Owner = tuple[str, int]  # task, document
Progress = Callable[[int], None]


@dataclass
class Scorer:
    """What a harness asks of a model, through `LanguageModel`.

    Attributes:
        model: what is measured.
        window: tokens the model reads at once; longer inputs lose their beginning. None: it reads any length.
        batch_tokens: tokens of a forward pass.
        on_progress: called with the number of documents just finished.
        expect: told of what is done next, for the cost of the run.
        folder: where answers are kept while the run lasts: one file for each kind of request.
        needs_system: a chat template that refuses system messages is an error; else they are left out, as `HFLM` does.
        is_chat: texts come rendered by the chat template.
        truncated: documents that lost tokens.
        ignored: generation settings of tasks that have no effect here.
        without_system: the chat template refused system messages, and they were left out.
        predictions: the answers generated.
        prompt_hashes: of every input.
        spells_control: a text of a task spells control tokens.
    """

    model: LanguageModel
    window: int | None
    batch_tokens: int | None = None
    on_progress: Progress | None = None
    folder: Path | None = None
    expect: Callable[..., None] = lambda model, prompts, num_new, shares=True: None
    needs_system: bool = False
    is_chat: bool = False
    truncated: set[Owner] = field(default_factory=set)
    ignored: set[str] = field(default_factory=set)
    without_system: bool = False
    predictions: list[Prediction] = field(default_factory=list)
    prompt_hashes: set[str] = field(default_factory=set)
    spells_control: bool = False
    _done: set[Owner] = field(default_factory=set)
    _calls: Counter[str] = field(default_factory=Counter)

    @property
    def prefix(self) -> int:
        """The token before a text that has no context: BOS, else EOS."""
        tokenizer = self.model.tokenizer
        token: int | None = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if token is None:
            raise ConfigError(f"The tokenizer of {self.model.name} has neither BOS nor EOS to put before a text.")
        return token

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return token ids; the tokenizer's prefix in front, but no second one if the text begins with it."""
        ids = self.model.encode(text if self.is_chat else self._written(text), add_bos=False)
        if add_special_tokens is None:
            return with_prefix(self.model, ids)
        return [*self.model.prefix, *ids] if add_special_tokens else ids

    def _written(self, text: str) -> str:
        """Return a text of a task as it goes into a prompt; see `user_text`."""
        text = user_text(self.model, text)
        self.spells_control |= any(token in text for token in control_tokens(self.model.tokenizer))
        return text

    def render(self, messages: list[dict[str, str]], answer_begun: bool) -> str:
        """Return messages in the chat template; see `render_chat`."""
        messages = [{**message, "content": self._written(message["content"])} for message in messages]
        others = [message for message in messages if message["role"] != "system"]
        try:
            return render_chat(self.model, messages, answer_begun=answer_begun)
        except ConfigError:
            if self.needs_system or len(others) == len(messages):
                raise
            self.without_system = True
            return render_chat(self.model, others, answer_begun=answer_begun)

    def log_likelihoods(
        self, pairs: Sequence[tuple[list[int], list[int]]], owners: Sequence[Owner], kind: str = "loglikelihood"
    ) -> list[tuple[float, bool]]:
        """Return, for every (context, continuation) in tokens, its log p and whether greedy decoding gives it.

        Batches depend on all pairs, not on those still open: a run that goes on computes what a whole one does.
        """
        texts = [self._window(*pair, owner) for pair, owner in zip(pairs, owners, strict=True)]
        lengths = [len(continuation) for _, continuation in pairs]
        self.prompt_hashes.update(map(tokens_hash, texts))
        self.expect(self.model, texts, 0, False)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        budget = batch_size(self.batch_tokens, max(map(len, texts), default=1), self.model.device)

        def answer(batch: Sequence[int]) -> list[dict[str, Any]]:
            made = self._score([texts[i] for i in batch], [lengths[i] for i in batch])
            self._finished([owners[i] for i in batch])
            return made

        batches = batched_by(order, budget, lambda i: len(texts[i]))
        names = [str(i) for i in range(len(texts))]
        rows = deal(
            names, list(batches), answer, keeper=self._journal(kind, texts, lengths), workers=workers_of(self.model)
        )
        self._finished(owners)
        return [(float(row["value"]), bool(row["is_greedy"])) for row in rows]

    def _score(self, texts: Sequence[list[int]], lengths: Sequence[int]) -> list[dict[str, Any]]:
        scores = self.model.score(torch.tensor(texts), len(texts[0]) - max(lengths))
        return [
            {"value": -float(nll[-length:].cpu().double().sum()), "is_greedy": bool(is_top1[-length:].all())}
            for nll, is_top1, length in zip(scores.nll, scores.is_top1, lengths, strict=True)
        ]

    def _journal(self, kind: str, texts: Sequence[list[int]], lengths: Sequence[int]) -> Journal | None:
        """Return the file of the scores of a call."""
        path = self._file(kind)
        if path is None:
            return None
        questions = (json.dumps([text, length]) for text, length in zip(texts, lengths, strict=True))

        def check(row: dict[str, Any]) -> tuple[float, bool]:
            return float(row["value"]), bool(row["is_greedy"])

        return Journal(path, fingerprint_of(self.model, questions), check)

    def rolling(self, texts: Sequence[str], owners: Sequence[Owner]) -> list[float]:
        """Return log p of whole texts, cut into windows that do not overlap (a model that reads any length: one)."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs, places = [], []
        for place, text in enumerate(texts):
            tokens = self.encode(text)
            size = self._room or max(1, len(tokens))
            for window in get_rolling_token_windows(tokens, self.prefix, max_seq_len=size, context_len=1):
                pairs.append(make_disjoint_window(window))
                places.append(place)
        totals = [0.0] * len(texts)
        found = self.log_likelihoods(pairs, [owners[place] for place in places], "loglikelihood_rolling")
        for place, (value, _) in zip(places, found, strict=True):
            totals[place] += value
        return totals

    def answers(self, prompts: Sequence[tuple[str, dict[str, Any]]], owners: Sequence[Owner]) -> list[str]:
        """Return the greedy answer to every (prompt, generation settings of its task)."""
        requests: dict[str, Request] = {}
        ids = []
        for (text, settings), owner in zip(prompts, owners, strict=True):
            # repeats of a prompt have one greedy answer
            ids.append(json.dumps([text, settings], sort_keys=True, default=str))
            if ids[-1] not in requests:
                requests[ids[-1]] = self._request(ids[-1], text, settings, owner)
        path = self._file("generate_until")
        asked = list(requests.values())
        self.expect(self.model, [each.input_ids for each in asked], sum(each.max_new_tokens for each in asked))
        made = generate_predictions(self.model, asked, path, self.on_progress, self.batch_tokens, is_chat=None)
        self.predictions += made
        self.prompt_hashes.update(prediction.prompt_sha256 for prediction in made)
        texts = {prediction.id: prediction.text for prediction in made}
        return [texts[id] for id in ids]

    def _file(self, kind: str) -> Path | None:
        """Return the file of the next call of a kind of request."""
        self._calls[kind] += 1
        number = f"-{self._calls[kind]}" if self._calls[kind] > 1 else ""
        return None if self.folder is None else self.folder / f"{kind}{number}.jsonl"

    @property
    def _room(self) -> int | None:
        """Tokens before a predicted one. A RoPE that follows the length sees that one too, and stays in the window."""
        return None if self.window is None else self.window - self.model.follows_length

    def _window(self, context: list[int], continuation: list[int], owner: Owner) -> list[int]:
        tokens, room = context + continuation, self._room
        if not continuation:
            raise DataError(f"{owner[0]}: document {owner[1]} has a choice of no tokens.")
        if room is None or len(tokens) <= room + 1:
            return tokens
        if len(continuation) > room:
            raise DataError(
                f"{owner[0]}: document {owner[1]} has a choice of {len(continuation)} tokens, and the model reads "
                f"{room} at once (--max-length)."
            )
        self.truncated.add(owner)
        return tokens[-(room + 1) :]

    def _request(self, id: str, text: str, settings: dict[str, Any], owner: Owner) -> Request:
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        chosen: dict[str, Any] = dict(normalize_gen_kwargs(settings, _MAX_NEW_TOKENS))
        if chosen["do_sample"]:
            self.ignored.add("sampling")
        self.ignored.update(key for key in settings if key not in _KNOWN_SETTINGS)
        stop = handle_stop_sequences(list(chosen["until"]), self.model.tokenizer.eos_token)
        tokens = self.encode(text) or [self.prefix]
        if self.window is not None:
            room = self.window - chosen["max_gen_toks"]
            if room < 1:
                raise ConfigError(
                    f"{owner[0]} asks for answers of {chosen['max_gen_toks']} tokens, which leaves no room for a "
                    f"prompt in {self.window} (--max-length)."
                )
            if len(tokens) > room:
                self.truncated.add(owner)
                tokens = tokens[-room:]
        return Request(id, tuple(tokens), chosen["max_gen_toks"], stop=tuple(s for s in stop if s))

    def _finished(self, owners: Sequence[Owner]) -> None:
        new = set(owners) - self._done
        self._done |= new
        if new and self.on_progress:
            self.on_progress(len(new))


def harness_model(scorer: Scorer) -> Any:
    """Return lm-eval's model object around `scorer`."""
    from lm_eval.api.model import TemplateLM

    class _Model(TemplateLM):  # type: ignore[misc]
        tokenizer = scorer.model.tokenizer
        eot_token_id = tokenizer.eos_token_id
        tokenizer_name = scorer.model.name  # names lm-eval's cache of prompts, which is not used
        prefix_token_id = property(lambda self: scorer.prefix)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return scorer.encode(string, add_special_tokens)

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return scorer.render(chat_history, answer_begun=not add_generation_prompt)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self.owners = _owners(requests)
            result: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            return result

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return scorer.log_likelihoods([(context, tokens) for _, context, tokens in requests], self.owners)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return scorer.rolling([request.args[0] for request in requests], _owners(requests))

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return scorer.answers([request.args for request in requests], _owners(requests))

    return _Model()


def _owners(requests: Any) -> list[Owner]:
    return [(request.task_name, request.doc_id) for request in requests]
