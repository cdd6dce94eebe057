"""What serving engines make of an exported RoPE: the one table behind docs/engines.md, cards and `advise`.

Every entry says how it is known: "run" (perplexity or logits beside transformers; `benchmarks/engines.py` and the
sources named there) or "read" (in the code of the released version).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RIGHT, OTHER, REFUSED, UNKNOWN = "right", "other", "refused", "unknown"
RUN, READ = "run", "read"

# Kinds of `rope_parameters` that engines tell apart, with what they are.
KINDS = {
    "default": "another base, nothing else",
    "linear": "`linear`",
    "llama3": "`llama3`",
    "yarn": "`yarn` without an attention factor of its own",
    "yarn+attention": "`yarn` with `attention_factor`",
    "dynamic": "`dynamic`",
    "longrope-static": "`longrope` with equal short and long factors: any frequencies, any temperature",
    "longrope": "`longrope` with other factors up to L tokens than beyond",
}
LLAMA_CPP = "llama-cpp-python 0.3.36"
REMAPPED = "remapped"  # no checkpoint: positions are remapped inside attention


def kind_of(parameters: Mapping[str, Any]) -> str:
    """Return the kind of `rope_parameters` of one layer type; a name that is in no engine's table for others."""
    kind = str(parameters.get("rope_type") or "default")
    if kind == "yarn" and parameters.get("attention_factor") is not None:
        return "yarn+attention"
    if kind == "longrope" and parameters.get("short_factor") == parameters.get("long_factor"):
        return "longrope-static"
    return kind


@dataclass(frozen=True)
class Reading:
    """What one version of an engine makes of one kind.

    Attributes:
        verdict: `RIGHT`, `OTHER` (in silence another RoPE than transformers'), `REFUSED` or `UNKNOWN`.
        what: what it does instead, behind the engine's name; "" if it is right.
        evidence: `RUN` or `READ`.
        source: issues and pull requests, besides the engine's own source.
    """

    verdict: str
    what: str = ""
    evidence: str = READ
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine at one version.

    Attributes:
        source: where its RoPE is, or what was run.
        serve: the command that serves a checkpoint DIR at N tokens.
        override: flags that give the model as it is a RoPE; "" if there are none.
        is_current: it is developed further, so differences are told to everyone who extends a model.
        readings: by kind.
    """

    name: str
    version: str
    source: str
    serve: str
    override: str = ""
    is_current: bool = True
    readings: Mapping[str, Reading] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Return its name and version, "vLLM 0.33.0"."""
        return f"{self.name} {self.version.rpartition(' ')[2]}"

    def reading(self, kind: str) -> Reading:
        """Return what it makes of a kind."""
        return self.readings.get(kind, Reading(UNKNOWN, "was not looked at"))


def _readings(*right: str, evidence: str = READ, **others: Reading) -> dict[str, Reading]:
    """Return readings: kinds that are right, and others by name ("longrope_static" for "longrope-static")."""
    spelled = {"yarn_attention": "yarn+attention", "longrope_static": "longrope-static"}
    return {
        **{kind: Reading(RIGHT, evidence=evidence) for kind in right},
        **{spelled.get(name, name): reading for name, reading in others.items()},
    }


_OWN_TEMPERATURE = "takes YaRN's own temperature instead of attention_factor"
_LONGROPE_TEMPERATURE = "takes LongRoPE's temperature, sqrt(1 + ln s / ln L), instead of attention_factor"
_LATE_RAMP = "puts the ramp where the extended length has it, not the trained one"
_HF_OVERRIDE = '{"max_position_embeddings": N, "rope_parameters": {...}}'

ENGINES = (
    Engine(
        name="transformers",
        version="5.23.0",
        source="tests/parity/test_rope_parity.py and test_architectures.py",
        serve='AutoModelForCausalLM.from_pretrained("DIR")',
        override="config=AutoConfig.from_pretrained(BASE, rope_parameters={...}, max_position_embeddings=N)",
        readings=_readings(*KINDS, evidence=RUN),
    ),
    Engine(
        name="transformers",
        version="4.57.6",
        source="docs/results/engines/transformers-4.57.6.json",
        serve='AutoModelForCausalLM.from_pretrained("DIR")',
        override="config=AutoConfig.from_pretrained(BASE, rope_theta=..., rope_scaling={...})",
        readings=_readings(*KINDS, evidence=RUN),
    ),
    Engine(
        name="vLLM",
        version="0.33.0",
        source="vllm/model_executor/layers/rotary_embedding, vllm/config/model.py",
        serve="vllm serve DIR --max-model-len N",
        override=f"--max-model-len N --hf-overrides '{_HF_OVERRIDE}'",
        readings=_readings(
            *("default", "linear", "llama3", "yarn", "longrope-static"),
            yarn_attention=Reading(
                RIGHT, source="reads attention_factor since PR #56446 (2026-09), attn_factor before; both are written"
            ),
            dynamic=Reading(
                OTHER,
                "takes the served length for the trained one: the base's RoPE, and no table beyond L tokens",
                source="PR #41277 (2026-04; before it one static base, issue #41236)",
            ),
            longrope=Reading(OTHER, "takes the long factors for short texts too if --max-model-len is above L"),
        ),
    ),
    Engine(
        name="SGLang",
        version="0.5.23",
        source="sglang/srt/layers/rotary_embedding, srt/models/llama.py",
        serve="python -m sglang.launch_server --model-path DIR --context-length N",
        override=f"--context-length N --json-model-override-args '{_HF_OVERRIDE}'",
        readings=_readings(
            *("default", "linear", "llama3", "yarn", "longrope-static"),
            yarn_attention=Reading(RIGHT, source="reads attn_factor, which is written beside attention_factor"),
            dynamic=Reading(OTHER, "takes one static base at every length, NTK by a^2 - a + 1 (a = alpha)"),
            longrope=Reading(OTHER, "switches factors when a position of the batch passes L: a cache mixes both"),
        ),
    ),
    Engine(
        name="llama.cpp",
        version=LLAMA_CPP,
        source="2,048 tokens of the bundled story on books-5m, its own converter; conversion/base.py, src/models",
        serve="python convert_hf_to_gguf.py DIR --outfile MODEL.gguf && llama-server -m MODEL.gguf -c N",
        override="-c N with --rope-freq-base THETA (ntk, abf), --rope-scaling linear --rope-scale S, or "
        "--rope-scaling yarn --rope-scale S --yarn-orig-ctx L",
        readings=_readings(
            *("default", "linear", "yarn"),
            evidence=RUN,
            llama3=Reading(
                RIGHT, evidence=RUN, source="Llama and its kin; graphs that do not read rope_freqs (Qwen) ignore it"
            ),
            yarn_attention=Reading(
                OTHER, "multiplies attention_factor by its own 0.1 ln s + 1 once more", RUN, "PR #17945 has its order"
            ),
            dynamic=Reading(OTHER, "ignores dynamic NTK: the base's RoPE", RUN),
            longrope_static=Reading(OTHER, "ignores longrope but for Phi-3 and MiniCPM: the base's RoPE", RUN),
            longrope=Reading(OTHER, "ignores longrope but for Phi-3 and MiniCPM: the base's RoPE"),
        ),
    ),
    Engine(
        name="MLX",
        version="mlx-lm 0.32.2",
        source="docs/results/engines/mlx-0.32.2.json; mlx_lm/models/rope_utils.py",
        serve="mlx_lm.server --model DIR",
        readings=_readings(
            *("default", "linear", "llama3", "yarn"),
            evidence=RUN,
            yarn_attention=Reading(OTHER, _OWN_TEMPERATURE, RUN, "PR #1507 was closed"),
            dynamic=Reading(
                OTHER, "rotates each cached key by the length when it was written", source="one pass is right"
            ),
            longrope_static=Reading(OTHER, _LONGROPE_TEMPERATURE, RUN),
            longrope=Reading(OTHER, "takes the long factors at every length"),
        ),
    ),
    Engine(
        name="ExLlamaV3",
        version="1.4.1",
        source="exllamav3/util/rope.py",
        serve="python convert.py -i DIR -o OUT -w WORK -b 4.0, then OUT in TabbyAPI with max_seq_len: N",
        readings=_readings(
            *("default", "linear", "llama3", "yarn", "yarn+attention"),
            dynamic=Reading(REFUSED, "does not know it"),
            longrope_static=Reading(OTHER, _LONGROPE_TEMPERATURE),
            longrope=Reading(OTHER, "takes the long factors for short texts too"),
        ),
    ),
    Engine(
        name="ExLlamaV2",
        version="0.3.2",
        source="exllamav2/config.py, exllamav2/rope.py",
        serve="python convert.py -i DIR -o WORK -cf OUT -b 4.0, then OUT in TabbyAPI with max_seq_len: N",
        override="-l N with -rs S (linear), -ra A (ntk)",
        is_current=False,
        readings=_readings(
            *("default", "linear", "llama3"),
            yarn=Reading(OTHER, _LATE_RAMP),
            yarn_attention=Reading(OTHER, _LATE_RAMP),
            dynamic=Reading(OTHER, "ignores it: the base's RoPE"),
            longrope_static=Reading(OTHER, _LONGROPE_TEMPERATURE),
            longrope=Reading(OTHER, "takes the long factors for short texts too"),
        ),
    ),
    Engine(
        name="TGI",
        version="3.3.7",
        source="server/text_generation_server/layers/rotary.py; in maintenance mode, says its README",
        serve="text-generation-launcher --model-id DIR --max-total-tokens N",
        is_current=False,
        readings=_readings(
            *("default", "llama3", "yarn"),
            linear=Reading(OTHER, "ignores it: the base's RoPE"),
            yarn_attention=Reading(OTHER, _OWN_TEMPERATURE),
            dynamic=Reading(OTHER, "rotates by the longest text it has seen, cached keys by an earlier one"),
            longrope_static=Reading(OTHER, "multiplies frequencies by the temperature"),
            longrope=Reading(OTHER, "multiplies frequencies by the temperature"),
        ),
    ),
)


def readers(kind: str) -> list[str]:
    """Return the engines that read a kind as transformers does, "vLLM 0.33.0"; none for `REMAPPED`."""
    return [each.title for each in ENGINES if each.reading(kind).verdict == RIGHT]


def serving_engines() -> list[Engine]:
    """Return the engines that are developed further, besides transformers."""
    return [each for each in ENGINES if each.is_current and each.name != "transformers"]


def engine_notes(parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """Return one line on the engines that read these `rope_parameters` otherwise in silence; none if there are none."""
    kind = kind_of(parameters)
    others = [each for each in ENGINES if each.is_current and each.reading(kind).verdict == OTHER]
    if not others:
        return ()
    told = "; ".join(f"{each.title} {each.reading(kind).what}" for each in others)
    is_static = kind in ("yarn+attention", "longrope-static")
    way = " For llama.cpp, `longext export gguf` carries it (Llama)." if is_static else ""
    return (f"Some engines make something else of this RoPE, in silence: {told}.{way}",)


def gguf_note() -> str:
    """Return one line on who reads a GGUF file of longext rightly."""
    return f"Read as transformers 5 reads the method by llama.cpp ({LLAMA_CPP}, run); older ones were not run."


def readers_note(parameters: Mapping[str, Any]) -> str:
    """Return one line on the engines that are developed further and read these `rope_parameters` rightly."""
    kind = kind_of(parameters)
    right = [each.title for each in ENGINES if each.is_current and each.reading(kind).verdict == RIGHT]
    return f"Read rightly by {', '.join(right)}." if right else "No engine is known to read this RoPE rightly."
