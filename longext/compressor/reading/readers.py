"""Models that read a text segment by segment and remember what came before in one of several ways, as `LanguageModel`.

A text is cut from its first token into segments of l tokens. The outputs of a segment predict its own tokens but the
first, and the first token of the next: the token at index j is scored by the segment that holds index j - 1.

Shape legend: B texts, T tokens of a text, n scored tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from longext.checkpoint.load import MAPPED
from longext.compressor.backbone import Backbone
from longext.compressor.base import Compressor, build_compressor
from longext.compressor.checkpoint import DESCRIPTION, WEIGHTS, is_compressor, load_compressor, read_description
from longext.compressor.kv_policies import KV_POLICIES
from longext.compressor.kv_policies.streaming import Streaming
from longext.compressor.reading.budgets import Budget
from longext.compressor.reading.eviction import QUESTION, PolicyTrail
from longext.compressor.reading.held import HeldSession
from longext.compressor.reading.kv_memory import attends_by_interface, is_policy, open_policy, policy_of, policy_summary
from longext.compressor.reading.session import UNTRAINED, Session
from longext.compressor.reading.trails import CompressorTrail, Stream, Trail, WindowTrail
from longext.compressor.schedule import Ratio
from longext.compressor.spec import CompressorSpec
from longext.errors import ConfigError
from longext.models.decode import continue_rows
from longext.models.head import head_is_plain
from longext.models.hf import HFLanguageModel, load_language_model, score_hidden
from longext.models.methods import remap_request
from longext.models.protocol import TokenScores
from longext.models.rotary import LENGTH_DEPENDENT
from longext.options import RuntimeConfig
from longext.registry import Registry, did_you_mean

DEFAULT_SEGMENT = 128
_THINNED = "raw keys and values of each segment read by itself, one of every so many tokens kept"


def _of_model(name: str) -> Any:
    """Return the property `name` of a reader's model."""
    return property(
        lambda reader: getattr(reader.plain, name), lambda reader, value: setattr(reader.plain, name, value)
    )


class Reader:
    """A `LanguageModel` that reads segments, each given what a `Trail` kept of those before it.

    Args:
        plain: the model by itself.
        spec: the memory as the user spelled it.
        segment: l.
        open_trail: makes the trail of a new batch of texts.
        size: raw tokens that stay readable, or how many of so many tokens do (for compressors: None).
        facts: what a result says of the memory.
        compressor, ratio: for compressors.
    """

    def __init__(
        self,
        plain: HFLanguageModel,
        spec: str,
        segment: int,
        open_trail: Callable[[], Trail],
        *,
        size: int | Callable[[int], int] | None = None,
        facts: dict[str, Any] | None = None,
        compressor: Compressor | None = None,
        ratio: Ratio = 0,
    ) -> None:
        self.plain, self.spec, self.segment, self.open_trail = plain, spec, segment, open_trail
        self.size, self.facts, self.compressor, self.ratio = size, facts or {}, compressor, ratio
        self.name = f"{plain.name} + {spec}"

    # what its model is and does by itself
    device, tokenizer, prefix = _of_model("device"), _of_model("tokenizer"), _of_model("prefix")
    ending_tokens, trained_length = _of_model("ending_tokens"), _of_model("trained_length")
    context_length, weights_checksum = _of_model("context_length"), _of_model("weights_checksum")
    encode, decode, asking = _of_model("encode"), _of_model("decode"), _of_model("asking")
    follows_length = False  # a rotation depends on the segment at most, never on how long the text is

    def describe(self) -> dict[str, Any]:
        """Return the model part of a result record, with the memory."""
        model = self.plain.describe()
        attention = model["attention"].replace("full", "by segments", 1)
        memory = {"spec": self.spec, "segment": self.segment, **self.facts}
        return {**model, "id": self.name, "attention": attention, "memory": memory}

    @torch.no_grad()
    def score(self, input_ids: torch.Tensor, first: int) -> TokenScores:
        """Score tokens first .. T-1 of int64 [B, T]; segments before the first scored one are only written."""
        assert first >= 1, "the first token of a text has nothing to be predicted from"
        ids = input_ids.to(self.device)
        last = ids.shape[1] - 1  # this token is only predicted
        trail = self.open_trail()
        trail.ask(ids[:, max(0, first - QUESTION) : first])
        parts = []
        for start in range(0, last, self.segment):
            end = min(start + self.segment, last)
            tokens = ids[:, start:end]
            if end >= first:
                skip = max(0, first - 1 - start)
                hidden = self.read_segment(trail, tokens, advance=end < last)[:, skip:]
                parts.append(score_hidden(self.plain.model, hidden, ids[:, start + skip + 1 : end + 1]))
            elif end < last:
                trail.write(tokens)
        return TokenScores(torch.cat([part.nll for part in parts], 1), torch.cat([part.is_top1 for part in parts], 1))

    @torch.no_grad()
    def greedy(self, input_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the greedy continuation of one prompt, with a KV cache within a segment.

        A RoPE that follows the length of the text allows no cache: there each new token reads its own segment again.
        """
        stream = self.stream(input_ids)
        return continue_rows(stream.next_logits, stream.add, max_new_tokens, self.ending_tokens)[0]

    @torch.no_grad()
    def greedy_rows(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Return what `greedy` returns of each of several prompts, all of one length; they are read together."""
        stream = self._stream(torch.tensor([list(ids) for ids in prompts], device=self.device))
        count = len(prompts)
        return continue_rows(stream.next_logits, stream.add, max_new_tokens, self.ending_tokens, num_rows=count)

    def stream(self, input_ids: Sequence[int], advance: Callable[[int], object] = lambda _: None) -> Stream:
        """Return one text as it is read, its tokens so far taken; `advance` as in `Stream.add`."""
        return self._stream(torch.tensor([list(input_ids)], device=self.device), advance)

    def _stream(self, tokens: torch.Tensor, advance: Callable[[int], object] = lambda _: None) -> Stream:
        """Return texts of one length, int64 [B, T], as they are read."""
        stream = HeldSession(self)
        stream.trail.ask(tokens[:, -QUESTION:])
        stream.add(tokens, advance)
        return stream

    def session(self, when_full: str | None = None) -> Session | HeldSession:
        """Return an empty text that is read with this memory and continued.

        Args:
            when_full: of a compressor's (see `Session`).

        Raises:
            ConfigError: `when_full` of a memory whose size is bounded, or as `Session`.
        """
        if self.compressor is None:
            if when_full is not None:
                raise ConfigError(f"--memory {self.spec} keeps so much and no more: leave --when-full out.")
            return HeldSession(self)
        ends = self.plain.ending_tokens
        return Session(self.compressor, ratio=self.ratio, when_full=when_full, ends=ends)

    def num_readable(self, length: int) -> int:
        """Return the raw tokens or slots that stay readable of `length` tokens."""
        assert self.size is not None
        return min(length, self.size if isinstance(self.size, int) else self.size(length))

    @property
    def is_uncached(self) -> bool:
        """True if the rotation follows the length of the text, so that a segment is read anew for every token."""
        return self.compressor is None and self.plain.rope_type in LENGTH_DEPENDENT

    def read_segment(self, trail: Trail, tokens: torch.Tensor, *, advance: bool = False) -> torch.Tensor:
        """Return the last hidden states of a segment; with `advance` go past it."""
        if self.compressor is None:  # a compressor holds its model's rotation at one length
            self.plain.reset_rope()
        return trail.advance(tokens) if advance else trail.read(tokens)


# --- kinds of memory --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryKind:
    """One way of remembering that needs no training; its summary is in the registry.

    Attributes:
        reference: for reports.
        form: how it is spelled, with as many numbers of tokens as `num_sizes`.
        trail: (the frozen model, first tokens, last tokens, `attends` of `PolicyTrail`) -> a trail that keeps so many.
        moves: it turns keys, so a RoPE that follows the length of the text cannot be used.
    """

    reference: str
    form: str
    num_sizes: int
    trail: Callable[[Backbone, int, int, bool], Trail]
    moves: bool = False

    def open(self, backbone: Backbone, argument: str, segment: int) -> tuple[Callable[[], Trail], int]:
        """Return (maker of trails, tokens that stay readable) of a memory spelled NAME:argument.

        Raises:
            ConfigError: other numbers than it takes, no room for them, or a model whose keys cannot be turned.
        """
        name, form = self.form.partition(":")[0].rstrip("["), self.form.replace("[", "").replace("]", "")
        sizes = argument.split("+") if argument else []
        if sizes and not self.num_sizes:
            raise ConfigError(f"--memory {name} takes no size, got '{name}:{argument}'.")
        if not sizes and form != self.form:
            sizes = [str(max(0, backbone.window - segment))]  # all that fits
        if len(sizes) != self.num_sizes or not all(size.isdecimal() for size in sizes):
            raise ConfigError(f"--memory {form} takes whole numbers of tokens there, got '{argument}'.")
        num_first, num_last = [0, 0, *map(int, sizes)][-2:]
        size, window = num_first + num_last, backbone.window
        if size + segment > window:
            spelled = f"{name}:{'+'.join(sizes)}" if sizes else name
            raise ConfigError(
                f"--memory {spelled} keeps {size} tokens next to a segment of {segment}, and the model has {window} "
                f"positions: keep at most {max(0, window - segment)}, or shorten --segment."
            )
        if self.moves:
            backbone.check_rotation()
        return partial(self.trail, backbone, num_first, num_last, self.moves and attends_by_interface(backbone)), size


def _window(backbone: Backbone, _: int, size: int, __: bool) -> Trail:
    return WindowTrail(backbone, size)


def _newest(backbone: Backbone, num_first: int, size: int, attends: bool) -> Trail:
    budget = Budget(num_first + size, 0, num_first + size, len(backbone.layers))
    return PolicyTrail(backbone, Streaming(num_sinks=num_first), budget, attends)


MEMORIES: Registry[MemoryKind] = Registry("memory")
MEMORIES.register("none", MemoryKind("control", "none", 0, _window), "the segment alone")
MEMORIES.register(
    "window",
    MemoryKind("sliding window", "window[:N]", 1, _window),
    "the last N raw tokens, read again with every segment",
)
MEMORIES.register(
    "streaming",
    MemoryKind("StreamingLLM, arXiv 2309.17453", "streaming:4+N", 2, _newest, moves=True),
    "keys and values of the first tokens and of the last N; evicted after every segment, positions in the cache",
)
MEMORIES.register(
    "transformer-xl",
    MemoryKind(
        "Transformer-XL, arXiv 1901.02860, as a cache of a frozen model", "transformer-xl:N", 1, _newest, moves=True
    ),
    "keys and values of the last N tokens as earlier segments computed them, at positions 0 .. N - 1",
)


# --- from text to reader ----------------------------------------------------------------------------------------------


def load_reader(
    config: RuntimeConfig,
    spec: str,
    *,
    segment: int | None = None,
    method: str | None = None,
    factor: float | None = None,
) -> Reader:
    """Load what `--memory SPEC` names.

    Args:
        config: its `model` is the base model; for a compressor its directory now, or "" for that of training.
        spec: none, window[:N], streaming:S+N, transformer-xl:N, a KV policy (snapkv:N slots or snapkv:Rx, +M for the
            newest tokens besides), thinned:R (raw keys, one of R tokens), or OUT[@R] with OUT a trained compressor; R
            may be several ratios by distance and +OVERLAP raw tokens last: 2,4,8+256.
        method, factor: a RoPE extension applied in memory first, as `load_language_model` does (no compressors).

    Raises:
        ConfigError: unknown spec, a size or ratio out of range, or a model whose cache cannot be used so.
        CheckpointError: the model or compressor cannot be read.
    """
    if config.device == MAPPED:
        raise ConfigError("--memory needs the model on one device: use --device auto, cpu, cuda, cuda:N or mps.")
    trained = find_compressor(spec)
    if trained is not None:
        if method not in (None, "none"):
            raise ConfigError(f"--method {method} would change the model under a compressor that was trained on it.")
        return _compressor_reader(config, spec, *trained, segment)
    name, _, argument = spec.partition(":")
    length = DEFAULT_SEGMENT if segment is None else segment
    is_kept = is_policy(name) and name not in MEMORIES
    if method is not None and remap_request(method, factor) is not None:
        raise ConfigError(
            f"--method {method} moves positions inside a window of its own, and a memory has other ones: give an "
            "extension (linear, ntk, yarn, ...) with --memory, or leave one of the two out."
        )
    if is_kept:
        policy_of(spec)  # before anything is loaded
    plain = load_language_model(config, method, factor)
    if not head_is_plain(plain.model):
        raise ConfigError(
            f"{type(plain.model).__name__} makes its logits in a way that longext cannot run by segments."
        )
    if name == UNTRAINED:
        return _thinned_reader(plain, spec, argument, length)
    moves = is_kept or MEMORIES[name].moves
    if moves and plain.rope_type in LENGTH_DEPENDENT:
        raise ConfigError(
            f"--memory {name} keeps keys that are rotated already, and this model's {plain.rope_type} RoPE changes "
            "with the length of the text: use window, or another RoPE method."
        )
    if is_kept:
        return _policy_reader(plain, spec, length)
    kind = MEMORIES[name]
    open_trail, size = kind.open(Backbone(plain.model), argument, length)
    facts = {"kind": name, "definition": MEMORIES.summary(name), "reference": kind.reference, "size": size}
    return Reader(plain, spec, length, open_trail, size=size, facts=facts)


def _policy_reader(plain: HFLanguageModel, spec: str, segment: int) -> Reader:
    opened, policy, budget = open_policy(Backbone(plain.model), spec, segment)
    facts = {
        "kind": spec.partition(":")[0],
        "definition": policy_summary(spec),
        "reference": policy.reference,
        "query_aware": policy.aware,
        **{part: getattr(budget, part) or None for part in ("slots", "ratio", "newest", "most", "shape")},
    }
    return Reader(plain, spec, segment, opened, size=budget.at, facts=facts)


def find_compressor(spec: str) -> tuple[Path, Ratio | None, int | None] | None:
    """Return (directory, ratio, overlap) if `spec` names a trained compressor, None if it names another memory.

    Ratio and overlap are None if OUT comes alone; OUT@RATIO, OUT@RATIO,RATIO,... (by distance) and +OVERLAP give them.

    Raises:
        ConfigError: it names neither.
    """
    name = spec.partition(":")[0]
    if name in MEMORIES or name == UNTRAINED or is_policy(name):
        return None
    if is_compressor(spec):
        return Path(spec).expanduser(), None, None
    directory, at, sizes = spec.rpartition("@")
    if at and is_compressor(directory):
        return Path(directory).expanduser(), *read_sizes(f"{directory}@", sizes)
    if Path(spec).expanduser().is_file():
        raise ConfigError(
            f"--memory {spec} is a file: `generate`, `chat` and `memory build` go on from one, and nothing else does. "
            "Name the kind of memory, as in OUT@8, thinned:8 or snapkv:256."
        )
    hint, _, _ = did_you_mean(name, [*MEMORIES, *KV_POLICIES, UNTRAINED]).rpartition("Available")
    forms = ", ".join([*(MEMORIES[known].form for known in MEMORIES), f"{UNTRAINED}:R"])
    raise ConfigError(
        f"--memory '{spec}' is no trained compressor (no {DESCRIPTION} there) and no known memory. {hint}Give {forms}, "
        f"a KV policy with its slots or ratio ({', '.join(KV_POLICIES)}; as in snapkv:256, snapkv:8x, snapkv:192+64), "
        "or the -o directory of `longext compress-train`, with @ratio, @2,4,8 (by distance) or @ratio+overlap."
    )


def read_sizes(name: str, sizes: str) -> tuple[Ratio, int | None]:
    """Return (ratio or several by distance, overlap or None) of RATIO[,RATIO...][+OVERLAP] (ConfigError if not so)."""
    spelled_ratios, plus, overlap = sizes.partition("+")
    ratios = spelled_ratios.split(",")
    whole = [*ratios, *([overlap] if plus else [])]
    if not all(number.isdecimal() for number in whole) or min(map(int, ratios)) < 1:
        raise ConfigError(f"--memory {name}RATIO,RATIO,...+OVERLAP takes whole numbers, got '{sizes}'.")
    numbers = tuple(map(int, ratios))
    return numbers if len(numbers) > 1 else numbers[0], int(overlap) if plus else None


def _thinned_reader(plain: HFLanguageModel, spec: str, sizes: str, segment: int) -> Reader:
    """Return the reader of raw keys and values, one of every so many tokens: an anchor that nothing was trained of."""
    ratio, overlap = read_sizes(f"{UNTRAINED}:", sizes)
    ratios = (ratio if isinstance(ratio, int) else ratio[0],)
    whole = CompressorSpec(arch="anchor", rank=1, alpha=1.0, segment=segment, ratios=ratios, overlap=overlap or 0)
    compressor = build_compressor(Backbone(plain.model), whole)
    facts = {"kind": UNTRAINED, "definition": _THINNED, "reference": compressor.reference}
    return _reader_of(plain, spec, compressor, ratio, facts)


def _reader_of(
    plain: HFLanguageModel, spec: str, compressor: Compressor, ratio: Ratio | None, facts: dict[str, Any]
) -> Reader:
    ratio = compressor.find_ratio(ratio)
    facts = {
        **facts,
        "compressor": compressor.spec.to_json(),
        "ratio": ratio if isinstance(ratio, int) else list(ratio),
    }
    open_trail = partial(CompressorTrail, compressor, ratio, thins=compressor.nested)
    length = compressor.spec.segment
    return Reader(plain, spec, length, open_trail, facts=facts, compressor=compressor, ratio=ratio)


def _compressor_reader(
    config: RuntimeConfig, spec: str, directory: Path, ratio: Ratio | None, overlap: int | None, segment: int | None
) -> Reader:
    # a base given under the name it was trained as keeps its revision
    is_named = config.model in ("", read_description(directory)["base_model"])
    loaded = load_compressor(
        directory,
        base=None if is_named else config.model,
        device=config.device,
        dtype=config.dtype,
        attention=config.attention,
    )
    compressor = loaded.compressor
    if overlap is not None:  # raw text needs no training to be read
        compressor.spec = dataclasses.replace(compressor.spec, overlap=overlap)
    length = compressor.spec.segment
    if segment not in (None, length):
        raise ConfigError(f"--segment {segment}: the segments of {directory} have {length} tokens; leave it out.")
    facts = {
        "kind": "compressor",
        "definition": compressor.summary,
        "reference": compressor.reference,
        "num_parameters": sum(p.numel() for p in compressor.parameters()),
        "weights_sha256": hashlib.sha256((directory / WEIGHTS).read_bytes()).hexdigest(),
    }
    return _reader_of(loaded.plain, spec, compressor, ratio, facts)


def memory_defaults(spec: str) -> dict[str, Any]:
    """Return what a memory says of settings that the user left open: a compressor's `model` and `segment`.

    Raises:
        ConfigError, CheckpointError: no such memory.
    """
    trained = find_compressor(spec)
    if trained is None:
        return {}
    description = read_description(trained[0])
    return {"model": description["base_model"], "segment": description["spec"]["segment"]}
