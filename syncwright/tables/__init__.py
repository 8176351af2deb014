"""Rows by 64-bit id, on one machine: what a server keeps of a table, and what `syncwright.nn.HashEmbedding` is made of.

mixing              from ids to shards and to bits that look random
lazily, index       a map from ids to slots
initial             what rows begin with
admission           which ids get a row, and which rows go again
settings            all of that for one table
saved, store        ids with named columns, and what is saved of them
table               rows, state per row, admission, eviction, exports
"""

from syncwright.tables.admission import (
    Admission,
    Always,
    CountFilter,
    Eviction,
    Forever,
    Probability,
    ScoreDecay,
    ShowClick,
    TimeToLive,
)
from syncwright.tables.index import IdIndex
from syncwright.tables.initial import Constant, Initial, Normal, Uniform
from syncwright.tables.mixing import mix64, shard_of
from syncwright.tables.saved import Part, Saved
from syncwright.tables.settings import Settings
from syncwright.tables.store import Column
from syncwright.tables.table import Removed, Table

__all__ = [
    "Admission",
    "Always",
    "Column",
    "Constant",
    "CountFilter",
    "Eviction",
    "Forever",
    "IdIndex",
    "Initial",
    "Normal",
    "Part",
    "Probability",
    "Removed",
    "Saved",
    "ScoreDecay",
    "Settings",
    "ShowClick",
    "Table",
    "TimeToLive",
    "Uniform",
    "mix64",
    "shard_of",
]
