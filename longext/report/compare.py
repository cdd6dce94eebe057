"""Every method on the same documents, seeds and protocols, in one run: what each gains and what it costs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from longext.checkpoint.rope_config import read_model_rope
from longext.checkpoint.source import read_config, resolve_model
from longext.conversion.extend import ExtensionPlan, extended_config, plan_extension
from longext.data.documents import data_hash, load_documents
from longext.errors import ConfigError
from longext.evals.passkey import (
    PASSKEY_PROTOCOLS,
    PasskeyCell,
    accuracy_by_length,
    check_passkey_config,
    check_prompts,
    evaluate_passkey,
    num_prompts,
    prompts_hash,
)
from longext.evals.perplexity import (
    PERPLEXITY_PROTOCOLS,
    PerplexityAtLength,
    Progress,
    TokenizedDocument,
    check_perplexity_config,
    evaluate_perplexity,
    num_forward_tokens,
    stride_of,
    tokenize_documents,
)
from longext.evals.suites.passkey import Passkey
from longext.evals.suites.ppl import Perplexity
from longext.manifest import result_record
from longext.models.hf import HFLanguageModel, load_language_model
from longext.models.methods import described, method_request
from longext.report.config import CompareConfig


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """What one method did.

    Attributes:
        name: as the user spelled it, for example "yarn" or "dynamic:alpha=8".
        rope_parameters: what `extend` would write.
        formula: its formula, and the parameters that were used.
        perplexity: by length, sliding windows.
        positions: NLL by position, one pass at the largest length.
        passkey: by length and depth; empty where it was switched off.
        seconds: wall time.
    """

    name: str
    rope_parameters: dict[str, Any]
    formula: str
    perplexity: list[PerplexityAtLength]
    positions: list[PerplexityAtLength]
    passkey: list[PasskeyCell]
    seconds: float

    def perplexity_at(self, length: int) -> PerplexityAtLength:
        """Return the perplexity at one window length."""
        return next(row for row in self.perplexity if row.length == length)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of `compare_methods`: one entry per method, and the record that explains them."""

    trained_length: int
    short_length: int
    methods: list[MethodResult]
    record: dict[str, Any]

    def short_price(self, method: MethodResult) -> float | None:
        """Relative change of perplexity at `short_length` against the unchanged model, or None without `none`."""
        base = next((m for m in self.methods if m.name == "none"), None)
        if base is None:
            return None
        return method.perplexity_at(self.short_length).ppl / base.perplexity_at(self.short_length).ppl - 1


def plan_methods(config: CompareConfig) -> dict[str, ExtensionPlan | None]:
    """Return the extension plan of every method asked for, by the name the user gave it; None for the model as it is.

    Raises:
        ConfigError: unknown, repeated or impossible method.
    """
    if not config.methods:
        raise ConfigError("--methods needs at least one method, for example none,linear,yarn.")
    if len(set(config.methods)) != len(config.methods):
        raise ConfigError(f"--methods names one method twice: {','.join(config.methods)}.")
    requests = {name: method_request(name, config.model, config.revision, config.factor) for name in config.methods}
    return {name: None if request.method == "none" else plan_extension(request) for name, request in requests.items()}


def compare_methods(
    config: CompareConfig, progress: Callable[[str, int, str], Any], announce: Callable[[str], None] | None = None
) -> Comparison:
    """Evaluate every method of `config.methods` on one loaded model.

    Args:
        progress: (what, total, unit) -> context manager that yields advance(n).
        announce: called with one line when a method is done.

    Raises:
        ConfigError, CheckpointError, DataError: bad input; nothing has been run then.
    """
    plans = plan_methods(config)
    directory = resolve_model(config.model, config.revision)
    base = read_model_rope(directory, config.trust_remote_code)
    course = _Course.of(config, base.spec.original_max_position_embeddings)
    documents = load_documents(course.perplexity)
    model = load_language_model(config)
    tokenized, num_short = tokenize_documents(model, documents, course.perplexity)
    if course.passkey is not None:
        check_prompts(model, course.passkey)
    plain = read_config(directory)
    results = []
    for index, (name, plan) in enumerate(plans.items(), 1):
        rope, spec = (base.parameters, base.spec) if plan is None else (plan.parameters, plan.spec)
        with progress(f"{name} ({index}/{len(plans)})", course.num_tokens(tokenized), "tokens") as advance:
            model.set_rope(plain if plan is None else extended_config(plan))
            numbers = course.run(model, tokenized, advance)
        results.append(MethodResult(name=name, rope_parameters=rope, formula=described(spec), **numbers))
        if announce:
            announce(_one_line(results[-1]))
    model.set_rope(plain)
    data = {
        "source": config.data,
        "sha256": data_hash(documents),
        "num_documents": len(tokenized),
        "num_too_short": num_short,
        "num_tokens": sum(len(document.input_ids) for document in tokenized),
        "split": config.split,
        "max_tokens": config.max_tokens,
    }
    record = _record(config, model, results, data, course)
    return Comparison(trained_length=course.trained, short_length=course.short, methods=results, record=record)


@dataclass(frozen=True, kw_only=True)
class _Course:
    """What every method runs through: the same evaluations, prompts and seeds.

    Attributes:
        trained: the model's pre-training length.
        short: the longest evaluated length within it, where the short-context price is read.
    """

    perplexity: Perplexity
    positions: Perplexity
    passkey: Passkey | None
    trained: int
    short: int

    @staticmethod
    def of(config: CompareConfig, trained: int) -> _Course:
        """Check `config` and split it by evaluation; a length within the trained window is added where none is."""
        lengths = tuple(sorted({*config.lengths, *(() if min(config.lengths) <= trained else (trained,))}))
        shared = _shared(config, Perplexity)
        perplexity = Perplexity(**shared, lengths=lengths, protocol="sliding")
        check_perplexity_config(perplexity)
        passkey = Passkey(**_shared(config, Passkey), lengths=config.lengths) if config.passkey else None
        if passkey is not None:
            check_passkey_config(passkey)
        return _Course(
            perplexity=perplexity,
            positions=dataclasses.replace(perplexity, protocol="positional", stride=stride_of(perplexity)),
            passkey=passkey,
            trained=trained,
            short=max(length for length in lengths if length <= trained),
        )

    def num_tokens(self, documents: Sequence[TokenizedDocument]) -> int:
        """Tokens that one method sends through the model, for its progress bar."""
        work = num_forward_tokens(documents, self.perplexity) + num_forward_tokens(documents, self.positions)
        return work + (num_prompts(self.passkey) * self._mean_prompt() if self.passkey else 0)

    def _mean_prompt(self) -> int:
        return sum(self.passkey.lengths) // len(self.passkey.lengths) if self.passkey else 0

    def run(self, model: HFLanguageModel, documents: Sequence[TokenizedDocument], advance: Progress) -> dict[str, Any]:
        """Evaluate the RoPE that `model` has now; return the numeric fields of a `MethodResult`."""
        started = time.perf_counter()
        numbers: dict[str, Any] = {
            "perplexity": evaluate_perplexity(model, documents, self.perplexity, advance),
            "positions": evaluate_perplexity(model, documents, self.positions, advance),
            "passkey": [],
        }
        if self.passkey is not None:
            size = self._mean_prompt()
            numbers["passkey"] = evaluate_passkey(model, self.passkey, lambda prompts: advance(prompts * size))
        return {**numbers, "seconds": time.perf_counter() - started}


def _shared(config: CompareConfig, kind: Any) -> dict[str, Any]:
    """The fields that `config` and `kind` have in common, but for those that differ by evaluation."""
    names = {field.name for field in dataclasses.fields(kind)} - {"lengths", "protocol", "method", "factor"}
    return {key: value for key, value in vars(config).items() if key in names}


def _one_line(result: MethodResult) -> str:
    shown = "  ".join(f"{row.length:,}: {row.ppl:.1f}" for row in result.perplexity)
    recalled = ""
    if result.passkey:
        pooled = accuracy_by_length(result.passkey)
        recalled = "   passkey " + "  ".join(f"{cell.accuracy:.0%}" for cell in pooled.values())
    return f"{result.name:<16} ppl {shown}{recalled}   {result.seconds:.0f} s"


def _record(
    config: CompareConfig,
    model: HFLanguageModel,
    results: Sequence[MethodResult],
    data: dict[str, Any],
    course: _Course,
) -> dict[str, Any]:
    protocols = {
        "perplexity": _perplexity_facts(course.perplexity),
        "positions": _perplexity_facts(course.positions),
        "passkey": _passkey_facts(model, course.passkey) if course.passkey else None,
        "seed": config.seed,
    }
    return result_record(
        "compare",
        model.describe(),
        protocols,
        data,
        trained_length=course.trained,
        short_length=course.short,
        factor=config.factor,
        methods=[
            {
                **dataclasses.asdict(result),
                "passkey_by_length": [
                    {**dataclasses.asdict(cell), "accuracy": cell.accuracy}
                    for cell in accuracy_by_length(result.passkey).values()
                ],
            }
            for result in results
        ],
    )


def _perplexity_facts(config: Perplexity) -> dict[str, Any]:
    protocol = PERPLEXITY_PROTOCOLS[config.protocol]
    facts = {"id": f"ppl/{config.protocol}", "stride": stride_of(config), "definition": protocol.summary}
    return {**facts, "weighting": protocol.weighting, "bos": protocol.adds_bos}


def _passkey_facts(model: HFLanguageModel, config: Passkey) -> dict[str, Any]:
    protocol = PASSKEY_PROTOCOLS[config.protocol]
    facts = {"id": f"passkey/{config.protocol}", "definition": protocol.summary, "scoring": protocol.scoring}
    facts |= {name: getattr(config, name) for name in ("filler", "num_needles", "num_digits")}
    return {**facts, "prompts_sha256": prompts_hash(model, config)}


def csv_rows(comparison: Comparison) -> Iterator[list[Any]]:
    """Yield the header and one row per number: method, metric, length, depth, value, low, high, count."""
    yield ["method", "metric", "length", "depth", "value", "low", "high", "count"]
    for method in comparison.methods:
        for row in method.perplexity:
            yield [method.name, "ppl", row.length, "", row.ppl, row.ppl_low, row.ppl_high, row.num_tokens]
        for row in method.positions:
            yield [method.name, "position_nll", row.length, "", row.nll, "", "", row.num_tokens]
        for cell in method.passkey:
            yield [method.name, "passkey", cell.length, cell.depth, cell.accuracy, cell.low, cell.high, cell.num_trials]
