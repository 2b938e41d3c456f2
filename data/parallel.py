"""Several processes as one: who I am, and sums and copies across all of them. One process needs
none of it.

    torchrun --nproc-per-node 2 train.py ...       # start() finds the variables that torchrun sets

Every process holds a share of the windows (`mine`); what is summed over windows is summed over
processes (`add`); the first process decides and the others copy it (`copy_first`). gloo connects
CPUs, nccl GPUs. Left out: splitting a model.
"""
import datetime
import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist


def start(device: str = "cpu") -> str:
    """Join the processes that torchrun started; returns this process's own device. Without
    torchrun: device, unchanged."""
    if is_one_of_several() and not dist.is_initialized():
        if device == "cuda":
            place, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if place >= count:
                raise ValueError(f"{os.environ['LOCAL_WORLD_SIZE']} processes, {count} GPUs: use "
                                 f"--nproc-per-node {count}")
            device = f"cuda:{place}"
            torch.cuda.set_device(device)
        backend = "nccl" if device.startswith("cuda") else "gloo"
        # the others wait while the first solves, for hours where models are large
        dist.init_process_group(backend, timeout=datetime.timedelta(days=7))
    return device


def is_one_of_several() -> bool:
    """Did torchrun start more than this process? Says so before they are joined as well."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def stop() -> None:
    """Leave the other processes; start() may join them again."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def end() -> None:
    """The last call of a program. One of several processes ends here, its work written: on the way
    through a normal exit torch 2.13 sometimes aborts, when it takes down its own threads."""
    if is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """0 for the process that prints, solves and writes."""
    return dist.get_rank() if world() > 1 else 0


def mine(items: Sequence) -> Sequence:
    """This process's share of items: every world-th one."""
    return items[rank()::world()]


def add(*tensors: torch.Tensor) -> None:
    """Sum each tensor over all processes, in place."""
    if world() > 1:
        for t in tensors:
            dist.all_reduce(t)


def add_numbers(*numbers: float) -> list[float]:
    """Each number summed over all processes, in fp64."""
    held = torch.tensor(numbers, dtype=torch.float64)
    if world() > 1 and dist.get_backend() == "nccl":
        held = held.cuda()
    add(held)
    return held.tolist()


def copy_first(*tensors: torch.Tensor) -> None:
    """Overwrite each tensor by the first process's."""
    if world() > 1:
        for t in tensors:
            dist.broadcast(t, 0)


def first_object(held):
    """The first process's object, JSON values say, in every process."""
    box = [held]
    if world() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def wait() -> None:
    """Until every process has come here: what the first has written, the others may read."""
    if world() > 1:
        dist.barrier()
