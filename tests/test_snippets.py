"""The checker of the pages finds what is wrong with them."""

from pathlib import Path

import pytest
from snippets import SnippetError, broken_links, run_snippets, snippets


def page(folder: Path, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_snippets_share_names_and_need_no_output(tmp_path: Path) -> None:
    text = "# Title\n\n```python\na = 2\n```\n\nWords.\n\n```python\nprint(a + 1)\n```\n\n```text\n3\n```\n"
    path = page(tmp_path, text)
    assert [(found.line, found.shown_line, found.shown) for found in snippets(path)] == [(4, 0, ""), (10, 14, "3\n")]
    assert run_snippets(path, tmp_path)["a"] == 2


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("```python\nprint(1)\nprint(2)\n```\n\n```text\n1\n3\n```\n", ["page.md:8:", "expected:\n    1\n    3", "2"]),
        ("```python\nprint(1)\n```\n", ["page.md:2:", "(nothing)", "got:\n    1"]),
        ("```python\n1\n```\n\n```text\n1\n```\n", ["page.md:6:", "got:\n    (nothing)"]),
        ("Words.\n\n```python\na = 1\n1 / 0\n```\n", ["page.md:5:", "ZeroDivisionError"]),
        ("```python\ndef\n```\n", ["page.md:2:", "SyntaxError"]),
    ],
)
def test_differences_are_said_with_their_place(text: str, parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(SnippetError) as caught:
        run_snippets(page(tmp_path, text), tmp_path)
    for part in parts:
        assert part in str(caught.value)


def test_broken_links_are_found(tmp_path: Path) -> None:
    text = "# A `b`: c\n[a](page.md#a-b-c) [b](https://pytorch.org#x) [c](#a-b-c)\n```python\n# d\na[0](b)\n```\n"
    path = page(tmp_path, text + "[c](gone.py)\n[d](#d) [e](page.md#e) [f](.)\n")
    assert broken_links(path) == [f"{path}:7: gone.py", f"{path}:8: #d", f"{path}:8: page.md#e"]
