"""Modules that torch lacks.

slots                               lookups of ids in a table whose memory is a module's own tensors
row_state                           what an optimizer keeps for the rows
hash_embedding, hash_embedding_bag  embeddings of ids that nobody has counted
"""

from syncwright.nn.hash_embedding import HashEmbedding
from syncwright.nn.hash_embedding_bag import HashEmbeddingBag
from syncwright.tables import (
    Always,
    Constant,
    CountFilter,
    Forever,
    Normal,
    Probability,
    Saved,
    ScoreDecay,
    ShowClick,
    TimeToLive,
    Uniform,
)

__all__ = [
    "Always",
    "Constant",
    "CountFilter",
    "Forever",
    "HashEmbedding",
    "HashEmbeddingBag",
    "Normal",
    "Probability",
    "Saved",
    "ScoreDecay",
    "ShowClick",
    "TimeToLive",
    "Uniform",
]
