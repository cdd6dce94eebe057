"""The right answer ranked among wrong ones by likelihood: a score above chance for models that cannot answer yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from longext.evals.base import Advance, silent
from longext.evals.limits import ALL
from longext.evals.views import PROMPT, Detail, Lines

if TYPE_CHECKING:
    from longext.models.protocol import LanguageModel

Group = tuple[str, int, float | None]  # task, length, depth
Groups = list[tuple[Group, list[Any]]]
_OPEN = ("", "(", "[", "<")  # what stands right before an answer
DEFINITION = (
    "each right answer is ranked among wrong ones by the log-likelihood of its tokens behind the prompt; score: the "
    "share of the right answers that all wrong ones are below (chance: 1 / number of candidates, for a model that "
    "does not read the text); beats: the share of the wrong answers below a right one (chance: 1/2); ties count half"
)


@dataclass(frozen=True)
class Choices:
    """Candidates for the answer to a question.

    Attributes:
        input_ids: the prompt, up to where an answer begins.
        right, wrong: the tokens of each candidate.
    """

    input_ids: tuple[int, ...]
    right: tuple[tuple[int, ...], ...]
    wrong: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Rank:
    """How the right answers of a question are ranked.

    Attributes:
        score: share of them that are first.
        beats: mean share of the wrong ones that are below them.
        place: mean place among the candidates, from 1.
        num_candidates: one right answer and the wrong ones.
    """

    task: str
    length: int
    depth: float | None
    score: float
    beats: float
    place: float
    num_candidates: int
    num_tokens: int


def choices_of(
    encode: Callable[[str], list[int]],
    prompt: Callable[[str], Sequence[int]],
    opening: str,
    right: Sequence[str],
    wrong: Sequence[str],
) -> Choices:
    """Return candidates behind a prompt whose answer begins with `opening`.

    White space between them goes with the candidate, as tokenizers have it.

    Args:
        encode: tokens of a text, without special ones.
        prompt: beginning of the answer -> tokens of the whole prompt.
    """
    begun = opening.rstrip()
    space = opening[len(begun) :] or (" " if begun[-1:] not in _OPEN else "")
    input_ids = tuple(prompt(begun))
    right_ids, wrong_ids = (
        [_behind(encode, f"{space}{text}", bool(begun)) for text in texts] for texts in (right, wrong)
    )
    return Choices(input_ids, tuple(right_ids), tuple(wrong_ids))


def _behind(encode: Callable[[str], list[int]], text: str, continues: bool) -> tuple[int, ...]:
    """Return the tokens of a text as they are behind another, where a tokenizer marks beginnings otherwise."""
    if continues:
        word, full = encode("a"), encode(f"a{text}")
        if full[: len(word)] == word:
            return tuple(full[len(word) :])
    return tuple(encode(text))


def rank_questions(model: LanguageModel, questions: Sequence[Any], advance: Advance = silent) -> list[Rank]:
    """Return the ranks of every question that has choices."""
    from longext.models.answer_file import kept_scores
    from longext.models.continuations import Continuations
    from longext.processes.dealing import deal, workers_of

    asked = [question for question in questions if question.choices is not None]
    names, keeper = kept_scores(model, "continuations", [astuple(question.choices) for question in asked])
    reader = Continuations(model)
    stretches = reader.stretches([question.choices.input_ids for question in asked])

    def answer(batch: Sequence[int]) -> list[dict[str, Any]]:
        first = asked[0].choices  # one question decides for all, in whatever process and order they are asked
        reader.decide(first.input_ids, [*first.right, *first.wrong])
        reader.forget()  # what a stretch gives depends on it alone
        choices = (asked[number].choices for number in batch)
        return [{"nll": reader.nll(each.input_ids, [*each.right, *each.wrong])} for each in choices]

    rows = deal(names, stretches, answer, keeper=keeper, on_progress=advance, workers=workers_of(model))
    return [_rank(question, row["nll"]) for question, row in zip(asked, rows, strict=True)]


def _rank(question: Any, nll: Sequence[float]) -> Rank:
    choices: Choices = question.choices
    right, wrong = nll[: len(choices.right)], nll[len(choices.right) :]
    return Rank(question.task, question.length, question.depth, *_ranked(right, wrong), len(choices.input_ids))


def _ranked(right: Sequence[float], wrong: Sequence[float]) -> tuple[float, float, float, int]:
    """Return (share of first places, mean share of wrong ones beaten, mean place, candidates)."""
    beaten = [[(mine < other) + (mine == other) / 2 for other in wrong] for mine in right]
    shares = [sum(row) / len(wrong) for row in beaten]
    firsts = [1 / (1 + row.count(0.5)) if min(row) > 0 else 0.0 for row in beaten]
    beats = sum(shares) / len(shares)
    return sum(firsts) / len(firsts), beats, 1 + (1 - beats) * len(wrong), 1 + len(wrong)


def ranked_tables(ranks: Sequence[Rank], pools: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return `ranked`, and `ranked_by_task` and `ranked_by_length` of `pools`: one row for task, length and depth."""
    tables = {"ranked": [_cell(*key, rows) for key, rows in grouped(ranks)]}
    for name in pools:
        groups = grouped(ranks, by_task=name == "by_task", by_depth=False)
        tables[f"ranked_{name}"] = [_cell(*key, rows) for key, rows in groups]
    return tables


def grouped(rows: Sequence[Any], *, by_task: bool = True, by_depth: bool = True) -> Groups:
    """Return (task, length, depth) with the rows there, sorted; tasks stay in their order.

    Args:
        by_task, by_depth: False for all of them together.
    """
    tasks = list(dict.fromkeys(each.task for each in rows)) if by_task else [ALL]
    groups: dict[Group, list[Any]] = {}
    for each in rows:
        key = (each.task if by_task else ALL, each.length, each.depth if by_depth else None)
        groups.setdefault(key, []).append(each)
    order = sorted(groups, key=lambda key: (tasks.index(key[0]), key[1], -1 if key[2] is None else key[2]))
    return [(key, groups[key]) for key in order]


def _cell(task: str, length: int, depth: float | None, ranks: Sequence[Rank]) -> dict[str, Any]:
    from longext.evals.statistics import share_interval

    count = len(ranks)
    low, high = share_interval([each.score for each in ranks])
    beats_low, beats_high = share_interval([each.beats for each in ranks])
    return {
        "task": task,
        "length": length,
        "depth": depth,
        "num_trials": count,
        "score": sum(each.score for each in ranks) / count,
        "low": low,
        "high": high,
        "chance": sum(1 / each.num_candidates for each in ranks) / count,
        "beats": sum(each.beats for each in ranks) / count,
        "beats_low": beats_low,
        "beats_high": beats_high,
        "place": sum(each.place for each in ranks) / count,
        "num_candidates": max(each.num_candidates for each in ranks),
        "num_tokens": sum(each.num_tokens for each in ranks) / count,
    }


def ranked_view(of: str = "ranked_by_task", axis: str = PROMPT, **more: Any) -> Lines:
    """Return the view of ranks by length, a block for each task."""
    return Lines(
        "Right answer likelier than all wrong ones",
        of=f"{of}.score",
        axis=axis,
        name="ranked",
        value="first",
        details=(
            Detail("chance", "chance", "{:.0%}"),
            Detail("beats", "beats", "{:.0%}"),
            Detail("candidates", "num_candidates"),
            Detail("prompts", "num_trials"),
        ),
        note="by likelihood; beats: wrong answers below a right one, 50% by chance",
        **{"panel": "task", **more},
    )
