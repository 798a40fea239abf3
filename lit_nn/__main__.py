"""The LightningCLI: ``python -m lit_nn fit|validate|test|predict``, also installed as ``lit-nn``."""

import sys

from lit_nn.commands import lightning_cli

if __name__ == "__main__":
    sys.exit(lightning_cli())
