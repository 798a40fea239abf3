"""Compare finished runs: numbers, what differs, and curves; --help lists the options."""

import sys

from lit_nn.compare import main

if __name__ == "__main__":
    sys.exit(main())
