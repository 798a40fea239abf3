"""Anyone's images, as a table names them: a row for each image, with its file and its label."""
# ruff: noqa: PTH111, PTH113, PTH118 (strings, because Path objects take longer; Path.expanduser raises without a home)

import csv
import fnmatch
import io
import math
import os
import re
import unicodedata
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

from data_modules.base import SPLITS, say
from data_modules.errors import DataError, OptionError, require, some
from data_modules.images.dataset import ImageFiles, Listing

COLUMNS = ("file", "label", "split", "group", "weight")  # the first two are needed
Rows = list[tuple[int, list[str]]]  # number of each row, and its cells
YES, NO = ("1", "1.0", "true"), ("0", "0.0", "false")


class ImageTable(ImageFiles):
    """Images that a table names, in its order: CSV or TSV, also with semicolons, or Parquet if pyarrow is installed.

    Its columns are ``file`` and ``label``, and where it has them ``split`` (train, val or test; a part that no row has
    is cut from train), ``group`` (its images stay in one part) and ``weight`` (how often an image is drawn in training,
    with ``sampling="weighted"``; no other number depends on it). What is wrong in a row is said with its number, as a
    spreadsheet counts.

    An image may have several labels, or none: with a delimiter, or with a column of 0 and 1 for each class. Then the
    names of the classes are `class_names` in the same order, and the labels 0 or 1 for each, float32 (N, K).

    Args:
        table: The file, looked for in ``data_dir`` too.
        columns: What its columns are called, if otherwise: ``{"file": "path", "label": "kind"}``. As ``label`` the
            columns of 0 and 1, which are called as their classes: names joined by commas, or a pattern such as "is_*";
            "*" is all columns that are nothing else.
        delimiter: What parts several labels in the column ``label``, such as "|"; an empty cell is then no label.
        data_dir: The folder that the files' paths start from; "data" (nobody has chosen one) for that of the table.
        options: Those of `ImageFiles`.
    """

    samplings: ClassVar = ("shuffled", "balanced", "weighted")

    def __init__(
        self,
        table: str = "",
        columns: dict[str, str] | None = None,
        delimiter: str = "",
        data_dir: str = "data",
        **options: Any,
    ) -> None:
        if not table:
            raise OptionError("image_table needs a table with the columns file and label: --data.table labels.csv")
        places = [Path(os.path.expanduser(table))]
        super().__init__(str(places[0].parent) if data_dir == "data" else data_dir, **options)
        places.append(Path(self.data_dir, table))
        self.table = next((place for place in places if place.is_file()), places[0])
        self._listed_by += f" {self.table.resolve()}"
        self.columns, self.delimiter = dict(columns or {}), delimiter
        for name in self.columns:
            require("columns", self.columns, name in COLUMNS, f"names for some of {', '.join(COLUMNS)}")
        label = self.columns.get("label", "label")
        by_column = not {",", "*"}.isdisjoint(label)
        self._patterns = label.split(",") if by_column else []  # of the names of the columns of 0 and 1
        self._places, self._classes = dict[str, int](), dict[str, int]()  # of the columns, and of those of 0 and 1
        self._seen = dict[str | Decimal, tuple[str, int]]()  # each file, and each label that is a number: text and row
        text = "text; in a YAML file it may be '#' or '~', too"  # which YAML takes for nothing on a command line
        require("delimiter", delimiter, isinstance(delimiter, str), text)
        self.multi_label = by_column or delimiter != ""
        require("delimiter", delimiter, not (by_column and delimiter), "left out: each class has a column")
        several = "shuffled or weighted where images have several labels; in the loss: --class_weights balanced"
        require("sampling", self.sampling, not (self.multi_label and self.sampling == "balanced"), several)

    def list_images(self) -> Listing:
        """Names of the classes, and all images in the order of the table."""
        rows, images, wrong = self._read(), list[dict[str, Any]](), list[str]()
        if len(rows) < 2:
            raise DataError(f"{self.table} has no rows below its header")
        header = rows[0][1]
        self._find_columns(header)
        for row, cells in rows[1:]:
            if len(cells) != len(header):
                hint = " (quote a cell with a delimiter)" if len(cells) > len(header) else ""
                wrong += [f"row {row} has {len(cells)} cells, the header {len(header)}{hint}"]
            else:
                image, mistakes = self._image(row, cells)
                images.append(image)
                wrong += [f"row {row}{mistake}" for mistake in mistakes[:1]]
        labels = [image["labels"] for image in images]
        present = {name for found in labels for name in found}
        names = sorted(present | self._classes.keys())
        if not self.only_tests and (absent := self._classes.keys() - present):
            wrong.append(f"row 1: no image is of the class {some(sorted(absent))}; leave out the column")
        if not self.only_tests and self.delimiter and not wrong and all(len(found) < 2 for found in labels):
            first = f"row {rows[1][0]} for instance is '{''.join(labels[0])}'"
            wrong.append(f"no label has a '{self.delimiter}', {first}")
        if wrong:
            raise DataError(" ".join(f"{self.table}: {some(wrong)}".split()))  # a cell may have several lines
        if len(names) < 2 and not self.only_tests:
            raise DataError(f"{self.table} has only one label, {names[0]}; a classifier needs two or more")
        if self.multi_label:
            numbers: Any = [[int(name in found) for name in names] for found in labels]
        else:
            label_of = {name: label for label, name in enumerate(names)}
            numbers = [label_of[name] for (name,) in labels]
        files, splits = ([image[column] for image in images] for column in ("file", "split"))
        groups = [_plain(image["group"]) for image in images if "group" in self._places]
        weights = [float(image["weight"]) for image in images if "weight" in self._places]
        return Listing(names, files, numbers, splits, groups, weights)

    def _image(self, row: int, cells: list[str]) -> tuple[dict[str, Any], list[str]]:
        """What a row says of its image, and what is wrong with it."""
        image: dict[str, Any] = {"split": "train", "weight": "1"}
        image |= {column: cells[place] for column, place in self._places.items()}
        said = {name: cells[place].lower() for name, place in self._classes.items()}
        label = _plain(image.get("label", ""))
        labels = [name for name, word in said.items() if word in YES] if said else [label]
        if self.delimiter:
            labels = [*map(str.strip, label.split(self.delimiter))] if label else []
        path = os.path.normpath(os.path.join(self.data_dir, image["file"]))
        _, first = self._seen.setdefault(path, ("", row))
        checks = {
            " has no file": not image["file"],
            f" names the file of row {first} again: {image['file']}": first != row,
            f": no such file: {path}": self.on_error == "stop" and not os.path.isfile(path),
            f": split '{image['split']}'; allowed: {', '.join(SPLITS)}": image["split"] not in SPLITS,
            f": weight '{image['weight']}'; it must be a number from 0 on": not _is_weight(image["weight"]),
            f" has no label{f' beside a {self.delimiter}' if self.delimiter else ''}": "" in labels,
        }
        wrong = [mistake for mistake, is_wrong in checks.items() if is_wrong]
        wrong += [f": {name} is '{word}'; allowed: 0, 1" for name, word in said.items() if word not in YES + NO]
        wrong += [f" has the label {label} twice" for label in labels if labels.count(label) > 1]
        for label in labels:
            if re.fullmatch(r"[+-]?\d+(\.\d*)?", label):  # 1, 1.0 and 01 are one class, or a mistake
                text, first = self._seen.setdefault(Decimal(label), (label, row))
                wrong += [f": label {label} is {text} in row {first}; write it in one way"] if text != label else []
        return image | {"labels": labels}, wrong

    def _find_columns(self, header: list[str]) -> None:
        """Find the place of each column that the table has."""
        names = {column: self.columns.get(column, column) for column in COLUMNS}
        if self._patterns:
            del names["label"]
        others = [name for name in header if name not in names.values()]
        classes = [name for pattern in self._patterns for name in fnmatch.filter(others, pattern) or [pattern]]
        for column, name in [*names.items(), *(("label", name) for name in classes)]:
            chosen = column in self.columns and not (self.only_tests and column == "weight")
            needed = chosen or column in ("file", "label")
            if header.count(name) > 1 or (needed and name not in header):
                found = f"{header.count(name) or 'no'} columns '{name}' in row 1: {some(header)}"
                hint = f"say which is the {column}: --data.columns.{column} NAME"
                if self.only_tests:
                    hint = "leave one out" if name in header else "add it"
                raise DataError(f"{self.table} has {found}; {hint}")
        self._places = {column: header.index(name) for column, name in names.items() if name in header}
        self._classes = {_plain(name): header.index(name) for name in classes}
        if unused := [name for name in others if name and name not in classes]:
            say(f"{self.table}: columns that are not used: {some(unused)}")
        has_weights, weighted = "weight" in self._places, self.sampling == "weighted"
        require("sampling", self.sampling, has_weights or not weighted, "another one: the table has no column weight")
        if has_weights and not weighted and not self.only_tests:
            say(f"{self.table}: the column {names['weight']} is not used; --data.sampling weighted draws images by it")

    def _read(self) -> Rows:
        """The rows of the table, the header first; empty ones are left out, but count."""
        if not self.table.is_file():
            raise DataError(f"{self.table}: no such file; --data.table names the table, for instance labels.csv")
        content = self.table.read_bytes()
        if content.startswith(b"PAR1"):
            return _read_parquet(self.table)
        encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"  # with or without BOM
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError as error:
            row = content.count(b"\n", 0, error.start) + 1
            raise DataError(f"{self.table}, row {row}: not UTF-8 text; save the table as CSV in UTF-8") from error

        def cells_with(delimiter: str) -> tuple[bool, int]:
            """Whether the header then names the files, and how many cells it has."""
            cells = next(csv.reader(io.StringIO(text.lstrip()), delimiter=delimiter, skipinitialspace=True), [])
            return self.columns.get("file", "file") in map(str.strip, cells), len(cells)

        rows, reader = Rows(), None
        try:
            delimiter = max(",;\t", key=cells_with)
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
            rows += [(number, [*map(str.strip, cells)]) for number, cells in enumerate(reader, 1) if any(cells)]
        except csv.Error as error:
            line = reader.line_num if reader else 1
            raise DataError(f"{self.table}, line {line}: not CSV ({error})") from error
        return rows


def _read_parquet(path: Path) -> Rows:
    """The rows of a Parquet file, as text; its header has the number 0."""
    try:
        from pyarrow.parquet import read_table

        columns: dict[str, list[Any]] = read_table(path).to_pydict()
    except ImportError as error:
        raise DataError(f"{path} is a Parquet file, for which pyarrow is needed: pip install pyarrow") from error
    except Exception as error:  # a damaged file can raise anything
        raise DataError(f"{path} cannot be read as a Parquet file: {' '.join(str(error).split())}") from error
    rows = zip(*columns.values(), strict=True)
    text = [["" if cell is None or cell != cell else str(cell).strip() for cell in row] for row in rows]  # NaN != NaN
    return [*enumerate([[*columns], *text])]


def _plain(text: str) -> str:
    """A name in one spelling, as `ImageFolder` has them, on one line."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def _is_weight(text: str) -> bool:
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False
