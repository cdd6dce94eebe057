"""The methods that `longext advise` tries, and the places and prompts they are measured on, on one loaded model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longext.attention.bands import REMAPS, remap_spec
from longext.checkpoint.load import first_line
from longext.checkpoint.rope_config import read_model_rope
from longext.checkpoint.source import read_config, resolve_model
from longext.conversion.engines import REMAPPED, RIGHT, kind_of, serving_engines
from longext.conversion.extend import ExtensionPlan
from longext.data.documents import documents_facts, load_documents
from longext.errors import CheckpointError, ConfigError, DataError
from longext.evals.base import Progress
from longext.evals.sequential.elimination import FEWEST, Candidate, best_of, eliminate, groups, summary
from longext.evals.suites.passkey import Passkey
from longext.manifest import result_record
from longext.models.methods import RemapRequest, apply_method, described, plan_method
from longext.rope.spec import RopeSpec, extension_methods

if TYPE_CHECKING:
    from longext.models.hf import HFLanguageModel

_MOST_SCORED = 1024  # tokens of a place
_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_CONTROL = "window"  # it reads nothing far
_PROMPTS = 2  # passkeys at each place
_DEFINITION = (
    "the last tokens of each place with the trained length, half the target and the target as context; two passkeys "
    "of the target length at each; methods that are told apart from a better one are measured no further"
)


@dataclass(frozen=True)
class Choice:
    """A method to try.

    Attributes:
        name: as commands spell it, with its parameters.
        formula: in plain text.
        kind: what engines see of it (`engines.KINDS`), or `REMAPPED`.
        plan: the extension, or the remapping, that it is.
    """

    name: str
    formula: str
    kind: str
    plan: ExtensionPlan | RemapRequest

    @property
    def engines(self) -> list[str]:
        """The serving engines that read it as transformers does."""
        return [each.title for each in serving_engines() if each.reading(self.kind).verdict == RIGHT]


def choices(config: Any, rope: RopeSpec) -> tuple[list[Choice], list[str]]:
    """Return the methods to try, and a line for each that cannot be: it needs something given, or this model cannot.

    Args:
        rope: the model's own.

    Raises:
        ConfigError: a method that the user named is unknown or impossible.
    """
    factor = config.target_length / rope.original_max_position_embeddings
    found, left_out = list[Choice](), list[str]()
    for name in config.methods or _sensible(factor):
        try:
            found.append(_choice(name, config, rope, factor))
        except (ConfigError, CheckpointError) as error:
            if config.methods:
                raise
            left_out.append(f"{name}: {error}")
    return found, left_out


def _sensible(factor: float) -> list[str]:
    """Return every method with the parameters that its default leaves open for a model that is not trained further."""
    own = {"dynamic": f"dynamic:alpha={factor:g}"}  # the paper's alpha = 1 holds less far
    remaps = [name if name == _CONTROL else f"{name}:logn=true" for name in REMAPS]
    return [*(own.get(name, name) for name in extension_methods()), *remaps]


def _choice(text: str, config: Any, rope: RopeSpec, factor: float) -> Choice:
    plan = plan_method(text, config.model, config.revision, factor)
    if plan is None:
        raise ConfigError("`none` is what every method is compared with; it is always measured.")
    if isinstance(plan, RemapRequest):
        lengths = rope.original_max_position_embeddings, config.target_length, rope.rotary_dim // 2
        return Choice(text, remap_spec(plan.name, *lengths, plan.parameters).formula, REMAPPED, plan)
    return Choice(text, described(plan.spec), kind_of(plan.parameters), plan)


@dataclass
class Trial:
    """One run: the model, its texts and prompts, and what every candidate has to do at a place.

    Attributes:
        windows: the last `target` tokens before the end of each place.
        scored: how many of the last tokens are scored.
    """

    config: Any
    model: HFLanguageModel
    plain: dict[str, Any]
    trained: int
    windows: Sequence[Sequence[int]]

    @property
    def scored(self) -> int:
        """Tokens that are scored at a place: the second half of the trained length, at most 1,024."""
        return min(self.trained // 2, _MOST_SCORED)

    @property
    def lengths(self) -> list[int]:
        """The context lengths: trained, half the target if that is longer, the target."""
        target: int = self.config.target_length
        return sorted({self.trained, max(self.trained, target // 2), target})

    def apply(self, choice: Choice | None) -> None:
        """Give the model a method; None for the model as it is."""
        apply_method(self.model, choice.plan if choice else None, self.plain)

    def nll(self, place: int, length: int) -> float:
        """Return the mean NLL of the scored tokens of a place with `length` tokens, nats."""
        import torch

        ids = torch.tensor([self.windows[place][-length:]])
        return float(self.model.score(ids, length - self.scored).nll.cpu().double().mean())

    def passkeys(self, place: int) -> list[int]:
        """Return 1 or 0 for each prompt of a place."""
        from longext.evals.passkey import evaluate_passkey

        found = []
        for number in range(_PROMPTS * place, _PROMPTS * (place + 1)):
            depth = _DEPTHS[number % len(_DEPTHS)]
            given = {"model": self.config.model, "lengths": (self.config.target_length,), "depths": (depth,)}
            task = Passkey(**given, num_trials=1, seed=self.config.seed + number)
            found.append(int(evaluate_passkey(self.model, task)[0]["num_correct"]))
        return found

    def measure(self, candidate: Candidate, choice: Choice | None, place: int) -> None:
        """Measure a candidate at a place; without a choice the model as it is, within its trained length alone."""
        started = time.perf_counter()
        self.apply(choice)
        for length in self.lengths if choice else [self.trained]:
            candidate.nll.setdefault(length, []).append(self.nll(place, length))
        if choice:
            candidate.found += self.passkeys(place)
        candidate.seconds += time.perf_counter() - started


def find_places(config: Any, model: HFLanguageModel, documents: Sequence[Any], scored: int) -> list[tuple[int, ...]]:
    """Return the `target_length` tokens before the end of up to `num_places` places, spread evenly, in seeded order.

    What is scored of one place is scored of no other.

    Raises:
        DataError: no document is long enough.
    """
    import numpy as np

    texts = [tuple(model.encode(each.text, add_bos=False)[: config.max_tokens]) for each in documents]
    length = config.target_length
    ends = [(text, end) for text in texts for end in range(length, len(text) + 1, scored)]
    if not ends:
        raise DataError(
            f"No document of {config.data} has {length} tokens: the longest has {max(map(len, texts))}. "
            "Give longer documents, or a smaller --target-length."
        )
    chosen = np.unique(np.linspace(0, len(ends) - 1, config.num_places).round().astype(int))
    order = np.random.default_rng(config.seed).permutation(chosen)
    return [text[end - length : end] for text, end in (ends[i] for i in order)]


def try_methods(config: Any, progress: Progress, tell: Callable[[str], None]) -> dict[str, Any]:
    """Return the record of `longext advise`.

    Args:
        tell: called with a line on what is going to be done, before it is.

    Raises:
        ConfigError, CheckpointError, DataError: something given cannot be used.
    """
    from longext.models.hf import load_language_model
    from longext.threads import set_threads

    directory = resolve_model(config.model, config.revision)
    rope = read_model_rope(directory, config.trust_remote_code).spec
    trained = rope.original_max_position_embeddings
    if config.target_length <= trained:
        told = f"--target-length must be above the trained length {trained}, got {config.target_length}."
        raise ConfigError(told).about("target length")
    found, left_out = choices(config, rope)
    documents = load_documents(config)
    set_threads(config.threads)
    model = load_language_model(config)
    trial = Trial(config, model, read_config(directory), trained, ())
    found = _that_apply(trial, found, left_out)
    trial.windows = find_places(config, model, documents, trial.scored)
    candidates = [Candidate(each.name, _rank(each), bool(each.engines), _is_control(each)) for each in found]
    base = Candidate("none", 0, False)
    started = time.perf_counter()
    tell(_estimate(trial, len(found)))
    with progress("advise", len(trial.windows) * len(found), "measurements") as advance:
        measured, failed = _run(trial, found, candidates, base, advance, started + 60 * config.minutes)
    trial.apply(None)
    left_out += [f"{name}: {first_line(error)}" for name, error in failed.items()]
    found = [choice for choice in found if choice.name not in failed]
    candidates = [candidate for candidate in candidates if candidate.name not in failed]
    return _record(trial, found, candidates, base, documents, measured, left_out)


def _that_apply(trial: Trial, found: Sequence[Choice], left_out: list[str]) -> list[Choice]:
    """Return the methods that the loaded model takes; the others go to `left_out`.

    Raises:
        ConfigError: one that the user named is not taken, or none is left.
    """
    taken = []
    for choice in found:
        try:
            trial.apply(choice)
            taken.append(choice)
        except ConfigError as error:
            if trial.config.methods:
                raise
            left_out.append(f"{choice.name}: {error}")
    trial.apply(None)
    if all(map(_is_control, taken)):
        why = f" {left_out[0]}" if left_out else ""
        raise ConfigError(f"There is no method to try besides the control.{why} Name some: --methods yarn,rerope.")
    return taken


def _rank(choice: Choice) -> int:
    """Return how much a method asks of its user: what more engines read is simpler, then what is a checkpoint."""
    return 2 * (len(serving_engines()) - len(choice.engines)) + (choice.kind == REMAPPED)


def _is_control(choice: Choice) -> bool:
    return isinstance(choice.plan, RemapRequest) and choice.plan.name == _CONTROL


def _estimate(trial: Trial, count: int) -> str:
    """Return what the run is going to cost, from one pass over a window of the target length."""
    started = time.perf_counter()
    trial.nll(0, trial.config.target_length)
    seconds = time.perf_counter() - started
    each = seconds * (_PROMPTS + sum(trial.lengths) / trial.config.target_length)
    places = min(len(trial.windows), int(60 * trial.config.minutes / (each * count)))
    enough = (
        ""
        if places >= FEWEST
        else f" That is too few to tell methods apart: {FEWEST} places take about {FEWEST * each * count / 60:.1f} "
        "minutes."
    )
    return (
        f"{count} methods at {trial.config.target_length:,} tokens: about {each:.1f} s for one method at one place "
        f"with its {_PROMPTS} passkeys, so --minutes {trial.config.minutes:g} holds about {places} of "
        f"{len(trial.windows)} places for all methods, more as methods drop out.{enough}"
    )


def _run(
    trial: Trial,
    found: Sequence[Choice],
    candidates: Sequence[Candidate],
    base: Candidate,
    advance: Callable[..., None],
    deadline: float,
) -> tuple[int, dict[str, Exception]]:
    """Measure until one method is told apart, or the time or the places are used up.

    Returns:
        (places, the methods that failed: they are measured no further).

    Raises:
        Exception: what the last method failed of, if no other is left.
    """
    by_name, failed = {each.name: each for each in found}, dict[str, Exception]()
    last = [time.perf_counter(), 0.0]  # when the last place ended, and what it took

    def measure(candidate: Candidate, place: int) -> None:
        if len(base.nll.get(trial.trained, ())) <= place:
            trial.measure(base, None, place)
        if candidate.name in failed:
            return
        try:
            trial.measure(candidate, by_name[candidate.name], place)
        except Exception as error:  # of one method: the others are still told apart
            failed[candidate.name], candidate.beaten_by = error.with_traceback(None), "a failure"
            if isinstance(error, (DataError, OSError)) or not groups(candidates)["transformers"]:
                raise
        advance(1, candidate.name)

    def is_late() -> bool:
        now = time.perf_counter()
        last[:] = now, now - last[0]
        return now + last[1] > deadline

    return eliminate(candidates, trial.config.target_length, len(trial.windows), measure, is_late), failed


def _record(
    trial: Trial,
    found: Sequence[Choice],
    candidates: Sequence[Candidate],
    base: Candidate,
    documents: Sequence[Any],
    measured: int,
    left_out: Sequence[str],
) -> dict[str, Any]:
    config, target = trial.config, trial.config.target_length
    rows = [
        {**summary(each, base, trial.lengths, trial.trained), "kind": choice.kind, "engines": choice.engines}
        for each, choice in zip(candidates, found, strict=True)
    ]
    formulas = {choice.name: choice.formula for choice in found}
    answers = {}
    for name, group in groups(candidates).items():
        chosen, tied = best_of(group, target)
        names = [each.name for each in sorted(tied, key=lambda each: (-each.recall, each.perplexity(target)))]
        answers[name] = {"method": chosen.name, "not_told_apart": names}
    return result_record(
        "advise",
        trial.model.describe(),
        {
            "id": "advise",
            "definition": _DEFINITION,
            "num_scored": trial.scored,
            "num_prompts": _PROMPTS,
            "seed": config.seed,
            "minutes": config.minutes,
        },
        documents_facts(config, documents),
        revision=config.revision,
        trained_length=trial.trained,
        target_length=target,
        window_perplexity=base.perplexity(trial.trained),
        num_places=measured,
        most_places=len(trial.windows),
        is_enough=measured >= FEWEST,
        answers=answers,
        methods=[{**row, "formula": formulas[row["name"]]} for row in rows],
        left_out=list(left_out),
    )
