"""What a data set has to say to its user. Nothing here imports torch."""

import difflib
from collections.abc import Collection, Iterable


class DataError(Exception):
    """A data set cannot be had or used; the message says what was tried and what to do instead."""

    exit_status = 1


class OptionError(ValueError):
    """An option of a data set has a value that it cannot have; the message says what is allowed."""

    exit_status = 2


class DataNote(UserWarning):
    """Something about the data that its user should know, though it can be used; commands print it as a line."""


def some(names: Iterable[str]) -> str:
    """Names joined by commas, of many only the first ten."""
    names = list(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def unknown(what: str, name: str, allowed: Collection[str], how: str = "") -> OptionError:
    """The error for a name that is not among the allowed ones, with the nearest of these."""
    near = difflib.get_close_matches(name, allowed, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return OptionError(f"unknown {what} '{name}'.{hint} Allowed: {', '.join(allowed)}{how}")


def require(option: str, value: object, is_right: bool, allowed: str) -> None:
    """Refuse a value that an option cannot have; raises OptionError."""
    if not is_right:
        raise OptionError(f"{option} is {value}; it must be {allowed}")
