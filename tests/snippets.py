"""Runs the Python snippets of a page of the documentation and compares what they print with what the page shows."""

import contextlib
import io
import os
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```[ \t]*$(\s*)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)[^)]*\)")
HEADING = re.compile(r"^#+ +(.*?) *$", re.MULTILINE)


class SnippetError(AssertionError):
    """A page and what its snippets do differ; the message says where."""


@dataclass(frozen=True)
class Snippet:
    """One ```python block with the ```text block that follows it with nothing in between.

    Attributes:
        line: Line of the page on which the code begins.
        code: The code.
        shown_line: Line on which the shown output begins.
        shown: What the page says the code prints; "" without a ```text block.
    """

    line: int
    code: str
    shown_line: int
    shown: str


def snippets(path: Path) -> list[Snippet]:
    """The snippets of a page, in their order.

    Args:
        path: A Markdown file.
    """
    page = path.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(page))
    found = []
    for block, following in zip_longest(blocks, blocks[1:]):
        if block[1] != "python":
            continue
        line, shown_line, shown = page.count("\n", 0, block.start(2)) + 1, 0, ""
        if following is not None and following[1] == "text" and following.start() == block.end():
            shown_line, shown = page.count("\n", 0, following.start(2)) + 1, following[2]
        found.append(Snippet(line, block[2], shown_line, shown))
    return found


def run_snippets(path: Path, folder: Path) -> dict[str, Any]:
    """Run all snippets of a page one after the other, as one program, and check what each one prints.

    Args:
        path: A Markdown file.
        folder: An empty folder; where the snippets' files go.

    Returns:
        The names that the snippets defined.

    Raises:
        SnippetError: If one fails, or prints anything else than the page shows: file:line, expected, got.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with _inside(folder):
        for snippet in snippets(path):
            output = io.StringIO()
            try:
                # Empty lines before the code give tracebacks the line numbers of the page.
                code = compile("\n" * (snippet.line - 1) + snippet.code, str(path), "exec")
                with contextlib.redirect_stdout(output):
                    exec(code, namespace)
            except Exception as error:
                steps = [
                    step.lineno for step in traceback.extract_tb(error.__traceback__) if step.filename == str(path)
                ]
                place = f"{path}:{steps[-1] if steps else getattr(error, 'lineno', snippet.line)}"
                raise SnippetError(f"{place}: the snippet raised {type(error).__name__}: {error}") from error
            _compare(path, snippet, output.getvalue())
    return namespace


def _compare(path: Path, snippet: Snippet, printed: str) -> None:
    expected = [line.rstrip() for line in snippet.shown.rstrip().splitlines()]
    got = [line.rstrip() for line in printed.rstrip().splitlines()]
    if expected == got:
        return
    both = list(zip(expected, got, strict=False))
    same = next((i for i, (one, other) in enumerate(both) if one != other), len(both))  # lines before the difference
    line = snippet.shown_line + same if snippet.shown_line else snippet.line
    raise SnippetError(
        f"{path}:{line}: the snippet of line {snippet.line} prints something else than the page shows\n"
        f"expected:\n{_indented(expected)}\ngot:\n{_indented(got)}"
    )


def _indented(lines: list[str]) -> str:
    return "\n".join(f"    {line}" for line in lines) or "    (nothing)"


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """In a folder, with one thread and with the random numbers of this process left as they were."""
    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(folder)
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        os.chdir(before)


def broken_links(path: Path) -> list[str]:
    """Relative links of a page that lead to no file, or to no heading of one, as "file:line: link".

    Args:
        path: A Markdown file.
    """
    found = []
    for number, line in enumerate(_without_code(path).splitlines(), 1):
        for link in LINK.findall(line):
            name, _, anchor = link.partition("#")
            target = path.parent / name if name else path
            if ":" not in link and not (target.exists() and (not anchor or anchor in anchors(target))):
                found.append(f"{path}:{number}: {link}")
    return found


def anchors(path: Path) -> set[str]:
    """What a link to a heading of a page ends in, as git servers and Sphinx with MyST make it.

    Args:
        path: A Markdown file.
    """
    found: dict[str, int] = {}
    for heading in HEADING.findall(_without_code(path)):
        words = re.sub(r"[^\w\- ]", "", LINK.sub("", heading).lower()).replace(" ", "-")
        found[words] = found.get(words, -1) + 1
    return {f"{words}-{again}" if again else words for words, count in found.items() for again in range(count + 1)}


def _without_code(path: Path) -> str:
    """A page with empty lines in place of its blocks of code, which have neither links nor headings."""
    return BLOCK.sub(lambda block: "\n" * block[0].count("\n"), path.read_text(encoding="utf-8"))
