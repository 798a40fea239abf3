"""Search for the best options of a training; --help lists the options."""

import sys

from lit_nn.sweep import main

if __name__ == "__main__":
    sys.exit(main())
