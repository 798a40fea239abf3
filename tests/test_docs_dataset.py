"""docs/add_a_dataset.md is followed word for word, in a copy of the project."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_example_trains(tmp_path: Path) -> None:
    for folder in ("lit_nn", "data_modules", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    page = (ROOT / "docs" / "add_a_dataset.md").read_text(encoding="utf-8")
    module, line = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (commands,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    assert len(module.splitlines()) <= 55
    (tmp_path / "data_modules" / "stripes.py").write_text(module, encoding="utf-8")
    listing = tmp_path / "data_modules" / "__init__.py"
    text = listing.read_text(encoding="utf-8")
    listing.write_text(text.replace("\n}\n", f"\n{line}}}\n"), encoding="utf-8")

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    outputs = []
    for line in commands.splitlines():
        words = [sys.executable, *shlex.split(line)[1:]]
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250, check=False
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)

    for measured in re.findall(r"(?:mean|std): +(\S+), measured on the training images: (\S+)", outputs[0]):
        assert abs(float(measured[0]) - float(measured[1])) < 0.002  # the numbers on the page are right
    result = json.loads((tmp_path / "runs" / "stripes" / "result.json").read_text(encoding="utf-8"))
    assert result["data"] == "stripes"
    assert result["test_acc"] > 0.9
