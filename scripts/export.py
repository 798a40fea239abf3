"""Export a checkpoint to ONNX and other formats; --help lists the options."""

import os
import sys
from pathlib import Path

from lit_nn.engine.console import CommandParser, command, quieten
from lit_nn.errors import ModelError, UsageError
from lit_nn.trained.export import FORMATS, Export
from lit_nn.trained.web import check_runtime, write_web


@command
def main(words: list[str]) -> None:
    parser = CommandParser("export", "Export a checkpoint for use elsewhere; each file is checked first.")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint of a run: RUN/checkpoints/best.ckpt")
    parser.add_argument(
        "--format", default="onnx", choices=[*FORMATS, "all", "web"], help="[onnx]; a .pt2 can run code"
    )
    parser.add_argument("--output", type=Path, help="name of the file, of web the folder [that of CKPT]")
    parser.add_argument(
        "--onnxruntime_web", type=Path, metavar="DIR", help="for web: node_modules/onnxruntime-web/dist"
    )
    parser.add_argument("--tolerance", type=float, default=1e-4, help="difference allowed, of the largest logit [1e-4]")
    parser.add_argument("--input", default="any", choices=["any", "fixed"], help="size of the images [any]")
    parser.add_argument("--int8", action="store_true", help="write OUTPUT.int8.onnx too, with 8-bit integers")
    options = parser.parse_args(words)
    output = options.output or Path(os.path.splitext(options.checkpoint)[0])  # noqa: PTH122 ("." has no suffix)
    suffixes = {name: suffix for name, (suffix, _) in FORMATS.items() if options.format in (name, "all")}
    if is_web := options.format == "web":
        check_runtime(options.onnxruntime_web)
        output, suffixes = (options.output or Path(f"{output}-web")) / "model", {"onnx": ".onnx"}
    if output.suffix in dict(FORMATS.values()):  # which may be left out
        if [output.suffix] != [*suffixes.values()]:
            raise UsageError(f"--output {output} does not fit --format: give it without the suffix {output.suffix}")
        output = output.with_suffix("")
    suffixes |= {"int8": ".int8.onnx"} if options.int8 else {}
    quieten()
    export, failures = Export(options.checkpoint, options.input == "any"), list[str]()
    print(f"Exported files are tried on {export.about}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    for name, suffix in suffixes.items():
        try:
            print(export.write(name, Path(f"{output}{suffix}"), options.tolerance))
        except ModelError as error:
            failures.append(str(error))
    if failures:
        raise ModelError("\n".join(failures))
    if is_web:
        write_web(output.parent, options.onnxruntime_web)
        print(f"To see it: python -m http.server --bind 127.0.0.1 --directory {output.parent}")


if __name__ == "__main__":
    sys.exit(main())
