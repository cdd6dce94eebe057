"""A search from its settings to a judgement on text and seeds that it has not seen."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from longext.checkpoint.source import read_config, resolve_model
from longext.conversion.config import ExtendConfig
from longext.conversion.extend import ExtensionPlan, extended_config, plan_extension
from longext.data.documents import Document, data_hash, load_documents
from longext.errors import ConfigError, DataError
from longext.evals.base import Progress
from longext.evals.passkey import accuracy_by_length, evaluate_passkey
from longext.evals.perplexity import TokenizedDocument, evaluate_perplexity
from longext.evals.suites.passkey import Passkey
from longext.evals.suites.ppl import Perplexity
from longext.manifest import result_record
from longext.models.answer_file import fingerprint_of, tokens_hash
from longext.models.hf import HFLanguageModel, load_language_model
from longext.rope.formulas import base_inv_freq
from longext.rope.spec import compute_inv_freq
from longext.searching.config import SearchConfig
from longext.searching.problem import Journal, Problem, Weights
from longext.searching.samples import make_samples, short_windows, split_documents
from longext.searching.searcher import SEARCHERS, Candidate, Searcher, Space, critical_pair, record_of
from longext.threads import set_threads

_HELD_OUT_SEED = 1_000_003  # added to the seed for the prompts of the judgement
_MOST_TEMPERATURE = 1.5  # up to which the price on short texts is measured
_SHORT_WINDOWS = 2  # of each document that is judged on
_NOTE = (
    "The long factors and the temperature were searched on text, see result.json. Up to L tokens the short factors "
    "(1, the original frequencies) hold; the temperature is one number for both, so a short text still feels it. A "
    "chat that grows over L tokens must be prefilled again there: its cached keys have short factors."
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found: `record` for result.json, the `candidate`, its `plan` to write, YaRN as `reference`."""

    record: dict[str, Any]
    candidate: Candidate
    plan: ExtensionPlan
    reference: Candidate
    space: Space

    @property
    def factors(self) -> dict[str, Any]:
        """What `extend --method longrope --factors` reads."""
        return {
            "long_factor": list(self.candidate.factors),
            "short_factor": [1.0] * len(self.candidate.factors),
            "factor": self.space.factor,
            "attention_factor": self.candidate.attention_factor,
        }


def plan_search(config: SearchConfig) -> tuple[ExtensionPlan, Candidate]:
    """Return (the `longrope` extension with YaRN's frequencies as its long factors, those as a candidate).

    Raises:
        ConfigError, CheckpointError: nothing to extend, or not to that length.
    """
    if config.target_length is None:
        raise ConfigError("Give --target-length, for example 8 times the trained length.").about("target length")
    request = ExtendConfig(
        model=config.model,
        method="yarn",
        revision=config.revision,
        target_length=config.target_length,
        original_length=config.original_length,
        check=False,
    )
    yarn = plan_extension(request)
    if yarn.spec.factor <= 1:
        told = f"--target-length must be above the trained length, got {config.target_length}."
        raise ConfigError(told).about("target length")
    inv_freq, temperature = compute_inv_freq(yarn.spec)
    factors = tuple((base_inv_freq(yarn.spec) / inv_freq).tolist())
    reference = Candidate(factors, temperature)
    with tempfile.TemporaryDirectory(prefix="longext-search-") as scratch:
        file = Path(scratch, "factors.json")
        values = {"long_factor": factors, "short_factor": [1.0] * len(factors), "attention_factor": temperature}
        file.write_text(json.dumps(values), encoding="utf-8")
        plan = plan_extension(replace(request, method="longrope", factors=str(file), check=True))
    return replace(plan, config=replace(plan.config, factors="factors.json")), reference


def search(
    config: SearchConfig, progress: Progress, announce: Callable[[str], None], journal: Path | None = None
) -> Found:
    """Search, then judge what was found beside YaRN on held-out text and prompts.

    Args:
        announce: called with a line when something is known.
        journal: where measurements are kept, so that a search that was killed goes on from there.

    Raises:
        ConfigError, DataError, CheckpointError: something given cannot be used.
    """
    searcher = SEARCHERS[config.searcher]
    plan, reference = plan_search(config)
    documents = load_documents(config)
    others = None if config.eval_data is None else load_documents(replace(config, data=config.eval_data))
    searched, held_out = split_documents(documents, others)
    set_threads(config.threads)
    model = load_language_model(config)
    started, cpu = time.perf_counter(), time.process_time()
    problem = _problem(model, plan, reference, searched, config, searcher, journal)
    _judged_windows(model, held_out, config)  # a text too short to judge on is told before the search
    if problem.weights.short or config.short_price is not None:
        problem.measure_prices(_MOST_TEMPERATURE)
    space = _space(plan, reference, problem, config, searcher)
    announce(_estimate(problem, searcher, space))
    with progress(f"search {config.searcher}", searcher.windows(space), "windows") as advance:
        problem.advance = advance
        candidate = searcher.search(space, problem.ask)
    seconds = {"search": time.perf_counter() - started, "search_cpu": time.process_time() - cpu}
    rows = _judge(problem, candidate, held_out, config, progress)
    seconds |= {"all": time.perf_counter() - started, "all_cpu": time.process_time() - cpu}
    record = _record(problem, space, candidate, searcher, config, rows, seconds, (searched, held_out))
    final = problem.plan_of(candidate)
    final = replace(final, warnings=(*final.warnings, _NOTE))
    return Found(record=record, candidate=candidate, plan=final, reference=reference, space=space)


def _problem(
    model: HFLanguageModel,
    plan: ExtensionPlan,
    reference: Candidate,
    searched: Sequence[Document],
    config: SearchConfig,
    searcher: Searcher,
    journal: Path | None,
) -> Problem:
    assert config.target_length is not None
    samples = make_samples(model, searched, config.target_length, config)
    short = short_windows(model, searched, config)
    rows = [*(sample.input_ids[0].tolist() for sample in samples), short.flatten().tolist()]
    facts = [f"{plan.spec.factor}", f"{plan.spec.original_max_position_embeddings}", *map(tokens_hash, rows)]
    kept = Journal(journal, fingerprint_of(model, facts) if journal else "")
    weights = {
        "guarded": Weights(guard=config.text_weight, short=config.short_weight),
        "needle": Weights(),
        "text": Weights(needle=0.0, text=1.0),
    }[searcher.weights]
    return Problem(model, plan, samples, short, reference, weights, kept)


def _space(
    plan: ExtensionPlan, reference: Candidate, problem: Problem, config: SearchConfig, searcher: Searcher
) -> Space:
    spec = plan.spec
    length = spec.original_max_position_embeddings
    return Space(
        num_pairs=len(reference.factors),
        factor=spec.factor,
        trained_length=length,
        critical_pair=min(len(reference.factors), critical_pair(spec.rotary_dim, spec.rope_theta, length)),
        yarn=reference,
        most_temperature=problem.most_temperature(config.short_price),
        seed=config.seed,
        evaluations=config.evaluations or searcher.evaluations,
        num_samples=len(problem.samples),
    )


def _estimate(problem: Problem, searcher: Searcher, space: Space) -> str:
    """Return what the search takes, by the time of YaRN's first window."""
    started = time.perf_counter()
    is_kept = (problem.reference.key, 0) in problem.journal.measured
    problem.measure(problem.reference, 0)
    each, count = time.perf_counter() - started, searcher.windows(space)
    length = problem.samples[0].input_ids.shape[1]
    kept = len(problem.journal.measured)
    pace = "" if is_kept else f", {each:.2g} s each: about {count * each / 60:.0f} min"
    resumed = f"; {kept} windows are in the journal" if is_kept else ""
    return f"At most {space.evaluations} candidates, about {count} windows of {length:,} tokens{pace}{resumed}."


# --- the judgement ----------------------------------------------------------------------------------------------------


def _judged_windows(
    model: HFLanguageModel, documents: Sequence[Document], config: SearchConfig
) -> tuple[list[TokenizedDocument], list[TokenizedDocument]]:
    """Return (a window of the target length from each document, windows of the trained length at the same places)."""
    assert config.target_length is not None
    length, trained = config.target_length, config.original_length or model.trained_length
    prefix, long_windows, short = model.prefix, list[TokenizedDocument](), list[TokenizedDocument]()
    for document in documents:
        ids = model.encode(document.text, add_bos=False)
        if len(ids) < length:
            continue
        start = min(len(ids) // 3, len(ids) - length)  # a third into it: books begin with licences and contents
        part = tuple(ids[start : start + length])
        long_windows.append(TokenizedDocument(document.id, (*prefix, *part)[:length]))
        cuts = [part[at : at + trained] for at in range(0, length - trained + 1, trained)][:_SHORT_WINDOWS]
        short += [TokenizedDocument(f"{document.id}+{n}", (*prefix, *cut)[:trained]) for n, cut in enumerate(cuts)]
    if not long_windows:
        raise DataError(
            f"No held-out document has {length} tokens to judge on. Give longer ones, or others with --eval-data."
        )
    return long_windows, short


def _judge(
    problem: Problem, candidate: Candidate, held_out: Sequence[Document], config: SearchConfig, progress: Progress
) -> list[dict[str, Any]]:
    """Return a row for YaRN (without short factors), one for what was found: passkeys, perplexity, price."""
    model, plan = problem.model, problem.plan
    long_windows, short_windows_ = _judged_windows(model, held_out, config)
    prompts = Passkey(
        model=config.model,
        lengths=(plan.new_length,),
        num_trials=config.num_trials,
        seed=config.seed + _HELD_OUT_SEED,
    )
    model.set_rope(read_config(resolve_model(config.model, config.revision)))
    base = _perplexity(model, short_windows_)
    yarn = plan_extension(replace(plan.config, method="yarn", factors=None))
    rows = []
    total = 2 * (len(long_windows) + len(prompts.depths) * config.num_trials)
    with progress("judgement on held-out text", total, "windows") as advance:
        for name, own in (("yarn", yarn), (config.searcher, problem.plan_of(candidate))):
            model.set_rope(extended_config(own))
            long_ppl = _perplexity(model, long_windows)
            advance(len(long_windows))
            passkey = accuracy_by_length(evaluate_passkey(model, prompts, advance))[0]
            short = _perplexity(model, short_windows_)
            change = math.expm1(short["nll"] - base["nll"])
            rows.append({"name": name, "passkey": passkey, "ppl": long_ppl, "short": short, "change": change})
    return rows


def _perplexity(model: HFLanguageModel, windows: Sequence[TokenizedDocument]) -> dict[str, Any]:
    task = Perplexity(model="", protocol="yarn-truncated", lengths=(len(windows[0].input_ids),))
    row = asdict(evaluate_perplexity(model, windows, task)[0])
    return {key: row[key] for key in ("length", "ppl", "nll", "ppl_low", "ppl_high", "num_tokens", "num_windows")}


def _record(
    problem: Problem,
    space: Space,
    candidate: Candidate,
    searcher: Searcher,
    config: SearchConfig,
    rows: list[dict[str, Any]],
    seconds: dict[str, float],
    documents: tuple[Sequence[Document], Sequence[Document]],
) -> dict[str, Any]:
    journal = problem.journal
    whole = {key for key, number in problem.asked if number == len(problem.samples) - 1}
    right = [journal.measured[candidate.key, number].right for number in range(len(problem.samples))]
    searched, held_out = documents
    return result_record(
        "search",
        problem.model.describe(),
        {
            "id": f"search/{config.searcher}",
            "reference": searcher.reference,
            "definition": "loss on the tokens of a hidden number at the end of texts of the target length, depths "
            "stratified, every second text a passage repeated; judged on other documents and seeds: landmark passkeys, "
            "perplexity of one window a document from a third into it, all tokens scored",
            "weights": vars(problem.weights),
            "num_samples": len(problem.samples),
            "seed": config.seed,
        },
        {
            "source": config.data,
            "sha256": data_hash(searched),
            "documents": [document.id for document in searched],
            "held_out": [document.id for document in held_out],
            "held_out_sha256": data_hash(held_out),
        },
        trained_length=space.trained_length,
        target_length=problem.plan.new_length,
        critical_pair=space.critical_pair,
        found=record_of(candidate),
        yarn=record_of(space.yarn),
        short_prices=_price_rows(problem),
        most_temperature=space.most_temperature if math.isfinite(space.most_temperature) else None,
        num_candidates=len({key for key, _ in problem.asked} - {problem.reference.key}),
        num_whole=len(whole - {problem.reference.key}),
        num_windows=len(problem.asked),
        num_right=int(np.sum(right)),
        seconds=seconds,
        results=rows,
    )


def _price_rows(problem: Problem) -> list[dict[str, float]]:
    if problem.prices is None:
        return []
    return [{"temperature": a, "change": math.expm1(loss)} for a, loss in zip(*problem.prices, strict=True)]
