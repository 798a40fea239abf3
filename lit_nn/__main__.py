"""The LightningCLI: ``python -m lit_nn fit|validate|test|predict``, also installed as ``lit-nn``."""

import sys

from lit_nn.engine.console import command
from lit_nn.engine.flags import to_dotted
from lit_nn.errors import look_up

STAGES = ("fit", "validate", "test", "predict")


@command
def main(words: list[str]) -> None:
    """Run what the first word names, with the options that follow it."""
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: python -m lit_nn {'|'.join(STAGES)} [OPTION ...]\n\nOptions: python -m lit_nn fit --help")
        return
    stage, *options = words
    look_up(dict.fromkeys(STAGES), stage, "subcommand, which comes first,")
    to_dotted(options)  # refuses at once what is mistyped
    from lit_nn.engine.cli import LitCLI  # only now: it imports lightning, which takes seconds
    from lit_nn.engine.run import calibrate_best, predict, running

    cli = LitCLI(stage, options)
    with running(cli):
        if stage == "fit":
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path)
            calibrate_best(cli)
            if cli.run_dir is not None and cli.trainer.is_global_zero:
                print(f"Run folder: {cli.run_dir}")
        elif stage == "predict":
            predict(cli)
        else:
            getattr(cli.trainer, stage)(cli.model, cli.datamodule)


if __name__ == "__main__":
    sys.exit(main())
