"""A recommender under TensorFlow's ParameterServerStrategy: only the rows that a batch needs travel."""

from __future__ import annotations

import tensorflow as tf

from bench.contestants import Running, Seat
from bench.contestants.tensorflow_ps import Update, join, serve
from bench.sparse_workloads import Recommender

__all__ = ["serve", "start"]


class Dense:
    """All but the tables: from dense features and the tables' vectors to the loss."""

    def __init__(self, recommender: Recommender) -> None:
        groups = recommender.layers()
        self.bottom, self.top = ([tuple(map(tf.Variable, layer)) for layer in group] for group in groups)
        self.dots = recommender.dots
        vectors = len(recommender.rows) + 1
        self.pairs = [row * vectors + column for row in range(vectors) for column in range(row)]

    @property
    def variables(self) -> list[tf.Variable]:
        return [part for layer in [*self.bottom, *self.top] for part in layer]

    def loss(self, dense: tf.Tensor, vectors: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
        """`vectors`: (examples, tables, width)."""
        for weight, bias in self.bottom:
            dense = tf.nn.relu(tf.matmul(dense, weight, transpose_b=True) + bias)
        count = tf.shape(dense)[0]
        if self.dots:
            everyone = tf.concat([dense[:, None], vectors], axis=1)
            products = tf.reshape(tf.matmul(everyone, everyone, transpose_b=True), [count, -1])
            x = tf.concat([dense, tf.gather(products, self.pairs, axis=1)], axis=1)
        else:
            x = tf.concat([tf.reshape(vectors, [count, vectors.shape[1] * vectors.shape[2]]), dense], axis=1)
        for weight, bias in self.top[:-1]:
            x = tf.nn.relu(tf.matmul(x, weight, transpose_b=True) + bias)
        weight, bias = self.top[-1]
        scores = (tf.matmul(x, weight, transpose_b=True) + bias)[:, 0]
        return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(label, scores))


def start(workload: Recommender, seat: Seat) -> Running:
    job = join(seat)
    with job.strategy.scope():
        tables = [Update(tf.Variable(values), workload.optimizer_name, workload.lr) for values in workload.tables()]
        model = Dense(workload)
        updates = [Update(variable, workload.optimizer_name, workload.lr) for variable in model.variables]

    def lookup(place: int, ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """A table's different ids, their rows, and where each id of the batch finds its own."""
        columns = ids[:, place * workload.ids : (place + 1) * workload.ids]
        unique, places = tf.unique(tf.reshape(columns, [-1]))
        return unique, tf.gather(tables[place].variable, unique), tf.reshape(places, tf.shape(columns))

    @tf.function
    def step(iterator: object) -> tf.Tensor:
        dense, ids, label = next(iterator)
        found = [lookup(place, ids) for place in range(len(tables))]
        rows = [rows for _, rows, _ in found]
        with tf.GradientTape() as tape:
            tape.watch(rows)
            summed = [tf.reduce_sum(tf.gather(rows, places), axis=1) for _, rows, places in found]
            loss = model.loss(dense, tf.stack(summed, axis=1), label)
        gradients = tape.gradient(loss, [*rows, *model.variables])
        for table, (unique, _, _), gradient in zip(tables, found, gradients, strict=False):
            table.rows(tf.convert_to_tensor(gradient), unique)
        for update, gradient in zip(updates, gradients[len(tables) :], strict=True):
            update.dense(gradient)
        return loss

    batches = [batch for rank in range(job.workers) for batch in workload.arrays(rank)]
    return job.running(step, job.dataset(batches))
