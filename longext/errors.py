"""The exceptions a user can meet.

LongextError            a run failed (exit code 1)
  ConfigError           a flag, recipe or method parameter is wrong (exit code 2)
    DisagreementError   the processes of a run found different things (exit code 2)
  CheckpointError       the model given cannot be used (exit code 2)
  DataError             the documents given cannot be used (exit code 2)
  MissingExtraError     an optional package is needed (exit code 2)
  VerificationError     a check of `longext verify` failed (exit code 1)
  TrainingError         a training run cannot go on: wrong RoPE, NaN loss, empty adapter (exit 1)
    TrainingStopped     a signal stopped it after a checkpoint was saved (exit code 128 + signal)

Every message is one line: what was given, what is allowed, what to do.
"""

from __future__ import annotations

from typing import TypeVar

ErrorT = TypeVar("ErrorT", bound="LongextError")

# Set for the workers of `--num-processes`: the process id of the launcher, which prints what they have to say.
LAUNCHED_BY_US = "LONGEXT_LAUNCHED"


class LongextError(Exception):
    """A run failed for a reason the user can read; the command exits with `exit_code`.

    `everywhere` is True for what all processes of a run raise at once: the main one prints it. `concept` names the
    idea of `longext.concepts` that the error is about, which `--explain` explains.
    """

    exit_code = 1
    everywhere = False
    concept = ""

    def about(self: ErrorT, concept: str) -> ErrorT:
        """Say which concept the error is about, and return it: `raise ConfigError("...").about("factor")`."""
        self.concept = concept
        return self


class ConfigError(LongextError):
    """A flag, recipe key or method parameter is out of range or unknown."""

    exit_code = 2


class DisagreementError(ConfigError):
    """The processes of a run found different data, settings or checkpoints; each of them raises it."""

    everywhere = True


class CheckpointError(LongextError):
    """The model path or id cannot be read, or is of a kind longext cannot extend."""

    exit_code = 2


class DataError(LongextError):
    """A document source is missing, unreadable or too short."""

    exit_code = 2


class MissingExtraError(LongextError):
    """An optional package is needed; the message ends with its install line."""

    exit_code = 2


class VerificationError(LongextError):
    """A checkpoint differs from what was promised; the message names the culprit key."""


class TrainingError(LongextError):
    """A training run cannot go on; the message names the step, and the batch where one is to blame."""


class TrainingStopped(TrainingError):
    """A signal ended a training run after a checkpoint was saved; the exit code is the shell's for that signal."""

    everywhere = True

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class LongextWarning(UserWarning):
    """Something was decided for the user that they may want to know."""
