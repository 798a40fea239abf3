"""The LightningCLI: ``python -m lit_nn fit|validate|test|predict``, also installed as ``lit-nn``."""

import sys

from lit_nn.flags import run


def main() -> int:
    """Run the subcommand that the command line names.

    Returns:
        Exit status.
    """

    def command() -> None:
        from lit_nn.cli import LitCLI

        LitCLI(sys.argv[1:])

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
