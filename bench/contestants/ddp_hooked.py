"""DistributedDataParallel with a communication hook: torch's own, and one for the largest elements, of which torch has none.

Annotations are looked at by `register_comm_hook`, so they are no strings here.
"""

import torch
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from bench.contestants import Running, Seat
from bench.contestants.group import join
from bench.workloads import Workload

ONE_BUCKET_MB = 1000
RANK, RATIO = 4, 0.01
FIRST_OF_POWER_SGD = 4
"""The step at which factors begin to travel: at least 2, as torch asks."""


def start(workload: Workload, seat: Seat, hook: str, one_bucket: bool = False, compile: bool = False) -> Running:
    """
    hook        "fp16", "power_sgd" or "top_k"
    one_bucket  all gradients in one, in place of buckets of 25 MB behind a first of 1 MB
    """
    join(seat)
    sizes = {"bucket_cap_mb": ONE_BUCKET_MB} if one_bucket else {}
    module = DistributedDataParallel(workload.model(), **sizes)
    match hook:
        case "fp16":
            module.register_comm_hook(None, default_hooks.fp16_compress_hook)
        case "power_sgd":
            state = powerSGD_hook.PowerSGDState(None, RANK, start_powerSGD_iter=FIRST_OF_POWER_SGD)
            module.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        case "top_k":
            module.register_comm_hook({}, largest_elements)
    optimizer = workload.optimizer(module, False)
    forward = torch.compile(module) if compile else module

    def step(*batch: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = forward(*batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Running(step, dist.destroy_process_group)


def largest_elements(left: dict[int, torch.Tensor], bucket: dist.GradBucket) -> Future[torch.Tensor]:
    """What users write: the largest elements of a bucket and their places are gathered, the others kept for the next step.

    After its first step DDP makes its buckets anew; what was kept until then is let go.
    """
    flat, trainers = bucket.buffer(), dist.get_world_size()
    kept = left.get(bucket.index())
    if kept is not None and kept.numel() == flat.numel():
        flat.add_(kept)
    places = torch.topk(flat.abs(), max(1, round(RATIO * flat.numel())), sorted=False).indices
    values = flat[places]
    left[bucket.index()] = flat.index_fill(0, places, 0.0)
    sent = torch.cat([values.view(torch.int32), places.to(torch.int32)])
    gathered = sent.new_empty(trainers * sent.numel())
    work = dist.all_gather_into_tensor(gathered, sent, async_op=True)

    def summed(_: Future) -> torch.Tensor:
        total = flat.zero_()
        for part in gathered.chunk(trainers):
            numbers, where = part.chunk(2)
            total.index_add_(0, where, numbers.view(torch.float32))
        return total.div_(trainers)

    return work.get_future().then(summed)
