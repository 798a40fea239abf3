"""Report what a checkpoint or an exported model is worth on a test set; --help lists the options."""

import sys
from pathlib import Path

from lit_nn.engine.console import CommandParser, command, quieten
from lit_nn.trained.evaluate import answer_test_images, data_of, score_images
from lit_nn.trained.predict import MODEL_HELP, open_model
from lit_nn.trained.report import summary, write_report


@command
def main(words: list[str]) -> None:
    parser = CommandParser("evaluate", "Report what a checkpoint or an exported model is worth on a test set.")
    parser.add_argument("model", type=Path, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--data", metavar="NAME", help="data set with the same classes [the one it was trained on]")
    parser.add_argument("--data_dir", metavar="DIR", help="folder of the data set [the one it was trained on]")
    parser.add_argument("--unlike", metavar="DIR", help="folder of images of other things: are they told apart?")
    parser.add_argument("--table", metavar="FILE", help="for image_table: another table of the same kind")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the report [MODEL-report]")
    options = parser.parse_args(words)
    quieten()
    model = open_model(options.model)
    data = data_of(model, options.data, options.data_dir, options.table)
    data.prepare_data()
    title = f"{options.model.name} on the test images of {type(data).__name__}"
    folder = options.output or options.model.with_name(f"{options.model.name}-report")
    others = score_images(model, options.unlike) if options.unlike else None
    found = write_report(answer_test_images(model, data, explain=True)._replace(others=others), title, folder)
    if changes := data.part_changes():
        print(changes)
    print(title)
    print(*(f"{name} {text}" for name, text in summary(found).items()), sep="\n")
    print(f"Report: {folder / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
