"""Several processes that are one run: who started them, who speaks for them, and what happens when one of them dies.

Sharing out the work is Lightning's and PyTorch's part. What they leave open is a process that dies, killed or out of
memory or with its machine: the others wait for it, or fail with errors that do not say which one it was. So every
process holds a connection to the first one, for nothing but last words. The operating system closes it however a
process ends, and one that ends without last words has died.

Nothing here imports torch or lightning before there is more than one process.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

PATIENCE = 60  # seconds that a process waits for the first one to be there, and for an answer from it
DEATH_IS_KNOWN = 5  # seconds after which a death that made other processes fail has been told of
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # a machine silent for 30 seconds is lost

_lifeline: "Lifeline | None" = None  # None in a run of one process


class Lifeline:
    """The connections between the first process and the others.

    Args:
        environment: What Lightning knows about the processes.

    Raises:
        ConnectionError: If the first process cannot be reached.
    """

    def __init__(self, environment: "ClusterEnvironment") -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self.rank = environment.global_rank()
        self.hint = ""  # how to continue, for the message about a death
        # When the first process has died, one process on every machine says so.
        self._speaks = environment.local_rank() == (1 if environment.node_rank() == 0 else 0)
        self._speaking = threading.Lock()  # taken for the first message, which is the only one, and never given back
        self._others: set[socket.socket] = set()  # those that are there
        self._greeting, self._may_go = threading.Lock(), threading.Event()
        attempt = f"lit_nn/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        self._address_key, self._status_key = f"{attempt}/address", f"{attempt}/status"
        # torchrun has a store at this address already; else the process group will share the one that is made here.
        is_master = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        host, port, patience = environment.main_address, environment.main_port, timedelta(seconds=PATIENCE)
        options = {"multi_tenant": True, "use_libuv": os.environ.get("USE_LIBUV", "1") == "1"}  # as the process group's
        try:
            self._store = TCPStore(host, port, None, is_master, patience, wait_for_workers=False, **options)
            if self.rank == 0:
                server, token = _server(host), secrets.token_hex()
                self._store.set(self._address_key, f"{server.getsockname()[1]} {token}")
                self._token = token.encode()
                _in_background(self._accept, server)
            else:
                own_port, token = self._store.get(self._address_key).decode().split()
                self._first = socket.create_connection((host, int(own_port)), PATIENCE)
                self._first.sendall(f"{token} {self._name}\n".encode())
                _in_background(self._follow)
        except (RuntimeError, OSError) as error:
            self._exit_if_ended()
            what = " ".join(str(error).split())
            raise ConnectionError(f"{self._name} has no connection to rank 0 at {host}:{port}: {what}") from error

    @property
    def _name(self) -> str:
        return f"rank {self.rank} (process {os.getpid()} on {socket.gethostname()})"

    def go(self) -> None:
        """Let the others go on."""
        with self._greeting:
            self._may_go.set()
            for connection in list(self._others):
                with suppress(OSError):
                    connection.sendall(b"go\n")

    def wait(self) -> None:
        """Wait until the first process has called `go`."""
        if self.rank > 0:
            self._may_go.wait()

    def end(self, status: int, text: str) -> int:
        """Say how this process ends; see the function `end`."""
        for_others = status if status in (1, 2) else 0
        if self.rank == 0:
            self._end_all(text, for_others)
            return status
        with suppress(OSError):
            self._first.sendall((json.dumps([for_others, text]) + "\n").encode())
        if for_others:
            time.sleep(PATIENCE)  # the first process prints the text, and its answer ends this one
            print(f"{self._name}: {text}", file=sys.stderr)
        return for_others

    # --- in the first process -----------------------------------------------------------------------------------------

    def _accept(self, server: socket.socket) -> None:
        while True:
            _in_background(self._watch, server.accept()[0])

    def _watch(self, connection: socket.socket) -> None:
        """Wait for the last words of another process."""
        _keep_alive(connection)
        with connection.makefile("rb") as lines:
            token, _, name = lines.readline().rstrip().partition(b" ")
            if not secrets.compare_digest(token, self._token):
                return  # a stranger
            with self._greeting:
                self._others.add(connection)
                if self._may_go.is_set():
                    connection.sendall(b"go\n")
            try:
                status, text = json.loads(lines.readline())
                text = f"{name.decode()}: {text}"
            except (OSError, ValueError):
                status = 1
                text = f"error: {name.decode()} has died (killed? out of memory?); the others end with it. {self.hint}"
            if not status:
                with suppress(OSError):
                    lines.read()  # comes back when the process is no more
        self._others.discard(connection)
        if status:
            self._end_all(text, status, connection)
            _exit(status)

    def _end_all(self, text: str, status: int, *failed: socket.socket) -> None:
        """Say how all processes end, unless that was said before, and wait for the others to do it.

        Args:
            text: What is to be printed.
            status: Exit status for the others; 0 if they come to their end by themselves.
            *failed: The connection to the one that failed, which waits for an answer.
        """
        if text:
            self._speaking.acquire()
            print(f"\n{text}".rstrip(), file=sys.stderr, flush=True)
        with suppress(RuntimeError):
            self._store.set(self._status_key, str(status))  # for those that have not come yet
        for connection in [*self._others, *failed]:
            with suppress(OSError):
                connection.sendall(f"{status}\n".encode())
        patience = time.monotonic() + (2 if status else PATIENCE)
        while self._others and time.monotonic() < patience:
            time.sleep(0.02)  # a launcher that sees one process end may end the others before they are through

    # --- in the others ------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """End this process when the first one says so, or dies."""
        self._first.settimeout(None)
        _keep_alive(self._first)
        with suppress(OSError), self._first.makefile(encoding="utf-8") as lines:
            for line in lines:
                if line == "go\n":
                    self._may_go.set()
                elif line == "0\n" and self._may_go.is_set():
                    return  # the first process is through, and this one will be soon
                else:
                    _exit(int(line))
        if not self._may_go.is_set():
            self._exit_if_ended()
        if self._speaks:
            print(f"\nerror: rank 0 has died; the others end with it. {self.hint}".rstrip(), file=sys.stderr)
        _exit(1)

    def _exit_if_ended(self) -> None:
        """End like the first process, if that has had its last words before this one came."""
        with suppress(RuntimeError, AttributeError):
            if self._store.check([self._status_key]):
                _exit(int(self._store.get(self._status_key)))


def _server(host: str) -> socket.socket:
    if host in ("127.0.0.1", "localhost"):
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _keep_alive(connection: socket.socket) -> None:
    """Have the operating system ask now and then whether the other machine is still there."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _in_background(work: Callable[..., None], *args: Any) -> None:
    threading.Thread(target=work, args=args, daemon=True).start()


def _exit(status: int) -> NoReturn:
    """End the process from any thread, also while another one waits for a process that will never answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def launcher() -> "ClusterEnvironment | None":
    """What has started this process and the others of its run, if that is torchrun or SLURM.

    Lightning would requeue a SLURM job itself and continue from a checkpoint of its own; here
    ``scripts/slurm/train.sbatch`` requeues it, and the run folder is what it continues from.

    Raises:
        RuntimeError: If SLURM was not told how many tasks a node gets.
    """
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    return SLURMEnvironment(auto_requeue=False) if SLURMEnvironment.detect() else None


def launched() -> dict[str, int]:
    """How many processes on each of how many machines torchrun or SLURM has started, as options of the Trainer."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        devices, all_of_them = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        return {"devices": devices, "num_nodes": all_of_them // devices}
    devices, nodes = (int(os.environ.get(f"SLURM_{name}", 1)) for name in ("NTASKS_PER_NODE", "NNODES"))
    return {"devices": devices, "num_nodes": nodes}


def join(environment: "ClusterEnvironment | None") -> None:
    """Connect this process with the others of its run, unless it is connected already or the only one.

    Args:
        environment: What Lightning knows about the processes.

    Raises:
        ConnectionError: If the first process cannot be reached.
    """
    global _lifeline
    if _lifeline is None and environment is not None and environment.world_size() > 1:
        _lifeline = Lifeline(environment)


def wait_for_first() -> None:
    """Let the first process do alone what only one is to do: build caches, download, complain about options."""
    if _lifeline is not None:
        _lifeline.wait()


def go() -> None:
    """Let the others go on, if this is the first process."""
    if _lifeline is not None and _lifeline.rank == 0:
        _lifeline.go()


def interleave(rows: "torch.Tensor") -> "torch.Tensor":
    """Put together what the processes have made of their parts of a data set, in its order, on all of them.

    Args:
        rows: One row for each image of this process, (M, ...): those of every world_size-th image, from the rank on.

    Returns:
        One row for each image, (N, ...).
    """
    import torch
    from torch import distributed as dist

    if _lifeline is None:
        return rows
    parts: list[torch.Tensor] = [rows] * dist.get_world_size()
    dist.all_gather_object(parts, rows.cpu())
    whole = rows.new_empty((sum(map(len, parts)), *rows.shape[1:]))
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def to_continue(folder: Path) -> str:
    """The sentence that says how to continue a run, also kept for the message about a process that dies.

    Args:
        folder: The run folder.
    """
    launched_outside = "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_NTASKS" in os.environ
    how = ", with the same launcher: " if launched_outside else ": python "
    sentence = f"To continue{how}scripts/train.py --resume {folder}"
    if _lifeline is not None:
        _lifeline.hint = sentence
    return sentence


def end(status: int, text: str = "") -> int:
    """Say how a command has ended: once for all processes, which end with this one if something went wrong.

    Args:
        status: Exit status of the command. 1 and 2: something went wrong. Any other: all processes end like this.
        text: What is to be said.

    Returns:
        Exit status of this process; of several, only the first one passes on that of a command that did not fail.
    """
    if _lifeline is not None:
        return _lifeline.end(status, text)
    if text:
        print(text, file=sys.stderr)
    return status


def crash(error: Exception) -> int:
    """End with an error that nobody has foreseen; one process alone raises it again.

    Args:
        error: The one that is being handled.

    Returns:
        Exit status of this process.
    """
    if _lifeline is None:
        raise error
    time.sleep(DEATH_IS_KNOWN)  # if another process has died, that is why this one failed, and it ends here
    return end(1, traceback.format_exc())
