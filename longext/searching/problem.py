"""Score candidates on one loaded model, each sample once: what was measured is kept in a journal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longext.conversion.extend import ExtensionPlan, exportable_parameters, extended_config
from longext.evals.base import Advance, silent
from longext.models.answer_file import append_answers, open_answers
from longext.models.hf import HFLanguageModel
from longext.rope.spec import RopeSpec
from longext.searching.samples import Sample
from longext.searching.searcher import Candidate, record_of

_TEMPERATURES = 5  # at which the price of a temperature on short texts is measured


@dataclass(frozen=True)
class Measured:
    """One candidate on one sample: nats a token of the number and of the text, and whether the number came out."""

    needle: float
    text: float | None
    right: bool


class Journal:
    """Measurements as JSON lines under a fingerprint; without a path they are kept in memory alone."""

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.path = path
        self.measured: dict[tuple[str, int], Measured] = {}
        self.candidates: dict[str, dict[str, Any]] = {}
        for _, row in open_answers(path, fingerprint) if path else ():
            if "sample" in row:
                self.measured[row["candidate"], row["sample"]] = Measured(row["needle"], row["text"], row["right"])
            else:
                self.candidates[row["candidate"]] = row

    def add(self, candidate: Candidate, sample: int, measured: Measured) -> None:
        """Keep one measurement; it is on the disk when this returns."""
        rows: list[dict[str, Any]] = []
        if candidate.key not in self.candidates:
            self.candidates[candidate.key] = record_of(candidate)
            rows.append({"candidate": candidate.key, **record_of(candidate)})
        self.measured[candidate.key, sample] = measured
        rows.append({"candidate": candidate.key, "sample": sample, **vars(measured)})
        if self.path is not None:
            append_answers(self.path, rows)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a score is made of.

    score = needle * (loss of the number) + text * (loss of the text) + guard * max(0, loss of the text - YaRN's) +
    short * (loss on short texts - the loss at temperature 1), each in nats a token.
    """

    needle: float = 1.0
    text: float = 0.0
    guard: float = 0.0
    short: float = 0.0


class Problem:
    """Candidates on a model.

    Args:
        plan: `extend --method longrope` of the target length, whose factors are replaced.
        short: int64 [n, L], for the price of a temperature.
        reference: YaRN's frequencies, which the guard compares with.
    """

    def __init__(
        self,
        model: HFLanguageModel,
        plan: ExtensionPlan,
        samples: Sequence[Sample],
        short: torch.Tensor,
        reference: Candidate,
        weights: Weights,
        journal: Journal,
    ) -> None:
        self.model, self.plan, self.samples, self.short = model, plan, samples, short
        self.reference, self.weights, self.journal = reference, weights, journal
        self.advance: Advance = silent
        self.best: tuple[float, Candidate] | None = None
        self._set = ""
        self.prices: tuple[list[float], list[float]] | None = None

    def set(self, candidate: Candidate) -> None:
        """Give the model a candidate's RoPE, as a checkpoint with these factors has it."""
        if candidate.key != self._set:
            self.model.set_rope(extended_config(self.plan_of(candidate)))
            self._set = candidate.key

    def plan_of(self, candidate: Candidate) -> ExtensionPlan:
        """Return the extension that writes a candidate: its long factors, short ones of 1."""
        spec = spec_of(self.plan.spec, candidate)
        return replace(self.plan, spec=spec, parameters=exportable_parameters(self.plan.rope, spec))

    def measure(self, candidate: Candidate, number: int) -> Measured:
        """Return a candidate's losses on one sample, from the journal if it has them."""
        kept = self.journal.measured.get((candidate.key, number))
        if kept is None:
            self.set(candidate)
            sample = self.samples[number]
            scores = self.model.score(sample.input_ids, sample.first)
            nll, answer = scores.nll[0].double().cpu(), slice(-sample.num_answer, None)
            text = None if sample.text is None else float(nll[sample.text].mean())
            kept = Measured(float(nll[answer].mean()), text, bool(scores.is_top1[0, answer].all()))
            self.journal.add(candidate, number, kept)
        best = f"best {self.best[0]:.3f}" if self.best else ""
        self.advance(1, best)
        return kept

    def ask(self, candidate: Candidate, num_samples: int) -> float:
        """Return the score of a candidate on the first samples (`Weights`)."""
        found = [self.measure(candidate, number) for number in range(num_samples)]
        texts = [number for number, own in enumerate(found) if own.text is not None]
        text = float(np.mean([found[number].text for number in texts]))
        weights = self.weights
        score = weights.needle * float(np.mean([own.needle for own in found])) + weights.text * text
        if weights.guard:
            theirs = float(np.mean([self.measure(self.reference, number).text for number in texts]))
            score += weights.guard * max(0.0, text - theirs)
        if weights.short:
            score += weights.short * self.short_loss(candidate.attention_factor)
        if num_samples == len(self.samples) and (self.best is None or score < self.best[0]):
            self.best = (score, candidate)
        return score

    def measure_prices(self, most: float) -> None:
        """Measure what temperatures from 1 to `most` add to the loss on short texts, at a few of them.

        Short factors are 1, so it is the temperature alone that a short text feels.
        """
        temperatures = np.linspace(1, most, _TEMPERATURES).tolist()
        losses = []
        for temperature in temperatures:
            self.set(Candidate((1.0,) * len(self.reference.factors), temperature))
            losses.append(np.mean([float(self.model.score(row[None], 1).nll.double().mean()) for row in self.short]))
        self.prices = temperatures, [float(loss - losses[0]) for loss in losses]

    def short_loss(self, temperature: float) -> float:
        """Return what a temperature adds to the loss on short texts, nats a token; interpolated by a parabola."""
        assert self.prices is not None
        return float(np.polyval(np.polyfit(*self.prices, 2), temperature))

    def most_temperature(self, price: float | None) -> float:
        """Return the largest temperature that raises short perplexity by at most `price`; infinite without one."""
        assert self.prices is not None
        if price is None:
            return math.inf
        grid = np.linspace(1, self.prices[0][-1], 1001)
        return float(max((a for a in grid if math.expm1(self.short_loss(a)) <= price), default=1.0))


def spec_of(spec: RopeSpec, candidate: Candidate) -> RopeSpec:
    """Return the `longrope` spec of a candidate; short factors are 1."""
    short = (1.0,) * len(candidate.factors)
    return replace(spec, long_factor=candidate.factors, short_factor=short, attention_factor=candidate.attention_factor)
