"""Every method on the same documents, seeds and protocols, in one run: what each gains and what it costs."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from longext.checkpoint.extend import ExtensionPlan, extended_config, plan_extension
from longext.checkpoint.rope_config import read_model_rope
from longext.checkpoint.source import read_config, resolve_model
from longext.config import CompareConfig, ExtendConfig, PasskeyConfig, PerplexityConfig, build_config
from longext.data.documents import data_hash, load_documents
from longext.errors import ConfigError
from longext.evaluation.model import HFLanguageModel, load_language_model
from longext.evaluation.passkey import (
    PASSKEY_PROTOCOLS,
    PasskeyCell,
    accuracy_by_length,
    check_passkey_config,
    check_prompts,
    evaluate_passkey,
    num_prompts,
)
from longext.evaluation.perplexity import (
    PERPLEXITY_PROTOCOLS,
    PerplexityAtLength,
    Progress,
    TokenizedDocument,
    check_perplexity_config,
    evaluate_perplexity,
    num_forward_tokens,
    tokenize_documents,
)
from longext.evaluation.protocol import result_record
from longext.rope.methods import ROPE_METHODS


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """What one method did.

    Attributes:
        name: as the user spelled it, for example "yarn" or "dynamic:alpha=8".
        rope_parameters: what `extend` would write.
        formula: its formula.
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


def parse_method(text: str, config: CompareConfig) -> ExtendConfig:
    """Return the `extend` request that "name" or "name:key=value:key=value" stands for.

    Raises:
        ConfigError: unknown method or parameter.
    """
    name, *settings = re.split(r":(?=[A-Za-z_-]+=|$)", text)
    ROPE_METHODS[name]
    if name == "none" and settings:
        raise ConfigError(f"`none` is the model as it is and takes no parameters, got '{text}'.")
    settings = [_underscored(setting) for setting in settings]
    typed: dict[str, Any] = {"model": config.model, "method": name, "revision": config.revision}
    if not any(setting.startswith("factor=") for setting in settings):
        typed["factor"] = config.factor
    return build_config(ExtendConfig, None, settings, typed)


def _underscored(setting: str) -> str:
    key, separator, value = setting.partition("=")
    return f"{key.replace('-', '_')}{separator}{value}"


def plan_methods(config: CompareConfig) -> dict[str, ExtensionPlan | None]:
    """Return the extension plan of every method asked for, by the name the user gave it; None for the model as it is.

    Raises:
        ConfigError: unknown, repeated or impossible method.
    """
    if not config.methods:
        raise ConfigError("--methods needs at least one method, for example none,linear,yarn.")
    if len(set(config.methods)) != len(config.methods):
        raise ConfigError(f"--methods names one method twice: {','.join(config.methods)}.")
    requests = {name: parse_method(name, config) for name in config.methods}
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
    trained = base.spec.original_max_position_embeddings
    lengths = tuple(sorted({*config.lengths, *(() if min(config.lengths) <= trained else (trained,))}))
    ppl_config = _perplexity_config(config, lengths, "sliding")
    position_config = _perplexity_config(config, lengths, "positional")
    passkey_config = _passkey_config(config) if config.passkey else None
    check_perplexity_config(ppl_config)
    if passkey_config is not None:
        check_passkey_config(passkey_config)
    documents = load_documents(ppl_config)
    model = load_language_model(config)
    tokenized, num_short = tokenize_documents(model, documents, ppl_config)
    work = num_forward_tokens(tokenized, ppl_config) + num_forward_tokens(tokenized, position_config)
    if passkey_config is not None:
        check_prompts(model, passkey_config)
        work += sum(config.lengths) * num_prompts(passkey_config) // len(config.lengths)
    plain = read_config(directory)
    results = []
    for index, (name, plan) in enumerate(plans.items(), 1):
        with progress(f"{name} ({index}/{len(plans)})", work, "tokens") as advance:
            model.set_rope(plain if plan is None else extended_config(plan))
            evaluate = functools.partial(_run_method, model, name, tokenized, ppl_config, position_config)
            spec, parameters = (base.spec, base.parameters) if plan is None else (plan.spec, plan.parameters)
            results.append(evaluate(passkey_config, advance, ROPE_METHODS[spec.method].formula, parameters))
        if announce:
            announce(_one_line(results[-1]))
    short = max(length for length in lengths if length <= max(trained, min(lengths)))
    model.set_rope(plain)
    record = _record(config, model, results, documents, tokenized, num_short, trained, short)
    return Comparison(trained_length=trained, short_length=short, methods=results, record=record)


def _run_method(
    model: HFLanguageModel,
    name: str,
    documents: Sequence[TokenizedDocument],
    ppl_config: PerplexityConfig,
    position_config: PerplexityConfig,
    passkey_config: PasskeyConfig | None,
    advance: Progress,
    formula: str,
    parameters: dict[str, Any],
) -> MethodResult:
    """Run the evaluations on the RoPE that `model` has now."""
    started = time.perf_counter()
    perplexity = evaluate_perplexity(model, documents, ppl_config, advance)
    positions = evaluate_perplexity(model, documents, position_config, advance)
    cells: list[PasskeyCell] = []
    if passkey_config is not None:
        mean_length = sum(passkey_config.lengths) // len(passkey_config.lengths)
        cells = evaluate_passkey(model, passkey_config, lambda prompts: advance(prompts * mean_length))
    return MethodResult(
        name=name,
        rope_parameters=parameters,
        formula=formula,
        perplexity=perplexity,
        positions=positions,
        passkey=cells,
        seconds=time.perf_counter() - started,
    )


def _perplexity_config(config: CompareConfig, lengths: tuple[int, ...], protocol: str) -> PerplexityConfig:
    return PerplexityConfig(**_shared(config, PerplexityConfig), lengths=lengths, protocol=protocol)


def _passkey_config(config: CompareConfig) -> PasskeyConfig:
    return PasskeyConfig(**_shared(config, PasskeyConfig), lengths=config.lengths)


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
    documents: Any,
    tokenized: Sequence[TokenizedDocument],
    num_short: int,
    trained: int,
    short: int,
) -> dict[str, Any]:
    protocols = {
        "perplexity": {
            "id": "ppl/sliding",
            "stride": config.stride,
            "definition": PERPLEXITY_PROTOCOLS["sliding"].summary,
        },
        "positions": {"id": "ppl/positional", "definition": PERPLEXITY_PROTOCOLS["positional"].summary},
        "passkey": {"id": "passkey/landmark", "definition": PASSKEY_PROTOCOLS["landmark"].summary}
        if config.passkey
        else None,
        "seed": config.seed,
    }
    data = {
        "source": config.data,
        "sha256": data_hash(documents),
        "num_documents": len(tokenized),
        "num_too_short": num_short,
        "num_tokens": sum(len(document.input_ids) for document in tokenized),
    }
    return result_record(
        "compare",
        model.describe(),
        protocols,
        data,
        trained_length=trained,
        short_length=short,
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
