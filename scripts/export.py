"""Export a checkpoint to ONNX and other formats; --help lists the options."""

import shlex
import sys
from pathlib import Path

from lit_nn.engine.console import CommandParser, command, quieten
from lit_nn.errors import ModelError, UsageError
from lit_nn.trained.export import FORMATS, RUNTIME, Export, write_web


@command
def main(words: list[str]) -> None:
    parser = CommandParser("export", "Export a checkpoint for use elsewhere; each file is checked first.")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint of a run: RUN/checkpoints/best.ckpt")
    formats = [*FORMATS, "all", "web"]
    parser.add_argument("--format", default="onnx", choices=formats, help="[onnx]; a .pt2 can run code")
    parser.add_argument("--output", type=Path, help="name of the file, of web the folder [that of CKPT]")
    where = "for web: node_modules/onnxruntime-web/dist"
    parser.add_argument("--onnxruntime_web", type=Path, default="", metavar="DIR", help=where)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="difference allowed, of the largest logit [1e-4]")
    parser.add_argument("--input", default="any", choices=["any", "fixed"], help="size of the images [any]")
    parser.add_argument("--int8", action="store_true", help="write OUTPUT.int8.onnx too, with 8-bit integers")
    options = parser.parse_args(words)
    output, runtime = options.output or options.checkpoint.parent / options.checkpoint.stem, options.onnxruntime_web
    suffixes = {name: suffix for name, (suffix, _) in FORMATS.items() if options.format in (name, "all")}
    if is_web := options.format == "web":
        if not all((runtime / name).is_file() for name in RUNTIME):
            hint = "type npm install onnxruntime-web, then give node_modules/onnxruntime-web/dist"
            raise UsageError(f"--onnxruntime_web {runtime}: no {' and '.join(RUNTIME)} in it; {hint}")
        output, suffixes = (options.output or Path(f"{output}-web")) / "model", {"onnx": ".onnx"}
    output = output.with_suffix("") if output.suffix in suffixes.values() else output  # it may be left out
    suffixes |= {"int8": ".int8.onnx"} if options.int8 else {}
    quieten()
    export, failures = Export(options.checkpoint, options.input == "any"), list[str]()
    if is_web and options.input == "fixed" and (fit := export.classifier.fit) != "crop":
        raise UsageError(
            f"--input fixed: the page would cut out the middle, and the model has --fit {fit}; leave it out"
        )
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
        write_web(output.parent, runtime)
        print(f"To see it: python -m http.server --bind 127.0.0.1 --directory {shlex.quote(str(output.parent))}")


if __name__ == "__main__":
    sys.exit(main())
