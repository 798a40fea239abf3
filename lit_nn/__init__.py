"""Image classification with PyTorch Lightning: networks, the classifier around them, and the commands."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_nn.checkpoint import load_classifier
    from lit_nn.classifier import LitClassifier

__version__ = "0.1.0"
__all__ = ["LitClassifier", "load_classifier"]


def __getattr__(name: str) -> Any:
    """Import lightning (seconds) only when something that needs it is asked for."""
    if name == "load_classifier":
        from lit_nn.checkpoint import load_classifier

        return load_classifier
    if name == "LitClassifier":
        from lit_nn.classifier import LitClassifier

        return LitClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
