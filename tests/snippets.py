"""Runs the Python snippets of a page, compares what they print with what the page shows, and follows its links."""

import contextlib
import io
import re
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```[ \t]*$(\s*)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)[^)]*\)")
HEADING = re.compile(r"^#+ +(.*?) *$", re.MULTILINE)


class Snippet(NamedTuple):
    """One ```python block of a page, with the ```text block that follows it with nothing in between."""

    line: int  # of the page, on which the code begins
    code: str
    shown: str  # "" if the page shows no output


def snippets(path: Path) -> list[Snippet]:
    """The snippets of a page, in their order."""
    page = path.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(page))
    found = []
    for block, following in zip(blocks, [*blocks[1:], None], strict=False):
        if block[1] == "python":
            shown = following is not None and following[1] == "text" and following.start() == block.end()
            line = page.count("\n", 0, block.start(2)) + 1
            found.append(Snippet(line, block[2], following[2] if following and shown else ""))
    return found


def run_snippets(path: Path, folder: Path) -> dict[str, Any]:
    """Run the snippets of a page one after the other, as one program in a folder; gives the names that they define.

    Raises:
        AssertionError: If one fails, or prints anything else than the page shows; the message says where.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.chdir(folder), torch.random.fork_rng(devices=[]):
        for snippet in snippets(path):
            output = io.StringIO()
            try:
                # Empty lines before the code give tracebacks the line numbers of the page.
                code = compile("\n" * (snippet.line - 1) + snippet.code, str(path), "exec")
                with contextlib.redirect_stdout(output):
                    exec(code, namespace)
            except Exception as error:
                steps = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
                line = steps[-1] if steps else getattr(error, "lineno", snippet.line)
                raise AssertionError(f"{path}:{line}: the snippet raised {error!r}") from error
            expected, got = (
                [line.rstrip() for line in text.rstrip().splitlines()] for text in (snippet.shown, output.getvalue())
            )
            if expected != got:
                shown, printed = "\n".join(expected), "\n".join(got)
                raise AssertionError(f"{path}:{snippet.line}: the page shows\n{shown}\nbut this prints\n{printed}")
    return namespace


def broken_links(path: Path) -> list[str]:
    """Relative links of a page that lead to no file, or to no heading of one, as "file:line: link"."""
    found = []
    for number, line in enumerate(_without_code(path).splitlines(), 1):
        for link in LINK.findall(line):
            name, _, anchor = link.partition("#")
            target = path.parent / name if name else path
            if ":" not in link and not (target.exists() and (not anchor or anchor in _anchors(target))):
                found.append(f"{path}:{number}: {link}")
    return found


def _anchors(path: Path) -> set[str]:
    """What a link to a heading of a page ends in, as git servers and Sphinx with MyST make it."""
    found: dict[str, int] = {}
    for heading in HEADING.findall(_without_code(path)):
        words = re.sub(r"[^\w\- ]", "", LINK.sub("", heading).lower()).replace(" ", "-")
        found[words] = found.get(words, -1) + 1
    return {f"{words}-{again}" if again else words for words, count in found.items() for again in range(count + 1)}


def _without_code(path: Path) -> str:
    """A page with empty lines in place of its blocks of code, which have neither links nor headings."""
    return BLOCK.sub(lambda block: "\n" * block[0].count("\n"), path.read_text(encoding="utf-8"))
