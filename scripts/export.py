"""Export a checkpoint to ONNX and other formats, each file verified; --help lists the options."""

import sys

from lit_nn.export import main

if __name__ == "__main__":
    sys.exit(main())
