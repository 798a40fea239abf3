"""What a trained model is worth: its answers on a test set, and what is counted of them."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torchmetrics.functional.classification import binary_auroc

from data_modules import DATA_SETS, ImageDataModule, data_class, option_names
from data_modules.errors import DataError
from data_modules.images.dataset import ImageFiles
from data_modules.images.decode import image_paths, printable, visible
from lit_nn.errors import UsageError, brief, other_classes
from lit_nn.multi_label import average_precision
from lit_nn.trained.calibrate import calibration_error, wilson_interval
from lit_nn.trained.predict import Model, Pixels, energy, predict_files

SHOWN = 30  # mistakes in the report


def data_of(
    model: Model, name: str | None = None, data_dir: str | None = None, table: str | None = None
) -> ImageDataModule:
    """The data set to try a model on, by default its own, none of whose training images is then in the test part.

    Raises:
        UsageError: If there is no such data set, the model does not name its own, or it has other classes or images.
        DataError: If it is not on this machine or cannot be used.
    """
    own = next((key for key, class_name in DATA_SETS.items() if class_name == model.data.get("class")), None)
    name = name or ("image_table" if table else own)
    if name is None:
        raise UsageError("the model does not name a data set of this project; choose one with --data and --data_dir")
    cls, (channels, *size), taken = data_class(name), model.image_shape, option_names(name)
    is_other = bool(data_dir or table)
    if data_dir is not None and not cls.reads_data_dir:
        raise UsageError(f"--data_dir {data_dir}: {name} reads no folder; leave it out, or add --data image_folder")
    if table and "table" not in taken:
        raise UsageError(f"--table {table}: {name} reads no table; leave it out, or add --data image_table")
    try:  # what a file says of itself can be anything
        options = dict(model.data.get("options", {})) if name == own else {}  # the seed of the training among them
        given = {"image_size": size, "channels": channels, "fit": model.fit, "data_dir": data_dir, "table": table}
        given["on_error"] = "skip" if is_other else None  # they are named all the same
        options |= {key: value for key, value in given.items() if key in taken and value is not None}
        if issubclass(cls, ImageFiles) and "data_dir" not in options and not table:
            raise DataError("the model does not say where its images lie: give --data_dir FOLDER")
        for key in ("sampling", "folds", "fold") if is_other else ():  # which are for a training
            options.pop(key, None)
        data = cls(**options)
        of_files = ("image_folder", "image_table", "image_stream")  # which may hold the same images
        if name == own or (own in of_files and name in of_files):
            data.known_parts = {part: torch.from_numpy(known.copy()) for part, known in model.parts.items()}
        if isinstance(data, ImageFiles) and is_other:
            data.only_tests = True
            if "cut" in (known := data.known_parts or {}):
                known["cut"] = known["cut"][:3]  # seed and shares; the folds are those of the training's images
        same_kind = model.multi_label == data.multi_label
        shape, others = tuple(data.image_shape), other_classes(model.class_names, data.class_names, same_kind)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{brief(error)}; choose a data set with --data and --data_dir") from error
    if others or shape != model.image_shape:
        what = others or f"images {shape}, the model takes {model.image_shape}"
        raise UsageError(f"{cls.__name__} has {what}; choose other data with --data and --data_dir")
    return data


class Rows:
    """Images of some rows of a data set, which are read when they are asked for, as uint8 arrays."""

    def __init__(self, images: torch.Tensor, rows: torch.Tensor) -> None:
        self.images, self.rows, self.shape = images, rows, (len(rows), *images.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: Any) -> NDArray[np.uint8]:
        return self.images[self.rows[which]].cpu().numpy()


class Answers(NamedTuple):
    """A model's answers on labelled images, of which there is at least one."""

    class_names: list[str]
    images: NDArray[np.uint8] | Rows  # (N, C, H, W)
    labels: NDArray[Any]  # the right classes, int64 (N,); or which ones there are, 0 or 1, float32 (N, num_classes)
    logits: NDArray[np.float32]  # (N, num_classes)
    probabilities: NDArray[np.float32]  # (N, num_classes)
    temperature: float = 1.0  # by which logits are divided before they become probabilities
    threshold: float | list[float] = 0.0  # probability below which it is not sure; of each class, if there are several
    others: NDArray[np.float64] | None = None  # `energy` of images that show something else, (M,)
    files: Sequence[str] = ()  # names of the images' files, if they have any
    overlays: dict[int, Pixels] = {}  # images under their heat maps, (H, W, 3), by their number

    @property
    def several(self) -> bool:
        """Whether an image may have several labels: then they are 0 or 1, (N, num_classes)."""
        return self.labels.ndim == 2

    @property
    def given(self) -> NDArray[np.bool_]:
        """Which classes the images have, (N, num_classes)."""
        return self.labels > 0 if self.several else self.labels[:, None] == np.arange(len(self.class_names))

    @property
    def said(self) -> NDArray[np.bool_]:
        """Which classes the model says, (N, num_classes): all that reach their thresholds, or the most probable one."""
        if self.several:
            return self.probabilities >= self.threshold
        return self.logits.argmax(1)[:, None] == np.arange(len(self.class_names))

    @property
    def accuracy(self) -> float:
        """Share of right answers; of several labels each is one, said from a probability of one half on."""
        right = (self.logits > 0) == self.given if self.several else (self.said & self.given).any(1)
        return float(right.mean())

    @property
    def mistakes(self) -> NDArray[np.int64]:
        """Numbers of the images with a wrong answer, those of which the model was most sure first."""
        sureness = np.abs(self.probabilities - self.labels) if self.several else self.probabilities  # (N, K)
        sureness = np.where(self.said != self.given, sureness, -1).max(1)  # (N,)
        order = np.argsort(-sureness, kind="stable")
        return order[sureness[order] >= 0]

    def names(self, classes: NDArray[np.bool_]) -> str:
        """Names of classes, (num_classes,)."""
        return ", ".join(self.class_names[label] for label in np.flatnonzero(classes)) or "none"

    def shown(self, row: int) -> list[Pixels]:
        """An image, and beside it its heat map if it has one, (H, W, 3) each."""
        image = np.broadcast_to(visible(self.images[row]).transpose(1, 2, 0), (*self.images.shape[2:], 3))
        return [image, *([self.overlays[row]] if row in self.overlays else [])]

    def file(self, row: int) -> str:
        """Name of an image."""
        return self.files[row] if self.files else f"image {row}"

    @property
    def confusion(self) -> NDArray[np.int64]:
        """How many images of the row's class were taken for the column's, (num_classes, num_classes)."""
        count = len(self.class_names)
        return np.bincount(self.labels * count + self.logits.argmax(1), minlength=count**2).reshape(count, count)


def answer_test_images(model: Model, data: ImageDataModule, explain: bool = False) -> Answers:
    """Run a model on the test images of a data set that is prepared; ``explain`` adds heat maps of mistakes."""
    tensors, labels, rows = data.split("test")
    images: Any = Rows(tensors, rows)
    right, calibration = labels[rows].cpu().numpy(), (model.temperature, model.threshold)
    files = [printable(data.files[row]) for row in rows.tolist()] if data.files else []
    answers = Answers(model.class_names, images, right, *model.run(images), *calibration, files=files, overlays={})
    if explain:
        with suppress(UsageError):  # it has none
            answers.overlays.update((row, model.overlay(images[row])) for row in answers.mistakes[:SHOWN].tolist())
    return answers


def score_images(model: Model, folder: str) -> NDArray[np.float64]:
    """`energy` of all images in a folder, (M,), which need no labels; raises DataError if one cannot be read."""
    failed, scores = list[OSError](), list[float]()
    for name, item, prediction in predict_files(model, [(path, "") for path in image_paths(folder, failed.append)]):
        if prediction is None:
            raise DataError(f"{name}: {item}")
        scores.append(prediction.unlike)
    if failed or not scores:
        raise DataError(str(failed[0]) if failed else f"{folder}: there is no image in it")
    return np.array(scores)


def measure(answers: Answers) -> dict[str, Any]:
    """Everything that is counted, as plain values, one more is one more line here; 0 / 0 is 0, as in scikit-learn."""
    said, given, labels = answers.said, answers.given, torch.from_numpy(answers.labels)  # (N, K) twice
    right: Any = said & given  # (N, K)
    support = given.sum(0)  # images of each class, (K,)
    each = _scores(right.sum(0), said.sum(0), support)  # (K,) each
    more: dict[str, Any] = {"support": support}
    present = np.count_nonzero(support)  # classes that have images
    if answers.several:
        more["threshold"] = np.broadcast_to(answers.threshold, support.shape)
        precision = average_precision(torch.from_numpy(answers.probabilities), labels)  # (K,)
        each["average_precision"] = precision.nan_to_num().numpy()
        mean = float(each["average_precision"].sum() / max(present, 1))
        micro = _scores(right.sum(), said.sum(), given.sum())  # of all answers together
        found: dict[str, Any] = {
            "mean_average_precision": mean,
            "accuracy": float((said == given).mean()),  # share of right answers, yes and no
            "exact_match": float((said == given).all(1).mean()),  # share of images of which all answers are right
            "micro": {score: float(value) for score, value in micro.items()},
        }
    else:
        hits, top = right.any(1), torch.from_numpy(answers.logits).topk(min(3, len(support))).indices  # (N,), (N, 3)
        sure = (answers.probabilities.max(1) >= answers.threshold) & (
            answers.threshold != 1
        )  # (N,); from 1 on it never is
        found = {
            "accuracy": answers.accuracy,
            "accuracy_interval_95": wilson_interval(answers.accuracy, len(labels)),
            "balanced_accuracy": float(each["recall"].sum() / present),
            "top_3_accuracy": (top == labels[:, None]).any(1).double().mean().item(),
            "threshold": answers.threshold,
            "sure": float(sure.mean()),  # share of the images
            "accuracy_where_sure": float(hits[sure].mean()) if sure.any() else 0.0,
        }
    found["macro"] = {score: float(values.mean()) for score, values in each.items()}  # means over the classes
    found["macro"] |= {"average_precision": mean} if answers.several else {}
    found["per_class"] = {
        name: {score: values[label].item() for score, values in (each | more).items()}
        for label, name in enumerate(answers.class_names)
    }
    for kind, temperature in ("", answers.temperature), ("uncalibrated_", 1.0):
        logits = torch.from_numpy(answers.logits).double() / temperature
        shares = logits.sigmoid() if answers.several else logits.softmax(1)
        loss = F.binary_cross_entropy_with_logits if answers.several else F.cross_entropy
        found[f"{kind}loss"] = loss(logits, labels.double() if answers.several else labels).item()  # nats
        found[f"{kind}calibration_error"] = calibration_error(shares, labels)
    return {"images": len(labels), "temperature": answers.temperature, **found, **_unlike(answers)}


def _scores(right: Any, said: Any, given: Any) -> dict[str, Any]:
    """Scores of so many right, said and given answers."""
    f1 = 2 * right / np.maximum(said + given, 1)
    return {"precision": right / np.maximum(said, 1), "recall": right / np.maximum(given, 1), "f1": f1}


def _unlike(answers: Answers) -> dict[str, Any]:
    """How well `energy` tells the test images from those that show something else."""
    if answers.others is None:
        return {}
    own = energy(answers.logits, answers.temperature, answers.several)  # (N,)
    # Ranks, because of scores beyond 1 torchmetrics would take sigmoids.
    ranks = np.unique(np.concatenate([own, answers.others]), return_inverse=True)[1]  # (N + M,)
    auroc = binary_auroc(torch.from_numpy(ranks / len(ranks)), (torch.arange(len(ranks)) >= len(own)).long()).item()
    cut = float(np.quantile(own, 0.95))
    above = float((answers.others > cut).mean())
    return {"unlike": {"images": len(answers.others), "auroc": auroc, "cut": cut, "above_cut": above}}
