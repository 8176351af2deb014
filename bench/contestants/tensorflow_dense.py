"""Whole variables under TensorFlow's ParameterServerStrategy: a bare transfer, or the MLP in training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from bench.contestants import Running, Seat
from bench.contestants.tensorflow_ps import Job, Update, join, serve
from bench.server_workloads import Training, Transfer

__all__ = ["serve", "start"]


def start(workload: Transfer | Training, seat: Seat) -> Running:
    job = join(seat)
    return transfer(workload, job) if isinstance(workload, Transfer) else training(workload, job)


def transfer(workload: Transfer, job: Job) -> Running:
    """Every worker reads every variable, and hands a gradient of its own making to the server."""
    with job.strategy.scope():
        updates = [Update(tf.Variable(tf.zeros([count])), "sgd", 0.1) for count in workload.counts()]

    @tf.function
    def step(iterator: object) -> tf.Tensor:
        (seed,) = next(iterator)
        values = [update.variable.read_value() for update in updates]
        first = tf.add_n([value[0] for value in here(values)])
        for update in updates:
            update.dense(tf.fill(update.variable.shape, seed))
        return first * 0.0

    return job.running(step, job.dataset([(np.float32(place),) for place in range(8)]))


def here(values: list[tf.Tensor]) -> list[tf.Tensor]:
    """The values on the worker that runs the step: a part of one would otherwise be taken at the server."""
    return [tf.reduce_max(value, keepdims=True) for value in values]


def training(workload: Training, job: Job) -> Running:
    with job.strategy.scope():
        layers = [tuple(map(tf.Variable, layer)) for layer in workload.layers()]
        variables = [part for layer in layers for part in layer]
        updates = [Update(variable, "adam", workload.lr) for variable in variables]

    @tf.function
    def step(iterator: object) -> tf.Tensor:
        x, label = next(iterator)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(label, outputs(x, layers, tf.nn.relu)))
        for update, gradient in zip(updates, tape.gradient(loss, variables), strict=True):
            update.dense(gradient)
        return loss

    batches = [batch for rank in range(job.workers) for batch in workload.arrays(rank)]
    return job.running(step, job.dataset(batches))


def outputs(x: tf.Tensor, layers: list[tuple], activation: Callable) -> tf.Tensor:
    for weight, bias in layers[:-1]:
        x = activation(tf.matmul(x, weight, transpose_b=True) + bias)
    weight, bias = layers[-1]
    return tf.matmul(x, weight, transpose_b=True) + bias
