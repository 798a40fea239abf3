"""A model's report as one page: report.html of this folder, filled in."""

import base64
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_nn.trained.calibrate import wilson_interval
from lit_nn.trained.predict import data_uri

if TYPE_CHECKING:
    from lit_nn.trained.evaluate import Answers

SHOWN = 30  # images in a list, and twice the pairs of classes


def summary(found: dict[str, Any]) -> dict[str, str]:
    """What comes first of the numbers that `measure` found, as text."""
    (low, high), before = found["accuracy_interval_95"], found["uncalibrated_calibration_error"]
    without = f"without the temperature of {found['temperature']:.3f}:"
    texts = {
        "accuracy": f"{found['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%}) on {found['images']:,} images",
        "balanced accuracy": f"{found['balanced_accuracy']:.2%}",
        "top 3 accuracy": f"{found['top_3_accuracy']:.2%}",
        "loss": f"{found['loss']:.4f} ({without} {found['uncalibrated_loss']:.4f})",
        "calibration error": f"{found['calibration_error']:.2%} ({without} {before:.2%})",
    }
    if found["threshold"]:
        right = f"{found['accuracy_where_sure']:.2%} of these are right"
        texts["sure of"] = f"{found['sure']:.2%} of the images, from {found['threshold']:.2%} on; {right}"
    return texts


def report_page(answers: "Answers", found: dict[str, Any], title: str, figures: Mapping[str, bytes]) -> str:
    """HTML that loads nothing: what `measure` found, figures as PNG by their names, mistakes, what was not sure."""
    names, confidence, said = answers.class_names, answers.probabilities.max(1), answers.logits.argmax(1)  # (N,)
    right, sure, wrong = said == answers.labels, confidence >= answers.threshold, answers.confusion  # (N,) (N,) (K, K)
    np.fill_diagonal(wrong, 0)
    pairs = np.argsort(-wrong, axis=None, kind="stable")[: min(SHOWN // 2, np.count_nonzero(wrong))]

    def rows(table: Iterable[Iterable[object]]) -> str:
        cells = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in table)
        return "".join(f"<tr>{row}</tr>" for row in cells)

    def cards(numbers: Iterable[int]) -> str:
        """Images beside their heat maps, and what is known of them."""
        text = ""
        for row in numbers:
            shown = "".join(f'<img src="{data_uri(pixels)}" alt="">' for pixels in answers.shown(row))
            true, named, file = map(escape, (names[answers.labels[row]], names[said[row]], answers.file(row)))
            caption = f"said <b>{named}</b>, {confidence[row]:.1%}<br>is {true}<span>{file}</span>"
            text += f"<figure><div>{shown}</div><figcaption>{caption}</figcaption></figure>"
        return text

    classes = []
    for name, row in found["per_class"].items():
        low, high = wilson_interval(row["recall"], max(row["support"], 1))
        recall = f"{row['recall']:.1%} ({low:.0%} to {high:.0%})"
        classes.append([name, f"{row['precision']:.1%}", recall, f"{row['f1']:.1%}", row["support"]])
    heads = (f'<th scope="col"><button>{name}</button></th>' for name in ("class", *found["macro"], "images"))
    mistakes, unsure = answers.mistakes, np.argsort(confidence, kind="stable")[: np.count_nonzero(~sure)]
    doubted = f"{len(unsure):,} of {len(said):,} images, below {answers.threshold:.2%}; the least confident first."
    maps = " Beside each: the places that speak for its answer." * bool(answers.overlays)
    values = {
        "title": escape(title),
        "numbers": "".join(
            f"<div><dt>{name}</dt><dd><b>{'</b> '.join(f'{text} '.split(' ', 1))}</dd></div>"
            for name, text in summary(found).items()
        ),
        "heads": "".join(heads),
        "classes": rows(classes),
        "pairs": rows([names[pair // len(names)], names[pair % len(names)], wrong.flat[pair]] for pair in pairs),
        "small": "small" * (max(answers.images.shape[2:]) < 100),
        "mistaken": f"{len(mistakes):,} of {len(said):,} images; the most confident first.{maps}",
        "mistakes": cards(mistakes[:SHOWN].tolist()),
        "doubted": doubted if answers.threshold else "Always sure: the training had no --accept.",
        "sure": rows(
            [what, *(np.count_nonzero(some & good) for good in (right, ~right))]
            for what, some in (("sure", sure), ("not sure", ~sure))
        ),
        "doubts": cards(unsure[:SHOWN].tolist()),
        "calibration": rows(
            [what, f"{found[f'{which}calibration_error']:.2%}", f"{found[f'{which}loss']:.4f}"]
            for what, which in (("before", "uncalibrated_"), (f"after, temperature {answers.temperature:.3f}", ""))
        ),
        **{f"{name}_png": f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in figures.items()},
    }
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return Template(page).substitute(values)
