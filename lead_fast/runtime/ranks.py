"""Ranks, devices and the few collectives that the loop needs in addition to FSDP's."""

import contextlib
import datetime
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from ..config import ParallelConfig
from .hardware import use_cuda


@dataclass(frozen=True)
class Ranks:
    """This process's position in the job."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh
    sequence: int = 1
    """Number of neighbouring ranks that share a pack; they form a team."""
    sequence_group: dist.ProcessGroup | None = None
    """This rank's team, if it has more than one member."""
    tickets: Iterator[int] = field(default_factory=itertools.count, compare=False)
    """Counter with the same values on every rank; names what ranks share in the store."""
    waits: list[str] = field(default_factory=list, compare=False)
    """What this rank's main thread is waiting for other ranks in, innermost last; read by the watchdog."""

    @property
    def store(self) -> Store:
        """The job's own key-value store."""
        return dist.distributed_c10d._get_default_store()

    @property
    def teams(self) -> int:
        return self.world // self.sequence

    @property
    def team(self) -> int:
        return self.rank // self.sequence

    @property
    def member(self) -> int:
        return self.rank % self.sequence

    @property
    def main(self) -> bool:
        return self.rank == 0

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Mark a section that ends only when other ranks, or a thread, have done their part."""
        self.waits.append(name)
        try:
            yield
        finally:
            self.waits.pop()

    def all_sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` over all ranks, in place."""
        with self.waiting("all_sum"):
            dist.all_reduce(x, op=dist.ReduceOp.SUM)
        return x

    def all_max(self, x: torch.Tensor) -> torch.Tensor:
        """Take the maximum of `x` over all ranks, in place."""
        with self.waiting("all_max"):
            dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return x

    def gather_objects(self, x: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """Return every rank's `x` on every rank, in rank order; `group`: of all ranks, for use in a separate thread."""
        out: list[Any] = [None] * self.world
        with self.waiting("gather_objects") if group is None else contextlib.nullcontext():
            dist.all_gather_object(out, x, group=group)
        return out

    def barrier(self) -> None:
        with self.waiting("barrier"):
            dist.barrier()

    def check_same(self, settings: str) -> None:
        """Raise ValueError on every rank if ranks were started with other `settings` (lines) than the first rank."""
        everyone = [text.splitlines() for text in self.gather_objects(settings)]
        for rank, lines in enumerate(everyone):
            if lines != everyone[0]:
                pairs = itertools.zip_longest(everyone[0], lines, fillvalue="nothing")
                first, other = next((a, b) for a, b in pairs if a != b)
                raise ValueError(
                    f"Rank {rank} was started with {other} and rank 0 with {first}: use the same command everywhere."
                )

    def first_fault(self, fault: str) -> str:
        """Return the fault that came first on any rank, or "" once all ranks have arrived without one.

        Unlike in a collective, nobody waits once there is a fault: other ranks may take long in what failed here, hang
        in it (an engine over several ranks), or fail because this rank left.

        Args:
            fault: what is wrong on this rank, or "".
        """
        ticket = f"fault-{next(self.tickets)}"
        store, first, arrived = self.store, f"{ticket}/first", f"{ticket}/arrived"
        if fault:
            return store.compare_set(first, "", fault).decode()
        store.add(arrived, 1)
        with self.waiting("the other ranks' reports"):
            while store.add(arrived, 0) < self.world:
                if store.check([first]):
                    return store.get(first).decode()
                time.sleep(POLL_S)
        return ""

    def say_once(self, what: str, text: str) -> None:
        """Print `text` on the first rank that has a message about `what`; the others stay silent. No collective."""
        if self.store.add(f"said/{what}", 1) == 1:
            print(text, flush=True)


def start(parallel: ParallelConfig | None = None) -> Ranks:
    """Join the job that torchrun started, or make a job of one process.

    CUDA machines use NCCL (and gloo for objects and asynchronous checkpoints), others gloo. On a CPU the ranks divide
    the cores among themselves, unless OMP_NUM_THREADS sets the threads per rank. The mesh is ("shard",), or
    ("replicate", "shard") with parallel.replicate copies of the sharded model.

    Raises:
        ValueError: parallel.replicate or parallel.sequence does not divide the number of ranks, or the GPUs that the
            driver reports cannot be used.
    """
    parallel = parallel or ParallelConfig()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "RANK" not in os.environ:
        os.environ |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }
    here = int(os.environ["LOCAL_RANK"])
    cuda = use_cuda(here, int(os.environ.get("LOCAL_WORLD_SIZE", here + 1)))
    if cuda:
        torch.cuda.set_device(here)
    if not dist.is_initialized():
        store, rank, world = next(rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
            # torchrun keeps one store across restarts of a job: without a prefix, ranks may find the addresses of
            # their dead predecessors in it. (The count can differ between machines.)
            store = dist.PrefixStore(f"life-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # type: ignore
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    world = dist.get_world_size()
    if not cuda:
        torch.set_num_threads(host_threads())
    for name, parts in (("replicate", parallel.replicate), ("sequence", parallel.sequence)):
        if parts < 1 or world % parts:
            raise ValueError(f"parallel.{name} is {parts}, which does not divide {world} ranks: give a divisor.")
    copies = parallel.replicate
    shape, axes = ((copies, world // copies), ("replicate", "shard")) if copies > 1 else ((world,), ("shard",))
    mesh = init_device_mesh("cuda" if cuda else "cpu", shape, mesh_dim_names=axes)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    team = dist.new_subgroups(parallel.sequence)[0] if parallel.sequence > 1 else None
    assert not isinstance(team, int)
    return Ranks(dist.get_rank(), world, device, mesh, parallel.sequence, team)


def host_threads() -> int:
    """Number of CPU threads for this rank: OMP_NUM_THREADS if the user set it, else this rank's part of the cores.

    torchrun sets OMP_NUM_THREADS=1 for its ranks if the user set nothing; /proc shows its own environment.
    """
    value = os.environ.get("OMP_NUM_THREADS", "")
    if value.isdigit() and int(value) > 0 and (value != "1" or _set_before_torchrun("OMP_NUM_THREADS")):
        return int(value)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, (os.cpu_count() or 1) // local))


def _set_before_torchrun(name: str) -> bool:
    """Whether torchrun itself inherited the variable; True without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    try:
        rows = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(row.startswith(f"{name}=".encode()) for row in rows)


at_stop: list[Callable[[], None]] = []

"""What must end before the process group does, such as an engine with its own process groups."""


def stop() -> None:
    """Leave the job."""
    while at_stop:
        at_stop.pop()()
    if dist.is_initialized():
        dist.destroy_process_group()


POLL_S = 0.2
ALONE_S = 5.0  # how long a rank with a mistake to report waits for the first rank to report it


def complaint(e: ValueError) -> str | int:
    """Return what a command exits with after a user's mistake: one sentence, printed by the first rank only.

    Another rank reports a mistake that the first does not see: a file missing on one machine, a full GPU.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        if dist.is_initialized():
            dist.distributed_c10d._get_default_store().set("complaint", "1")
        return f"error: {e}"
    if not dist.is_initialized():
        return 1  # before the ranks meet, all have read the same command
    try:
        dist.distributed_c10d._get_default_store().wait(["complaint"], datetime.timedelta(seconds=ALONE_S))
    except dist.DistError:
        return f"error: {e}" if str(e).startswith("On rank") else f"error: on rank {rank}: {e}"
    return 1
