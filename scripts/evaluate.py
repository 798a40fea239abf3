"""Report what a checkpoint or an exported model is worth on a test set; --help lists the options."""

import sys
from pathlib import Path

from lit_nn.engine.console import CommandParser, command, print_table, quieten
from lit_nn.trained.evaluate import answer_test_images, data_of, score_images, write_report
from lit_nn.trained.predict import MODEL_HELP, open_model


@command
def main(words: list[str]) -> None:
    parser = CommandParser("evaluate", "Report what a checkpoint or an exported model is worth on a test set.")
    parser.add_argument("model", type=Path, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--data", metavar="NAME", help="data set with the same classes [the one it was trained on]")
    parser.add_argument("--data_dir", metavar="DIR", help="folder of the data set [the one it was trained on]")
    parser.add_argument("--unlike", metavar="DIR", help="folder of images of other things: are they told apart?")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the report [MODEL-report]")
    options = parser.parse_args(words)
    quieten()
    model = open_model(options.model)
    data = data_of(model, options.data, options.data_dir)
    data.prepare_data()
    title = f"{options.model.name} on the test images of {type(data).__name__}"
    folder = options.output or options.model.with_name(f"{options.model.name}-report")
    others = score_images(model, options.unlike) if options.unlike else None
    found = write_report(answer_test_images(model, data)._replace(others=others), title, folder)
    if changes := data.part_changes():
        print(changes)
    rows = {**found["per_class"], "macro mean": {**found["macro"], "support": found["images"]}}
    scores = list(found["macro"])
    texts = [[name, *(f"{row[score]:.2%}" for score in scores), f"{row['support']:,}"] for name, row in rows.items()]
    print_table(["class", *scores, "support"], texts, [*scores, "support"], title)
    low, high = found["accuracy_interval_95"]
    print(f"accuracy {found['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%}), loss {found['loss']:.4f}")
    print(f"balanced accuracy {found['balanced_accuracy']:.2%}, top 3 {found['top_3_accuracy']:.2%}")
    before = f"{found['uncalibrated_calibration_error']:.2%}, loss {found['uncalibrated_loss']:.4f}"
    after = f"{found['calibration_error']:.2%} at temperature {found['temperature']:.3f}"
    print(f"calibration error {after} (without it {before})")
    if found["threshold"]:
        print(f"sure of {found['sure']:.2%} of the images, {found['accuracy_where_sure']:.2%} of these are right")
    if unlike := found.get("unlike"):
        told = f"{unlike['above_cut']:.2%} of them and 5 % of the test images score above {unlike['cut']:.4f}"
        print(f"{unlike['images']:,} images of other things: AUROC {unlike['auroc']:.4f}; {told}")
    print(f"Report: {folder}")


if __name__ == "__main__":
    sys.exit(main())
