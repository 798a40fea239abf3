"""What sbatch, srun and scontrol do with a job on one machine, as far as scripts/slurm/train.sbatch can tell.

No part of SLURM: it sets the variables that SLURM sets, starts the tasks, sends the signal that was asked for once the
run has saved something, ends all tasks when one fails, and starts a requeued job again.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REQUEUED = Path(os.environ["FAKE_SLURM"], "requeued")
JOB = "4217"


def sbatch(options: dict[str, str], script: str, *arguments: str) -> int:
    """Run a job, and again as long as it is requeued."""
    directives = re.findall(r"^#SBATCH --([\w-]+)=(\S+)", Path(script).read_text(encoding="utf-8"), re.MULTILINE)
    given = dict(directives) | options
    tasks = str(int(given["nodes"]) * int(given["ntasks-per-node"]))
    slurm = {"JOB_ID": JOB, "NTASKS": tasks, "NNODES": given["nodes"], "NODELIST": "127.0.0.1"}
    slurm |= {"JOB_NODELIST": "127.0.0.1", "RESTART_COUNT": "0"}
    slurm |= {name.replace("-", "_").upper(): given[name] for name in ("job-name", "ntasks-per-node", "cpus-per-task")}
    environment = os.environ | {f"SLURM_{name}": value for name, value in slurm.items()}
    environment["FAKE_SLURM_SIGNAL"] = given["signal"].partition("@")[0]
    spooled = shutil.copy(script, REQUEUED.with_name("slurm_script"))  # a script cannot tell where it came from
    while True:
        print(f"job {JOB} starts", flush=True)
        status = subprocess.run(["bash", spooled, *arguments], env=environment, check=False).returncode
        if not REQUEUED.exists():
            return status
        REQUEUED.unlink()
        environment["SLURM_RESTART_COUNT"] = str(int(environment["SLURM_RESTART_COUNT"]) + 1)


def srun(options: dict[str, str], *command: str) -> int:
    """Run the tasks of a job; the highest of their exit statuses."""
    tasks = []
    for number in range(int(os.environ["SLURM_NTASKS"])):
        node, local = divmod(number, int(os.environ["SLURM_NTASKS_PER_NODE"]))
        numbers = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
        tasks.append(subprocess.Popen(command, env=os.environ | numbers))
    signalled = os.environ["SLURM_RESTART_COUNT"] != "0"  # there is time enough after that
    while any(task.poll() is None for task in tasks):
        time.sleep(0.02)
        if not signalled and Path(os.environ["RUN_DIR"], "checkpoints", "last.ckpt").exists():
            signalled = True
            for task in tasks:
                task.send_signal(signal.Signals[f"SIG{os.environ['FAKE_SLURM_SIGNAL']}"])
        if any(task.returncode for task in tasks):  # --kill-on-bad-exit
            for task in tasks:
                task.terminate()
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def scontrol(options: dict[str, str], *command: str) -> int:
    """Put a job back into the queue."""
    assert command == ("requeue", JOB)
    REQUEUED.touch()
    return 0


if __name__ == "__main__":
    name, *words = sys.argv[1:]
    place = next(number for number, word in enumerate(words) if not word.startswith("-"))
    options = dict(word.removeprefix("--").partition("=")[::2] for word in words[:place])
    commands: dict[str, Callable[..., int]] = {"sbatch": sbatch, "srun": srun, "scontrol": scontrol}
    sys.exit(commands[name](options, *words[place:]))
