"""What sbatch, srun and scontrol do with a job on one machine, as far as scripts/slurm/train.sbatch can tell.

No part of SLURM: it sets the variables that SLURM sets, starts the tasks, sends the signal that was asked for once the
file FAKE_SLURM_SIGNAL_WHEN exists, ends all tasks when one fails, and starts a requeued job again.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(os.environ["FAKE_SLURM"])  # of the "controller"
JOB = "4217"


def sbatch(words: Sequence[str]) -> int:
    """Run a job, and again as long as it is requeued."""
    place = next(number for number, word in enumerate(words) if not word.startswith("-"))
    script, arguments = Path(words[place]), words[place + 1 :]
    directives = re.findall(r"^#SBATCH (--\S+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    given = dict(word.lstrip("-").partition("=")[::2] for word in [*directives, *words[:place]])
    nodes, per_node = int(given["nodes"]), int(given["ntasks-per-node"])
    environment = {
        **os.environ,
        "SLURM_JOB_ID": JOB,
        "SLURM_JOB_NAME": given["job-name"],
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_CPUS_PER_TASK": given["cpus-per-task"],
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "FAKE_SLURM_SIGNAL": given["signal"].partition("@")[0],
    }
    spooled = shutil.copy(script, FOLDER / "slurm_script")  # a script cannot tell where it came from
    status, restarts = 0, 0
    while True:
        print(f"job {JOB} starts", flush=True)
        status = subprocess.run(["bash", spooled, *arguments], env=environment, check=False).returncode
        if not (FOLDER / "requeue").exists():
            return status
        (FOLDER / "requeue").unlink()
        restarts += 1
        environment["SLURM_RESTART_COUNT"] = str(restarts)


def srun(words: Sequence[str]) -> int:
    """Run the tasks of a job; the highest of their exit statuses."""
    command = words[next(number for number, word in enumerate(words) if not word.startswith("-")) :]
    per_node = int(os.environ["SLURM_NTASKS_PER_NODE"])
    tasks = []
    for number in range(int(os.environ["SLURM_NTASKS"])):
        node, local = divmod(number, per_node)
        numbers = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
        tasks.append(subprocess.Popen(command, env={**os.environ, **numbers}))
    moment = Path(os.environ["FAKE_SLURM_SIGNAL_WHEN"])
    signalled = "SLURM_RESTART_COUNT" in os.environ  # there is time enough after that
    while any(task.poll() is None for task in tasks):
        time.sleep(0.02)
        if not signalled and moment.exists():
            signalled = True
            for task in tasks:
                task.send_signal(signal.Signals[f"SIG{os.environ['FAKE_SLURM_SIGNAL']}"])
        if any(task.returncode for task in tasks):  # --kill-on-bad-exit
            for task in tasks:
                task.terminate()
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def scontrol(words: Sequence[str]) -> int:
    """Put a job back into the queue."""
    assert list(words) == ["requeue", JOB]
    (FOLDER / "requeue").touch()
    return 0


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
