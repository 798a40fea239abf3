"""Name what picture files show, with a checkpoint or an exported model; --help lists the options."""

import sys

from lit_nn.predict import main

if __name__ == "__main__":
    sys.exit(main())
