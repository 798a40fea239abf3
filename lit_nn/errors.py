"""Errors that a user can cause, and the names that may be chosen. Nothing here imports torch."""

import difflib
import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class UsageError(ValueError):
    """Something was asked for that cannot be done; the message says what was given and what is allowed."""

    exit_status = 2


class Ended(Exception):
    """A command has come to an end before its last line; the message says why, ``exit_status`` whether it is good."""

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class ModelError(Exception):
    """A file is not a model of this project; the message says what is wrong with it."""

    exit_status = 1


def did_you_mean(given: str, allowed: Iterable[str], cutoff: float = 0.5) -> str:
    """The allowed names most like a mistyped one, for a message: " Did you mean lenet?", or ""."""
    close = difflib.get_close_matches(str(given), list(dict.fromkeys(allowed)), n=3, cutoff=cutoff)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def look_up(table: Mapping[str, T], name: str, what: str) -> T:
    """Find a named entry; UsageError names the nearest and all allowed ones. ``what`` is its kind: "net", "loss"."""
    if name in table:
        return table[name]
    raise UsageError(f"unknown {what} '{name}'.{did_you_mean(name, table)} Allowed: {', '.join(table) or 'none'}")


def options_of(function: Callable[..., Any], given: Iterable[str], own: set[str], what: str) -> list[str]:
    """All arguments of a function or class but its ``own``; UsageError if others are given."""
    allowed = [name for name in inspect.signature(function).parameters if name not in own]
    for name in given:
        look_up(dict.fromkeys(allowed), name, what)
    return allowed


def other_classes(known: Iterable[str], found: Iterable[str], same_kind: bool = True) -> str:
    """In which classes, or kind of labels, a data set differs from those that a model knows; "" if in none."""
    if not same_kind:
        return "one label for each image where the model has several, or the other way round"
    known, found = list(known), list(found)
    if known == found:
        return ""
    both = (sorted(set(one) - set(two)) for one, two in ((known, found), (found, known)))
    texts = [", ".join(names[:10]) + f" and {len(names) - 10} more" * (len(names) > 10) for names in both]
    return f"other classes than the model: lacking {texts[0] or 'none'}; new {texts[1] or 'none'}"


def brief(error: BaseException) -> str:
    """The first line of what an error says; its kind if it says nothing."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


def place(error: BaseException) -> str:
    """File and line of the innermost call outside of installed packages, where an error came from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in Path(f.filename).parts]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"
