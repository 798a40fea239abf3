"""Fetch and verify a data set, count it, and draw a sheet of samples; --help lists the options."""

import sys

from data_modules.report import prepare
from lit_nn.commands import run

if __name__ == "__main__":
    sys.exit(run(prepare))
