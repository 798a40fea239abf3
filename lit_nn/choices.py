"""Options by name: choosing, with an error that helps whoever mistyped, and the dotted names of nested ones."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def look_up(table: Mapping[str, T], name: str, what: str) -> T:
    """Find a named entry.

    Args:
        table: everything that may be chosen.
        name: what was asked for.
        what: the kind of thing it is, for the message ("net", "loss", "option of sgd").

    Returns:
        The entry of that name.

    Raises:
        ValueError: there is none; the one-line message has the nearest name, if one is near, and all allowed ones.
    """
    if name in table:
        return table[name]
    nearest = difflib.get_close_matches(str(name), table, n=1)
    hint = f": did you mean {nearest[0]!r}?" if nearest else "."
    raise ValueError(f"unknown {what} {name!r}{hint} Allowed: {', '.join(table) or 'none'}")


def flat(options: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """The options of a configuration by their dotted names."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from flat(value, f"{place}{name}.")
        else:
            yield f"{place}{name}", value
