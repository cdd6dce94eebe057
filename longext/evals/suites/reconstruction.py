"""Compress segments, decode them again from memory: BLEU-4, ROUGE-L, exact prefix, accuracy, bits saved.

Example: longext eval reconstruction out/uio --data books/ --ratio 4,8,16 --content text,shuffled,random
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from longext.errors import ConfigError
from longext.evals.base import AnswersEval, GivenAnswers, Outcome, Work, register
from longext.evals.views import SEVERAL, Detail, Lines, Section
from longext.options import DataConfig, RuntimeConfig
from longext.settings import MANY, option, override

if TYPE_CHECKING:
    from longext.evals.memory.reconstruction import CameBack, Source


def _estimate(value: Mapping[str, Any]) -> str:
    interval = "" if value.get("low") is None else f" ({value['low']:.3f} to {value['high']:.3f})"
    return f"{value['mean']:.3f}{interval}"


def _by_ratio(metric: str, title: str, unit: str, **more: Any) -> Lines:
    spell: Callable[[Any], str] = "{}x".format
    return Lines(
        title,
        of=f"results.metrics.{metric}.mean",
        name=metric.replace("_", "-"),
        unit=unit,
        columns="ratio",
        heading="ratio",
        spell=spell,
        panel="content",
        panel_name="content",
        axis="compression ratio",
        **more,
    )


_SECTION = Section(
    name="reconstruction",
    title="Reconstruction from memory",
    kind="reconstruction",
    measured=lambda record: {"segment": (record["model"].get("compressor") or {}).get("segment")},
    views=(
        _by_ratio(
            "bleu",
            "BLEU-4 of what came back, by compression ratio",
            "fraction",
            value="BLEU-4",
            details=(
                Detail("segments", "num_segments", "{:,}"),
                Detail("sentence", "metrics.sentence_bleu.mean", "{:.3f}"),
                Detail("median", "metrics.sentence_bleu.median", "{:.3f}"),
                Detail("ROUGE-L", "metrics.rouge_l", _estimate),
                Detail("exact prefix", "metrics.exact_prefix.mean", "{:.1%}"),
                Detail("exact match", "metrics.exact_match.mean", "{:.1%}"),
            ),
            note="greedy decoding; BLEU-4 of the corpus, then mean and median of single segments; no smoothing",
        ),
        _by_ratio(
            "accuracy",
            "Token accuracy, teacher-forced, by compression ratio",
            "percent",
            details=(
                Detail("CE memory", "metrics.ce_memory.mean", "{:.3f}"),
                Detail("CE none", "metrics.ce_none.mean", "{:.3f}"),
                Detail("CE base", "metrics.ce_base.mean", "{:.3f}"),
                Detail("bits saved", "metrics.bits_saved", _estimate),
            ),
            note="CE in nats per token: with the memory, without it (both after the repeat token), and of the base "
            "model alone; bits saved per token: (none - memory) / ln 2",
        ),
        _by_ratio("bits_saved", "Bits saved per token by compression ratio", "fraction", table=SEVERAL),
    ),
)


@register("reconstruction")
@dataclass(frozen=True, kw_only=True)
class Reconstruction(DataConfig, AnswersEval):
    """What comes back of a text from its memory."""

    kind: ClassVar[str] = "reconstruction"
    limit_option: ClassVar[str] = ""
    sections: ClassVar[tuple[Section, ...]] = (_SECTION,)

    model: str = override(RuntimeConfig, "model", help="Directory of a trained compressor.")
    revision: str | None = override(RuntimeConfig, "revision", is_flag=False)  # a compressor names its model's
    trust_remote_code: bool = override(RuntimeConfig, "trust_remote_code", is_flag=False)
    base: str | None = option(None, "The model it was trained on, if that has moved.")
    ratio: tuple[int, ...] | None = option(None, "Ratios, comma-separated (default: those of training).")
    content: tuple[str, ...] = option(("text",), "Of text, shuffled (words) and random (tokens), comma-separated.")
    num_samples: int = option(100, "Segments to reconstruct, drawn at random.", ge=1, le=MANY)
    batch_tokens: int | None = option(
        None, "Tokens per forward pass (default: 2048 on a CPU, 32768 on a GPU).", ge=1, panel="Running"
    )
    num_bootstrap: int = option(1000, "Bootstrap samples for the interval.", ge=0, le=MANY)

    def check(self) -> None:
        """Raise ConfigError for content that is none, or is named twice."""
        from longext.evals.memory.reconstruction import CONTENTS

        for name in self.content:
            CONTENTS[name]
        if not self.content or len(set(self.content)) < len(self.content):
            raise ConfigError(f"--content must be different of {', '.join(CONTENTS)}, got {','.join(self.content)}.")

    def read_data(self) -> Source:
        """Return the documents, and the ratios that the compressor can make."""
        from longext.evals.memory.reconstruction import read_source

        return read_source(self)

    def open_model(self) -> Any:
        """Return the compressor with its model, None if answers are given."""
        from longext.evals.memory.reconstruction import open_compressor

        return open_compressor(self) if self.predictions is None else None

    def given_score(self, where: str, row: Any) -> CameBack:
        """Return a line of answers.jsonl."""
        from longext.evals.memory.reconstruction import read_line

        return read_line(where, row)

    def measure(self, model: Any, data: Any, work: Work) -> Outcome:
        """Return the record."""
        from longext.evals.memory.reconstruction import measure_reconstruction, score_given

        given = isinstance(data, GivenAnswers)
        return score_given(self, data) if given else measure_reconstruction(self, model, data, work)
