"""Train an image classifier, then test its best checkpoint: ``python scripts/train.py --help``."""

import sys

from lit_nn.engine.console import command
from lit_nn.engine.flags import flag_parser, to_dotted


@command
def main(words: list[str]) -> None:
    if words in (["--help"], ["-h"]):
        from data_modules.augment import AUGMENTATIONS
        from lit_nn.nets import NETS

        flag_parser(NETS, AUGMENTATIONS).print_help()
        return
    to_dotted(words)  # refuses at once what is mistyped
    from lit_nn.engine.cli import LitCLI  # only now: it imports lightning, which takes seconds
    from lit_nn.engine.run import calibrate_best, running, test_best

    cli = LitCLI("fit", words, tests=True)
    with running(cli):
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path)
        test_best(cli, calibrate_best(cli))


if __name__ == "__main__":
    sys.exit(main())
