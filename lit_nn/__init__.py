"""Image classification with PyTorch Lightning: networks, the classifier that trains them, trained models in use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_nn.checkpoint import load_classifier
    from lit_nn.classifier import LitClassifier
    from lit_nn.trained.predict import predict

__version__ = "0.1.0"
__all__ = ["LitClassifier", "load_classifier", "predict"]


def __getattr__(name: str) -> Any:
    """Import torch and lightning (seconds) only when something that needs them is asked for."""
    import importlib

    rooms = {"LitClassifier": "classifier", "load_classifier": "checkpoint", "predict": "trained.predict"}
    if name not in rooms:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"lit_nn.{rooms[name]}"), name)
