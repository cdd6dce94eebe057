"""SQuAD's metrics under the name by which tasks of lm-eval import them from transformers.

transformers 5 has no `transformers.data.metrics` any more; SCROLLS, CoQA, ReCoRD and others of lm-eval 0.4 import it.
"""

from __future__ import annotations

import importlib.util
import sys
import types

from longext.evals.longbench.metrics import f1, normalized_words

_PACKAGE, _MODULE = "transformers.data.metrics", "squad_metrics"


def normalize_answer(text: str) -> str:
    """Return an answer in lower case, without punctuation and articles (Rajpurkar et al., 2016)."""
    return " ".join(normalized_words(text))


def compute_exact(gold: str, answer: str) -> int:
    """Return 1 if two answers are the same once normalised, else 0."""
    return int(normalize_answer(gold) == normalize_answer(answer))


def compute_f1(gold: str, answer: str) -> float:
    """Return the F1 of the words of two answers; if one has none, 1 if the other has none either."""
    words = normalized_words(gold), normalized_words(answer)
    return f1(words[1], words[0]) if all(words) else float(words[0] == words[1])


def provide_squad_metrics() -> None:
    """Make `transformers.data.metrics.squad_metrics` importable where transformers does not have it."""
    if _PACKAGE in sys.modules or importlib.util.find_spec(_PACKAGE) is not None:
        return
    package, module = types.ModuleType(_PACKAGE), types.ModuleType(f"{_PACKAGE}.{_MODULE}")
    for function in (normalize_answer, compute_exact, compute_f1):
        setattr(module, function.__name__, function)
    setattr(package, _MODULE, module)
    sys.modules.update({_PACKAGE: package, module.__name__: module})
