"""Ranks, devices and the few collectives that the loop needs beside FSDP's own."""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
    """Where this process stands in the job."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh
    sequence: int = 1
    """How many neighbouring ranks share a pack; they are a team."""
    sequence_group: dist.ProcessGroup | None = None
    """This rank's team, where it has more than one member."""
    tickets: Iterator[int] = field(default_factory=itertools.count, compare=False)
    """Numbers that come in the same order on every rank: names for what they share in the store."""

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

    def all_sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of `x` over all ranks, in place."""
        dist.all_reduce(x, op=dist.ReduceOp.SUM)
        return x

    def all_max(self, x: torch.Tensor) -> torch.Tensor:
        """Maximum of `x` over all ranks, in place."""
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return x

    def gather_objects(self, x: Any) -> list[Any]:
        """Every rank's `x`, in the order of ranks, on every rank."""
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, x)
        return out

    def barrier(self) -> None:
        dist.barrier()

    def say_once(self, what: str, text: str) -> None:
        """Print `text` on the first rank that has something to say of `what`; the others stay silent. No collective."""
        if self.store.add(f"said/{what}", 1) == 1:
            print(text, flush=True)


def start(parallel: ParallelConfig | None = None) -> Ranks:
    """Join the job that torchrun made, or make a job of one.

    CUDA machines use NCCL (and gloo for objects and asynchronous checkpoints), others gloo. On a CPU the ranks divide
    the cores between them, unless OMP_NUM_THREADS says how many threads each should have. The mesh is ("shard",), or
    ("replicate", "shard") with parallel.replicate copies of the sharded model.

    Raises:
        ValueError: parallel.replicate or parallel.sequence does not divide the number of ranks, or the GPUs that the
            driver shows cannot be used.
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
            # torchrun keeps one store over the restarts of a job: without a prefix, ranks may find their dead
            # predecessors' addresses in it. (Over several machines the count may differ from one to the other.)
            store = dist.PrefixStore(f"life-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # type: ignore
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    world = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    given = os.environ.get("OMP_NUM_THREADS", "")
    if not cuda and not (given and (local == 1 or given != "1")):  # for several ranks, torchrun itself sets it to 1
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
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


at_stop: list[Callable[[], None]] = []

"""What must end before the process group does, such as an engine with groups of its own."""


def stop() -> None:
    """Leave the job."""
    while at_stop:
        at_stop.pop()()
    if dist.is_initialized():
        dist.destroy_process_group()


def complaint(e: ValueError) -> str | int:
    """What a command exits with when its user made a mistake: one sentence, on the first rank alone."""
    return f"error: {e}" if os.environ.get("RANK", "0") == "0" else 1
