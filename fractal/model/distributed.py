"""One adapter trained by several processes, as `torchrun` starts them: each holds its share of the rows.

Every process learns from batches of its share, and DistributedDataParallel averages the gradients: of N processes a
step takes N batches of `batch size / N` rows. Labels are small, so every process reads those of all rows. Gloo connects
CPUs, NCCL connects GPUs. The first process (rank 0) alone splits, validates, prints and writes.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fractal.base.errors import InputError, Terminated, reason
from fractal.model.adapter import pick_device

JOIN = timedelta(minutes=10)  # for all processes to start
PATIENCE = timedelta(hours=12)  # while the first process reads labels; a process that dies is noticed at once
GRACE = 5.0  # seconds that the others give the first process to say why a job ends; torchrun kills them after 30
T = TypeVar("T")


class ProcessLostError(InputError):
    """Another process of the job has ended, so this one can't go on."""


@dataclass(frozen=True)
class Group:
    """The processes of a job; by default this one alone, and then every method does the obvious, at no cost."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, n: int) -> slice:
        """Which of n rows this process holds: a run of them, in the order of the processes."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, which alone calls it."""
        values = [make() if self.is_main else None]
        if self.size > 1:
            with peers():
                dist.broadcast_object_list(values, device=self.device)
        return values[0]  # type: ignore[return-value]

    def total(self, x: Tensor) -> Tensor:
        """The sum of the tensors of all processes, written into x."""
        if self.size > 1:
            with peers():
                dist.all_reduce(x)
        return x

    def rows(self, x: Tensor, rows: Tensor, n: int) -> Tensor:
        """The rows (m,) of n, on every process; x (rows of this process, dim)."""
        held = self.share(n)
        mine = (rows >= held.start) & (rows < held.stop)
        result = x.new_zeros(len(rows), x.shape[1])
        result[mine.to(x.device)] = x[(rows[mine] - held.start).to(x.device)]
        return self.total(result)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Every process gets the first one's weights and buffers; from now on gradients are those of all."""
        if self.size == 1:
            return module
        with peers():
            return DistributedDataParallel(module)


ALONE = Group()  # one process


@contextmanager
def peers() -> Iterator[None]:
    """Around all that exchanges tensors with other processes. Raises ProcessLostError where one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun will send it; the best epoch is saved first
        raise ProcessLostError("another process of this job has ended") from error


@contextmanager
def joined(device: str) -> Iterator[Group]:
    """The processes that torchrun has started, or this one alone. `device`: as of `fractal.model.adapter.pick_device`.

    A job ends with one line: the first process that has a reason says it, the others end without a word. Raises
    InputError for a device that there is not, and where the other processes do not come.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Group(device=pick_device(device))
        return
    try:
        store, rank, size = interruptible(lambda: next(dist.rendezvous("env://", timeout=JOIN)))
    except (ValueError, RuntimeError) as error:  # a variable is missing; nobody comes
        problem = f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but not so many processes have met"
        raise InputError(f"{problem} ({reason(error)}); start them with torchrun, or unset WORLD_SIZE") from error
    ended: BaseException
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank else sys.stdout):
            group = Group(rank, size, local_device(device))
            with peers():
                interruptible(lambda: connect(store, group))
            yield group
        dist.destroy_process_group()
        return
    except (Exception, KeyboardInterrupt) as error:
        ended = error
        if isinstance(error, Terminated):
            why = "torchrun is stopped, or has lost a process"
            ended = Terminated(f"{why}; {error}" if str(error) else why)
        follows = isinstance(ended, KeyboardInterrupt | ProcessLostError)  # the first process knows best what is left
        if not first_to_say(store, GRACE if rank and follows else 0.0):
            raise SystemExit(2) from error
    raise ended


def interruptible(call: Callable[[], T]) -> T:
    """What `call` returns, in a thread: torch answers neither Ctrl-C nor SIGTERM while it waits for other processes."""
    with ThreadPool(1) as pool:
        return pool.apply(call)


def connect(store: dist.Store, group: Group) -> None:
    backend = "nccl" if group.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=group.rank, world_size=group.size, timeout=PATIENCE)


def local_device(name: str) -> torch.device:
    device = pick_device(name)
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise InputError(f"torchrun: this machine has {torch.cuda.device_count()} GPUs; lower --nproc-per-node")
        return torch.device("cuda", local)
    if device.type != "cpu":
        raise InputError(f"--device {device.type}: only cuda and cpu are trained on by several processes; give cpu")
    return device


def first_to_say(store: dist.Store, grace: float) -> bool:
    """Does no other process say, within so many seconds, why the job ends?"""
    until = time.monotonic() + grace
    try:
        while time.monotonic() < until and not store.check(["reason"]):
            time.sleep(0.05)
        return store.add("reason", 1) == 1
    except dist.DistError:  # who kept the store has ended as well: torchrun, or without it the first process
        return True
