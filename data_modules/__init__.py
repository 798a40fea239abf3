"""Everything about data: `ImageDataModule`, and the data sets that ``--data`` can name.

A data set is one file in this folder, with one subclass of `ImageDataModule`, and one import line below. It is then in
`DATA_MODULES`, and with it in the help, the commands and the tests. Its name is the name of its file.
"""

# "import X as X" says to linters and type checkers that X is meant to be imported from here.
from data_modules.base import DataError as DataError
from data_modules.base import ImageDataModule as ImageDataModule
from data_modules.cifar10 import CIFAR10 as CIFAR10
from data_modules.fashion_mnist import FashionMNIST as FashionMNIST
from data_modules.fashion_mnist_sample import FashionMNISTSample as FashionMNISTSample
from data_modules.image_folder import ImageFolder as ImageFolder

DATA_MODULES: dict[str, type[ImageDataModule]] = {
    cls.__module__.rpartition(".")[2]: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, ImageDataModule) and cls is not ImageDataModule
}
"""Every data set imported above, by the name that ``--data`` takes."""
