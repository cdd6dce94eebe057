"""Walk a graph given as a list of edges: nodes at an exact depth, or parents; set F1 by length (OpenAI's GraphWalks).

Example: longext eval graphwalks MODEL --lengths 2048,8192

OpenAI's rows from a file: longext eval graphwalks MODEL --data graphwalks.jsonl
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from longext.data.json_lines import rows_of, text_fields
from longext.errors import ConfigError, DataError
from longext.evals.base import check_tasks, register
from longext.evals.limits import check_lengths
from longext.evals.ranks import ranked_view
from longext.evals.retrieval import Question, QuestionScore, RetrievalEval, first_that_holds, most_that_fit, text_hash
from longext.evals.views import SEVERAL, Section, by_task, pooled
from longext.registry import Registry
from longext.settings import LENGTH, MANY, option

if TYPE_CHECKING:
    from longext.models.protocol import LanguageModel

Edges = Sequence[tuple[str, str]]
_LINE = re.compile(r"Final Answer:\s*\[(.*)\]")
_OPENING = "Final Answer: ["
_NUM_WRONG, _WRONG_TRIES = 9, 200
_WHERE = "The Hub dataset openai/graphwalks has them as parquet; datasets' `to_json` writes a file of rows."
_TASK = (
    "Below is a directed graph as a list of edges, one a line. {rule}\nEnd your answer with a line of this form, the "
    "nodes separated by commas, or empty brackets if there are none: Final Answer: [node, node]\n\n"
    "For example, with the edges\na1 -> b2\na1 -> c3\nb2 -> d4\n{example}\n\n"
    "The graph has these edges:\n{edges}\n\n{question}"
)


@dataclass(frozen=True)
class Walk:
    """One kind of question: (edges, node, depth) -> the nodes that answer it; its words."""

    nodes: Callable[[Edges, str, int], set[str]]
    rule: str
    example: str
    question: str


def at_depth(edges: Edges, start: str, depth: int) -> set[str]:
    """Return the nodes whose shortest way from `start` has exactly `depth` edges."""
    after: dict[str, set[str]] = {}
    for one, other in edges:
        after.setdefault(one, set()).add(other)
    seen, layer = {start}, {start}
    for _ in range(depth):
        layer = {node for one in layer for node in after.get(one, ())} - seen
        seen |= layer
    return layer


def parents(edges: Edges, node: str, depth: int = 1) -> set[str]:
    """Return the nodes with an edge into `node`."""
    return {one for one, other in edges if other == node}


WALKS: Registry[Walk] = Registry("task")
WALKS.register(
    "bfs",
    Walk(
        at_depth,
        "Find the nodes that a breadth-first search from a node reaches at exactly a depth, not before.",
        "the search from a1 reaches at depth 2:\nFinal Answer: [d4]",
        "Which nodes does the breadth-first search from {node} reach at exactly depth {depth}?",
    ),
)
WALKS.register(
    "parents",
    Walk(
        parents,
        "Find the parents of a node: those with an edge into it.",
        "the parents of b2 are:\nFinal Answer: [a1]",
        "Which nodes are the parents of {node}?",
    ),
)


def read_nodes(answer: str) -> set[str] | None:
    """Return the nodes of the last line with "Final Answer: [...]", None if there is none (lm-eval's flexible rule)."""
    lines = [found[1] for line in answer.split("\n") if (found := _LINE.search(line))]
    return {node.strip().strip("'\"") for node in lines[-1].split(",") if node.strip()} if lines else None


def set_f1(expected: set[str], answer: set[str] | None) -> float:
    """Return the F1 of two sets as published: 0 if nothing is common, so also for an empty `expected`."""
    common = len(expected & (answer or set()))
    return 2 * common / (len(expected) + len(answer or ())) if common else 0.0


@register("graphwalks")
@dataclass(frozen=True, kw_only=True)
class GraphWalks(RetrievalEval):
    """GraphWalks (openai/graphwalks): breadth-first search at an exact depth, and parents, over a list of edges."""

    kind: ClassVar[str] = "graphwalks"
    unit: ClassVar[str] = "graphs"
    pools: ClassVar[tuple[str, ...]] = ("by_task", "by_length")
    has_shares: ClassVar[bool] = False
    sections: ClassVar[tuple[Section, ...]] = (
        Section(
            name="graphwalks",
            title="GraphWalks",
            views=(
                by_task("GraphWalks F1 by length", "by_task.score", picture=SEVERAL),
                pooled("GraphWalks F1 by length, all tasks together"),
                ranked_view(),
            ),
        ),
    )

    data: str | None = option(
        None, "File of OpenAI's rows (JSON lines); without it graphs are made here.", panel="Data"
    )
    tasks: tuple[str, ...] = option(("bfs", "parents"), "Of bfs and parents, comma-separated.")
    lengths: tuple[int, ...] = option(
        (1024, 2048, 4096), "Most tokens of a prompt and its answer, comma-separated.", le=LENGTH
    )
    depths: tuple[int, ...] = option((1, 2), "Depths of bfs, comma-separated; drawn among them.", ge=1, le=8)
    degree: int = option(2, "Edges that leave a node.", ge=1, le=16)
    num_trials: int = option(10, "Graphs per task and length.", ge=1, le=MANY)
    max_new_tokens: int = option(256, "Tokens of an answer.", ge=16)

    def check(self) -> None:
        """Raise ConfigError for an unknown task or lengths that are too short."""
        check_tasks(self.tasks, WALKS)
        check_lengths(self.lengths, minimum=self.max_new_tokens + 64)
        if not self.depths:
            raise ConfigError("--depths needs at least one depth, for example 1,2.")
        super().check()

    def read_data(self) -> Any:
        """Return the rows of --data, None if graphs are made."""
        return None if self.data is None else read_rows(Path(self.data).expanduser())

    def questions(self, model: LanguageModel, data: Any) -> list[Question]:
        """Return every graph.

        Raises:
            ConfigError: a length is too short.
        """
        if data is not None:
            return self._of_rows(model, data)
        return [
            self._made(model, task, length, trial)
            for task in self.tasks
            for length in sorted(self.lengths)
            for trial in range(self.num_trials)
        ]

    def _of_rows(self, model: LanguageModel, rows: Sequence[Mapping[str, Any]]) -> list[Question]:
        known = {i: (row, self.prompt_tokens(model, row["prompt"])) for i, row in enumerate(rows)}
        asked = [number for number, (row, _) in known.items() if row["task"] in self.tasks]
        sizes = [len(known[number][1]) + self.max_new_tokens for number in asked]
        places = [(asked[i], length) for i, length in first_that_holds(self.lengths, sizes, self.data)]
        return [
            self._question(row["task"], length, number, ids, row["nodes"], None)
            for number, length in places
            for row, ids in (known[number],)
        ]

    def _made(self, model: LanguageModel, task: str, length: int, trial: int) -> Question:
        """Return a graph of as many nodes as fit."""
        least = self.degree + 2

        def built(size: int) -> tuple[str, set[str], list[set[str]]]:
            return _build(random.Random(f"{self.seed} {task} {length} {trial}"), task, size, self.degree, self.depths)

        def fits(size: int) -> bool:
            return len(self.prompt_tokens(model, built(size)[0])) + self.max_new_tokens <= length

        if not fits(least):
            raise ConfigError(f"GraphWalks' {task} does not fit {length:,} tokens: give longer --lengths.")
        text, nodes, wrong = built(most_that_fit(fits, least, 16))
        spelled = [", ".join(sorted(each)) + "]" for each in (nodes, *wrong)]
        opening = _OPENING if self.uses_chat(model) else f"\n{_OPENING}"
        choices = self.choices(model, text, opening, spelled[:1], spelled[1:]) if wrong else None
        return self._question(task, length, trial, self.prompt_tokens(model, text), nodes, choices)

    def _question(
        self, task: str, length: int, number: int, input_ids: tuple[int, ...], nodes: set[str], choices: Any
    ) -> Question:
        expected = tuple(sorted(nodes)) or ("",)
        return Question(
            id=f"{task}/{length}/{number}",
            task=task,
            length=length,
            input_ids=input_ids,
            expected=expected,
            max_new_tokens=self.max_new_tokens,
            choices=choices,
        )

    def rate(self, task: str, expected: Sequence[str], answer: str, asked: str = "") -> float:
        """Return the F1 of the sets of nodes."""
        WALKS[task]  # ConfigError for a line of another evaluation
        return set_f1({node for node in expected if node}, read_nodes(answer))

    def given_score(self, where: str, row: Any) -> QuestionScore:
        """Return the score of a line: OpenAI's row with a "response", or one of answers.jsonl."""
        if not isinstance(row, dict) or "answer_nodes" not in row:
            return super().given_score(where, row)
        (response,) = text_fields(where, row, ("response",), "answer")
        read = _row(where, {"prompt": "", **row})
        return QuestionScore(read["task"], 0, None, set_f1(read["nodes"], read_nodes(response)), 0)

    def protocol(self, model: Any) -> dict[str, Any]:
        """Return what the record says of the protocol."""
        return {
            "id": "graphwalks" if self.data is None else "graphwalks/openai",
            "definition": "a list of directed edges and a question: the nodes at exactly a depth of a breadth-first "
            "search, or the parents of a node; greedy answers",
            "reference": "openai/graphwalks (Hub)",
            "scoring": "F1 of the set in the last line with 'Final Answer: [...]' (lm-eval's flexible_f1); no such "
            "line, nothing common, or no right node at all: 0 (as published)",
            "tasks": list(self.tasks),
            "lengths": sorted(self.lengths),
            "depths": list(self.depths),
            "degree": None if self.data else self.degree,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
        }

    def data_facts(self, data: Any) -> dict[str, Any]:
        """Return what the record says of the graphs."""
        texts = [] if data is None else [row["prompt"] for row in data]
        return {"data": self.data or "made here", "sha256": text_hash(texts) if texts else None}

    def notes(self, model: LanguageModel, data: Any, scores: Sequence[Any]) -> list[str]:
        """Return a note on own graphs."""
        own = ["Graphs are longext's own: compare with results on the same, not with published ones."]
        return own if data is None else []


def _build(
    rng: random.Random, task: str, size: int, degree: int, depths: Sequence[int]
) -> tuple[str, set[str], list[set[str]]]:
    """Return the prompt of a random graph, the right nodes, and answers to the question on other nodes."""
    walk, names = WALKS[task], set[str]()
    while len(names) < size:
        names.add(f"{rng.getrandbits(24):06x}")
    nodes = sorted(names)
    edges = [(one, other) for one in nodes for other in rng.sample([each for each in nodes if each != one], degree)]
    rng.shuffle(edges)
    depth, right, wrong = rng.choice(depths), set[str](), list[set[str]]()
    while not right:
        asked = rng.choice(nodes)
        right = walk.nodes(edges, asked, depth)
        depth = max(1, depth - 1) if not right else depth  # a small graph may not be so deep
    for _ in range(_WRONG_TRIES):
        other = walk.nodes(edges, rng.choice(nodes), depth)
        if len(wrong) < _NUM_WRONG and other and other != right and other not in wrong:
            wrong.append(other)
    text = _TASK.format(
        rule=walk.rule,
        example=walk.example,
        edges="\n".join(f"{one} -> {other}" for one, other in edges),
        question=walk.question.format(node=asked, depth=depth),
    )
    return text, right, wrong


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return OpenAI's rows.

    Raises:
        ConfigError, DataError: no such file, or a line of another form, with its number.
    """
    return rows_of(path, _row, "a file of GraphWalks rows (JSON lines)", _WHERE)


def _row(where: str, value: Any) -> dict[str, Any]:
    (prompt,) = text_fields(where, value, ("prompt",), "row of GraphWalks")
    nodes, kind = value.get("answer_nodes"), str(value.get("problem_type", "bfs")).lower()
    if not isinstance(nodes, list) or not all(isinstance(node, str) for node in nodes):
        raise DataError(f"{where} is no row of GraphWalks: no list of texts under 'answer_nodes'.")
    return {"prompt": prompt, "nodes": set(nodes), "task": "parents" if "parent" in kind else "bfs"}
