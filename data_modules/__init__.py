"""Everything about data: `ImageDataModule`, and the data sets that ``--data`` can name.

A data set is one file in this folder, with one subclass of `ImageDataModule`, and one line in `DATA_SETS`; then it is
in the help, the commands and the tests. Nothing is imported before it is used: torch and Lightning take seconds.
"""

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from data_modules.errors import DataError as DataError
from data_modules.errors import DataNote as DataNote
from data_modules.errors import OptionError as OptionError
from data_modules.errors import unknown

if TYPE_CHECKING:
    from data_modules.base import ImageDataModule as ImageDataModule

DATA_SETS: dict[str, str] = {
    "cifar10": "CIFAR10",
    "fashion_mnist": "FashionMNIST",
    "fashion_mnist_sample": "FashionMNISTSample",
    "image_folder": "ImageFolder",
    "image_stream": "ImageStream",
    "image_table": "ImageTable",
}
"""Class of each data set, by the name that ``--data`` takes, which is the name of its file."""


def data_class(name: str) -> "type[ImageDataModule]":
    """The class of a data set; raises `OptionError` if there is none of that name."""
    if name not in DATA_SETS:
        raise unknown("data set", name, DATA_SETS)
    return getattr(importlib.import_module(f"data_modules.{name}"), DATA_SETS[name])


def option_names(name: str) -> set[str]:
    """Every option of a data set, those of the classes that it extends included."""
    parameters = [p for cls in data_class(name).__mro__[:-1] for p in inspect.signature(cls).parameters.values()]
    return {parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD}


def __getattr__(name: str) -> Any:
    """Import a class of a data set, or `ImageDataModule`, when it is asked for."""
    modules = {"ImageDataModule": "base"} | {cls: module for module, cls in DATA_SETS.items()}
    if name not in modules:
        raise AttributeError(f"module 'data_modules' has no attribute '{name}'")
    return getattr(importlib.import_module(f"data_modules.{modules[name]}"), name)
