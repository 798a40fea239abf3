"""Show what a network is made of: layers, shapes, parameters and the autograd graph; --help lists the options."""

import sys

from lit_nn.inspect import main

if __name__ == "__main__":
    sys.exit(main())
