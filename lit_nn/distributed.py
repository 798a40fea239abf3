"""Several processes that are one run: who started them, who speaks for them, and what happens when one of them dies.

Sharing out the work is Lightning's and PyTorch's part. What they leave open is a process that dies, killed or out of
memory or with its machine: gloo's error names no rank, NCCL waits 30 minutes, a launcher names it on one machine only,
and kills the other processes there before heartbeats in a `TCPStore` could tell that one has gone silent. So every
process holds a connection to the first one, for one byte: its exit status. The operating system closes it however a
process ends, and one that ends without having sent the byte has died.

Nothing here imports torch or lightning before there is more than one process.
"""

import os
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

from lit_nn.flags import UsageError

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

PATIENCE = 60  # seconds that a process waits for the first one to be there
LEAVE = 10  # seconds that the first process waits for the others to end, before it does
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
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        self.rank = environment.global_rank()
        self.hint = ""  # how to continue, for the message about a death
        self._name = f"rank {self.rank} (process {os.getpid()} on {socket.gethostname()})"
        # When the first process has died, one process on every machine says so.
        self._speaks = environment.local_rank() == (1 if environment.node_rank() == 0 else 0)
        self._first_is_through = False
        self._status: int | None = None  # with which this process ends
        self._connections: set[socket.socket] = set()  # of the first process to the others, of these to the first one
        # Those that Lightning starts come when the first one has begun to train, the others at once.
        self._to_come = environment.world_size() - 1 if environment.creates_processes_externally else 0
        # torchrun has a store at this address already; else the process group will share the one that is made here.
        is_master = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        host, port, patience = environment.main_address, environment.main_port, timedelta(seconds=PATIENCE)
        options = {"multi_tenant": True, "use_libuv": os.environ.get("USE_LIBUV", "1") == "1"}  # as the process group's
        try:
            store = TCPStore(host, port, None, is_master, patience, wait_for_workers=False, **options)
            self._store = PrefixStore(f"lit_nn/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            if self.rank == 0:
                server = _server(host)
                self._store.set("first", f"{server.getsockname()[1]} {self._name}")
                _in_background(self._accept, server)
            else:
                own_port, _, name = self._store.get("first").decode().partition(" ")
                connection = socket.create_connection((host, int(own_port)), PATIENCE)
                connection.settimeout(None)
                connection.sendall(f"{self._name}\n".encode())
                self._connections.add(connection)
                _in_background(self._watch, connection, name)
        except (RuntimeError, OSError) as error:
            what = " ".join(str(error).split())
            doing = "listen at" if self.rank == 0 else "reach rank 0 at"
            raise ConnectionError(f"{self._name} cannot {doing} {host}:{port}: {what}") from error

    def go(self) -> None:
        """Let the others go on."""
        self._store.set("go", "")

    def wait(self) -> None:
        """Wait until the first process has called `go`."""
        while self.rank > 0 and not self._store.check(["go"]):
            if self._first_is_through:
                _exit(0)  # there was nothing to do
            time.sleep(0.1)

    def end(self, status: int, text: str = "") -> int:
        """Say how this process ends; see the function `end`."""
        failed = status in (1, 2)
        if (self._is_first_to_fail() if failed else self.rank == 0) and text:
            print(f"\n{self._name}: {text}" if self.rank else f"\n{text}", file=sys.stderr, flush=True)
        self._status = status if failed else 0
        for connection in list(self._connections):
            self._tell(connection)
        patience = time.monotonic() + LEAVE
        # A launcher that sees the first process end may end the others before they are through.
        while self.rank == 0 and (self._connections or self._to_come > 0) and time.monotonic() < patience:
            time.sleep(0.02)
        return status if self.rank == 0 else self._status

    def _is_first_to_fail(self) -> bool:
        try:
            return self._store.add("failed", 1) == 1
        except RuntimeError:  # the store has gone with the first process, or torchrun with its own
            return self.rank == 0

    def _tell(self, connection: socket.socket) -> None:
        if self._status is not None:
            with suppress(OSError):
                connection.sendall(bytes([self._status]))

    def _accept(self, server: socket.socket) -> None:
        while True:
            _in_background(self._greet, server.accept()[0])

    def _greet(self, connection: socket.socket) -> None:
        with suppress(OSError), connection.makefile("rb", buffering=0) as lines:
            name = lines.readline().decode(errors="replace").rstrip()
            if name.startswith("rank "):  # else it is a stranger
                self._connections.add(connection)
                self._to_come -= 1
                self._tell(connection)
                self._watch(connection, name)

    def _watch(self, connection: socket.socket, name: str) -> None:
        """Wait for the end of the process at the other end, and end with it if it has failed or died."""
        _keep_alive(connection)
        try:
            word = connection.recv(1)
        except OSError:
            word = b""
        if word == b"\0":
            self._first_is_through = self.rank > 0
            with suppress(OSError):
                connection.recv(1)  # comes back when the process is no more
            self._connections.discard(connection)
            return
        self._connections.discard(connection)
        status = word[0] if word else 1
        text = f"error: {name} has died (killed? out of memory?); the others end with it. {self.hint}".rstrip()
        if self.rank == 0:
            self.end(status, "" if word else text)
        elif not word and self._speaks:
            print(f"\n{text}", file=sys.stderr)
        _exit(status)


def _server(host: str) -> socket.socket:
    if host in ("127.0.0.1", "localhost"):
        return socket.create_server(("127.0.0.1", 0))
    both = socket.has_dualstack_ipv6()
    return socket.create_server(("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)


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
        UsageError: If SLURM was not told how many tasks a node gets.
    """
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    try:
        return SLURMEnvironment(auto_requeue=False) if SLURMEnvironment.detect() else None
    except RuntimeError as error:
        raise UsageError(str(error)) from error


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
