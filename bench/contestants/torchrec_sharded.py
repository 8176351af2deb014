"""TorchRec: tables sharded over the trainers by its planner, the update fused into their backward, the rest under DDP."""

from __future__ import annotations

import itertools

import torch
from torch import distributed as dist
from torch import nn

from bench.contestants import NotAvailable, Running, Seat
from bench.contestants.group import join
from bench.sparse_models import Dense
from bench.sparse_workloads import Recommender

DEVICE = torch.device("cpu")
EPSILON = 1e-10  # of torch's Adagrad


class Model(nn.Module):
    """A recommender whose tables are one EmbeddingBagCollection. The forward returns the loss."""

    def __init__(self, recommender: Recommender) -> None:
        super().__init__()
        from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType

        configs = [
            EmbeddingBagConfig(
                name=f"t{place}",
                embedding_dim=recommender.width,
                num_embeddings=rows,
                feature_names=[f"f{place}"],
                pooling=PoolingType.SUM,
            )
            for place, rows in enumerate(recommender.rows)
        ]
        self.tables = EmbeddingBagCollection(configs, device=DEVICE)
        self.dense = Dense(recommender)

    def forward(self, dense: torch.Tensor, ids: object, label: torch.Tensor) -> torch.Tensor:
        found = self.tables(ids).to_dict()  # by feature: sharding moves their order
        return self.dense(dense, torch.stack([found[key] for key in ids.keys()], dim=1), label)  # noqa: SIM118


def start(workload: Recommender, seat: Seat, sharding: str) -> Running:
    """sharding: "table_wise", "column_wise" or "row_wise", of all tables. Batches are made ready ahead of time."""
    from torchrec.distributed import DistributedModelParallel

    join(seat)
    sharders = [sharder(workload)]
    module = Model(workload)
    try:
        plan = planner(workload, seat, sharding).collective_plan(module, sharders, dist.group.WORLD)
    except RuntimeError as error:
        raise NotAvailable(f"TorchRec's planner: {error}") from error
    model = DistributedModelParallel(module, device=DEVICE, plan=plan, sharders=sharders)
    fill(model, workload)
    dense = [parameter for name, parameter in model.named_parameters() if "embedding_bags" not in name]
    optimizer = workload.optimizer_of(dense)

    def step(*batch: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(*batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    batches = [(x, lookups(ids, workload), label) for x, ids, label in workload.batches(seat.rank)]
    return Running(step, dist.destroy_process_group, itertools.cycle(batches))


def fill(model: nn.Module, workload: Recommender) -> None:
    """Every trainer's shards get the workload's initial values."""
    state = model.state_dict()
    for place, values in enumerate(workload.tables()):
        (name,) = (name for name in state if name.endswith(f".t{place}.weight"))
        for shard in state[name].local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            part = torch.from_numpy(values)[row : row + rows, column : column + columns]
            shard.tensor.detach().copy_(part)


def sharder(workload: Recommender) -> object:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

    kind = {"sgd": EmbOptimType.EXACT_SGD, "adagrad": EmbOptimType.EXACT_ADAGRAD}[workload.optimizer_name]
    return EmbeddingBagCollectionSharder(fused_params={"optimizer": kind, "learning_rate": workload.lr, "eps": EPSILON})


def planner(workload: Recommender, seat: Seat, sharding: str) -> object:
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology

    constraint = ParameterConstraints(
        sharding_types=[sharding],
        compute_kernels=["fused"],
        min_partition=workload.width // seat.processes if sharding == "column_wise" else None,
    )
    return EmbeddingShardingPlanner(
        topology=Topology(
            world_size=seat.processes, compute_device="cpu", local_world_size=seat.processes, ddr_cap=16 * 2**30
        ),
        batch_size=workload.batch,
        constraints={f"t{place}": constraint for place in range(len(workload.rows))},
    )


def lookups(ids: torch.Tensor, workload: Recommender) -> object:
    """A batch's ids as TorchRec takes them: feature by feature."""
    from torchrec import KeyedJaggedTensor

    features = len(workload.rows)
    by_feature = ids.view(len(ids), features, workload.ids).transpose(0, 1)
    return KeyedJaggedTensor(
        keys=[f"f{place}" for place in range(features)],
        values=by_feature.reshape(-1).contiguous(),
        lengths=torch.full((features * len(ids),), workload.ids),
    )
