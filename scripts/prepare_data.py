"""Fetch and verify a data set, count it, and draw a sheet of samples; --help lists the options."""

import sys

from lit_nn.prepare import main

if __name__ == "__main__":
    sys.exit(main())
