"""One adapter trained by several processes, as `torchrun` starts them: each holds its share of the rows.

The loss of a batch is a mean over its rows. So all processes draw the same batches and the same noise, from generators
with one seed; each takes the rows of the batch that it holds, and the gradients are added up. The loss curve is that of
one process, but for rounding. Every process draws the noise of the whole batch and takes its rows of it: that costs
some computing, and is what makes the curve independent of the number of processes.

Gloo connects CPUs, NCCL connects GPUs. The first process (rank 0) alone splits, validates, prints and writes.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.overrides import TorchFunctionMode

from fractal.base.cli import InputError
from fractal.data.parquet import LabelledVectors
from fractal.model.adapter import Adapter, pick_device

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

    def num_rows(self, here: Sized) -> int:
        """How many rows all processes hold together; `here`: those of this one."""
        return len(here) if self.size == 1 else sum(self.from_all(len(here)))

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, which alone calls it."""
        found: list[Any] = [make() if self.is_main else None]
        if self.size > 1:
            with peers():
                dist.broadcast_object_list(found, device=self.device)
        return found[0]

    def from_all(self, mine: T) -> list[T]:
        """What each process gives, in their order."""
        found: list[Any] = [mine] * self.size
        if self.size > 1:
            with peers():
                dist.all_gather_object(found, mine)
        return found

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of the processes' tensors, in place."""
        if self.size > 1:
            with peers():
                dist.all_reduce(tensor)
        return tensor

    def collect(self, x: Tensor, rows: Tensor, n: int) -> Tensor:
        """Some of n rows, by number (m,), on every process; x are those that this one holds."""
        if self.size == 1:
            return x[rows.to(x.device)]
        start, stop = self.share(n).start, self.share(n).stop
        here = (rows >= start) & (rows < stop)
        found = x.new_zeros(len(rows), *x.shape[1:])
        found[here.to(x.device)] = x[(rows[here] - start).to(x.device)]
        return self.total(found)

    def unique_rows(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y (n, k) int64 of this process -> the different rows (m, k) of all, sorted; and the number of each of y."""
        rows, number = y.unique(dim=0, return_inverse=True)
        if self.size == 1:
            return rows, number
        every = torch.cat(self.from_all(rows.cpu())).unique(dim=0).to(y.device)
        return every, (rows[:, None] == every).all(2).int().argmax(1)[number]

    def same_classes(self, cells: LabelledVectors) -> LabelledVectors:
        """The same cells, their labels numbered among the classes of all processes, still sorted by name."""
        if self.size == 1:
            return cells
        classes = [sorted(set().union(*names)) for names in zip(*self.from_all(cells.classes), strict=True)]
        numbers = [np.searchsorted(every, own) for every, own in zip(classes, cells.classes, strict=True)]
        labels = [number[column] for number, column in zip(numbers, cells.labels.T, strict=True)]
        return replace(cells, labels=np.stack(labels, axis=1), classes=classes)

    def same_weights(self, *modules: nn.Module) -> None:
        """Every process gets the first one's weights and buffers."""
        if self.size > 1:
            with peers():
                for module in modules:
                    for tensor in (*module.parameters(), *module.buffers()):
                        dist.broadcast(tensor.detach(), 0)

    def loss(self, objective: nn.Module, adapter: Adapter, rows: Tensor, n: int) -> Tensor:
        """The part of a batch's loss that this process's rows make up; rows (b,) are numbers of the n training rows."""
        if self.size == 1:
            return objective(adapter, rows)
        start, stop = self.share(n).start, self.share(n).stop
        place = ((rows >= start) & (rows < stop)).nonzero()[:, 0]
        weight = len(place) / len(rows)
        own = rows[place] - start
        if not weight:  # none of them: one row that does not count, since the noise must be drawn
            place = own = rows.new_zeros(1)
        with SharedNoise(len(rows), place):
            return objective(adapter, own) * weight

    def add_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Each gradient becomes the sum of the processes' gradients; one message for all."""
        if self.size > 1:
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            summed = self.total(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, summed.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))


class SharedNoise(TorchFunctionMode):
    """Inside, noise is drawn for a whole batch of `size` rows, and those at place (b,) get theirs of it.

    It knows what the networks draw: `randn_like` and dropout, a row of the batch in each row.
    """

    def __init__(self, size: int, place: Tensor) -> None:
        super().__init__()
        self.size, self.place = size, place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn_like:
            return func(args[0].new_empty(self.size, *args[0].shape[1:])).index_select(0, self.place)
        if func is dropout:
            ones = args[0].new_ones(self.size, *args[0].shape[1:])
            return args[0] * func(ones, *args[1:], **kwargs).index_select(0, self.place)
        return func(*args, **kwargs)


@contextmanager
def peers() -> Iterator[None]:
    """Around talk with the others. Raises ProcessLostError where one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun will send it; what there is, is saved first
        raise ProcessLostError("another process of this job has ended") from error


@contextmanager
def joined(device: str) -> Iterator[Group]:
    """The processes that torchrun has started, or this one alone. `device`: as of `fractal.model.adapter.pick_device`.

    A job ends with one line: the first process that has a reason says it, the others end without a word. Raises
    InputError for a device that there is not.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        yield Group(device=pick_device(device))
        return
    store, rank, size = next(dist.rendezvous("env://"))
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank else sys.stdout):
            yield connect(store, rank, size, device)
    except (Exception, KeyboardInterrupt) as error:
        follows = isinstance(error, KeyboardInterrupt | ProcessLostError)  # the first process knows best what is left
        if not first_to_say(store, GRACE if rank and follows else 0.0):
            raise SystemExit(2) from None
        raise
    dist.destroy_process_group()


def connect(store: dist.Store, rank: int, size: int, name: str) -> Group:
    device = pick_device(name)
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise InputError(f"torchrun: this machine has {torch.cuda.device_count()} GPUs; lower --nproc-per-node")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise InputError(f"--device {device.type}: only cuda and cpu are trained on by several processes; give cpu")
    with peers():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    return Group(rank, size, device)


def first_to_say(store: dist.Store, grace: float) -> bool:
    """Does no other process say, within so many seconds, why the job ends? torchrun's own process keeps the store."""
    said = "why the job ends"
    try:
        until = time.monotonic() + grace
        while time.monotonic() < until and not store.check([said]):
            time.sleep(0.05)
        return store.add(said, 1) == 1
    except RuntimeError:  # torchrun is gone
        return not grace
