"""Report what a checkpoint or an exported model is worth on a test set; --help lists the options."""

import sys

from lit_nn.report import main

if __name__ == "__main__":
    sys.exit(main())
