"""The exceptions of llmprune; each is the user's to mend and ends the command with code 2.

LlmpruneError
  RecipeError(ValueError)         the wish is malformed; starts with the key path
    UnknownName                   near match and the full list
  UnsupportedModel(ValueError)    what was found, what is missing, which file to write
  WontLoad(ValueError)            the planned shape has no loader; offers form or tier
  CheckpointError(OSError)        missing, damaged or hostile shard, with file and tensor
  NumericalError(ArithmeticError) site, statistic
  TooLarge(MemoryError)           needed and available, and which key lowers it
  LostProcess(RuntimeError)       a process of several has ended, and what resumes the run
"""

from __future__ import annotations


class LlmpruneError(Exception):
    """Base of all errors that a user can mend."""


class RecipeError(LlmpruneError, ValueError):
    """The recipe is malformed; the message starts with the key path."""


class UnknownName(RecipeError):
    """A name that no table holds; the message has the near match and the full list."""


class UnsupportedModel(LlmpruneError, ValueError):
    """A model that cannot be pruned, with what was found and what is missing."""


class WontLoad(LlmpruneError, ValueError):
    """The result has, or would have, no loader."""


class CheckpointError(LlmpruneError, OSError):
    """A checkpoint that is missing, damaged or hostile, with file and tensor."""


class NumericalError(LlmpruneError, ArithmeticError):
    """A value that is not finite, with the tensor that holds it."""


class TooLarge(LlmpruneError, MemoryError):
    """More memory or disk needed than there is, and which key lowers it."""


class LostProcess(LlmpruneError, RuntimeError):
    """One of the processes of a run has ended; with what goes on from there."""


def first_line(error: BaseException | str) -> str:
    """Return what an error of another library says, on one line; its kind where it says nothing.

    >>> first_line(ValueError("validation failed:\\n  two of one kind\\nmore"))
    'validation failed: two of one kind'
    """
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return "no message" if isinstance(error, str) else type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
