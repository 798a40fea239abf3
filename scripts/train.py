"""Train an image classifier, then test its best checkpoint; --help lists the options."""

import sys

from lit_nn.commands import train

if __name__ == "__main__":
    sys.exit(train())
