"""TensorFlow's ParameterServerStrategy: a coordinator hands steps to workers; variables live on servers; asynchronous.

Updates are the operations that TensorFlow's own optimizers end in, applied where the variable lives.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from bench.contestants import Running, Seat

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # of torch's Adam
TINY = 1e-10  # of torch's Adagrad


def cluster(seat: Seat) -> tf.train.ClusterSpec:
    """Everybody's address, the coordinator's ("chief") first."""
    places = [f"127.0.0.1:{port}" for port in seat.ports]
    jobs: dict[str, list[str]] = {"chief": [places[0]]}
    for role, place in zip(seat.helpers, places[seat.processes :], strict=False):
        jobs.setdefault(role, []).append(place)
    return tf.train.ClusterSpec(jobs)


def one_thread() -> None:
    """For computing. What waits for the network has a thread of its own."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def serve(workload: object, seat: Seat, **options: object) -> None:
    """A worker, or a server of variables, until its process is ended."""
    one_thread()
    server = tf.distribute.Server(cluster(seat), job_name=seat.role, task_index=seat.rank, protocol="grpc")
    server.join()


@dataclass(frozen=True, slots=True)
class Job:
    """A coordinator and its strategy."""

    strategy: tf.distribute.ParameterServerStrategy
    coordinator: tf.distribute.coordinator.ClusterCoordinator
    workers: int

    def dataset(self, batches: Sequence[Sequence[np.ndarray]]) -> object:
        """On every worker the batches of all, in an order of its own, again and again."""
        arrays = tuple(np.stack(parts) for parts in zip(*batches, strict=True))

        def build() -> tf.data.Dataset:
            return tf.data.Dataset.from_tensor_slices(arrays).shuffle(len(batches)).repeat()

        return iter(self.coordinator.create_per_worker_dataset(build))

    def running(self, function: Callable, *arguments: object) -> Running:
        """A step: every worker runs `function` once, whoever is free. A block does not wait between its steps."""

        def schedule() -> list:
            return [self.coordinator.schedule(function, args=arguments) for _ in range(self.workers)]

        def step() -> float:
            scheduled = schedule()
            self.coordinator.join()
            return float(np.mean([one.fetch() for one in scheduled]))

        def block(steps: int, batches: Iterator[tuple]) -> None:
            for _ in range(steps):
                scheduled = schedule()
            self.coordinator.join()
            for one in scheduled:
                one.fetch()

        return Running(step, lambda: None, itertools.repeat(()), block)


def join(seat: Seat) -> Job:
    one_thread()
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        cluster(seat), task_type="chief", task_id=0, rpc_layer="grpc"
    )
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    return Job(strategy, tf.distribute.coordinator.ClusterCoordinator(strategy), seat.count("worker"))


# --- updates -------------------------------------------------------------------------------------------


class Update:
    """One variable's update. Changes with every push: a server applies each as it arrives."""

    def __init__(self, variable: tf.Variable, optimizer: str, lr: float) -> None:
        self.variable, self.optimizer, self.lr = variable, optimizer, tf.constant(lr)
        count = {"sgd": 0, "adagrad": 1, "adam": 2}[optimizer]
        self.state = [tf.Variable(tf.zeros_like(variable), trainable=False) for _ in range(count)]
        if optimizer == "adam":
            self.powers = [tf.Variable(beta, trainable=False) for beta in (BETA1, BETA2)]

    def dense(self, gradient: tf.Tensor) -> None:
        handle = self.variable.handle
        if self.optimizer == "sgd":
            tf.raw_ops.ResourceApplyGradientDescent(var=handle, alpha=self.lr, delta=gradient)
        elif self.optimizer == "adagrad":
            (total,) = self.state
            tf.raw_ops.ResourceApplyAdagradV2(
                var=handle, accum=total.handle, lr=self.lr, epsilon=tf.constant(TINY), grad=gradient
            )
        else:
            self._adam(gradient)

    def rows(self, gradient: tf.Tensor, ids: tf.Tensor) -> None:
        """`ids` without duplicates."""
        handle = self.variable.handle
        if self.optimizer == "sgd":
            tf.raw_ops.ResourceScatterSub(resource=handle, indices=ids, updates=self.lr * gradient)
            return
        (total,) = self.state
        tf.raw_ops.ResourceSparseApplyAdagradV2(
            var=handle, accum=total.handle, lr=self.lr, epsilon=tf.constant(TINY), grad=gradient, indices=ids
        )

    def _adam(self, gradient: tf.Tensor) -> None:
        (first, second), (power1, power2) = self.state, self.powers
        tf.raw_ops.ResourceApplyAdam(
            var=self.variable.handle,
            m=first.handle,
            v=second.handle,
            beta1_power=power1.read_value(),
            beta2_power=power2.read_value(),
            lr=self.lr,
            beta1=tf.constant(BETA1),
            beta2=tf.constant(BETA2),
            epsilon=tf.constant(EPSILON),
            grad=gradient,
        )
        power1.assign(power1 * BETA1)
        power2.assign(power2 * BETA2)
