"""What ships inside the package: one tiny real checkpoint, one sample document, one set of questions, one of facts."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent.parent / "assets"

# name -> directory; accepted wherever a model is.
BUNDLED_MODELS = {"books-5m": ASSETS / "books-5m"}

# The story behind `--data sample`, written for this project.
SAMPLE_DOCUMENT = ASSETS / "sample.txt"

# 70 paragraphs with 260 questions, written for this project: what RULER's qa tasks ask without a file.
QUESTIONS = ASSETS / "questions.jsonl"

# Facts and questions on them that share no word, written for this project: what `eval nolit` hides.
FACTS = ASSETS / "facts.jsonl"


def is_bundled(directory: Path) -> bool:
    """True for a checkpoint inside the package: its files are copied, never shared with a user's directory."""
    return directory.resolve() in {bundled.resolve() for bundled in BUNDLED_MODELS.values()}
