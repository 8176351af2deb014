"""How each variable is shared: what a person writes (`Rules`) and what it means for one program (`Plan`).

compression               what gradients are made of before trainers reduce them
partition and placement   how a variable is cut, and which server keeps each piece
outer                     what trainers that train alone make of their values when they exchange them
sync                      the ways of sharing a variable: the union `Sync`
precision                 by what the loss is scaled
groups                    which trainers communicate with each other
rules                     Rules and their YAML
plan                      Plan and its YAML
spans                     which plan holds at a step
by_id                     tables whose rows are kept by the id's virtual shard
resolve, check            Rules -> Plan; does a Plan fit a program and a cluster?
"""

from syncwright.plan.check import check
from syncwright.plan.compression import Cast, Compression, ErrorFeedback, Int8, PowerSGD, TopK
from syncwright.plan.groups import ACROSS, ALL, BY_NODE, FIRSTS, NODE, Groups, is_within
from syncwright.plan.outer import Geo, Mean, Optimizer, Outer
from syncwright.plan.partition import Blocks, Even, Hashed, Partition, Uneven, Whole, axis_length, cut
from syncwright.plan.placement import Hash, LeastLoaded, On, Placement, RoundRobin, Small, place
from syncwright.plan.plan import Piece, Plan, Sharing
from syncwright.plan.precision import Dynamic
from syncwright.plan.resolve import Update, resolve
from syncwright.plan.rules import BufferPolicy, Rules, Uncuttable
from syncwright.plan.spans import plan_at, starts_of
from syncwright.plan.sync import (
    AllGather,
    AllReduce,
    Collective,
    Local,
    LocalSteps,
    ParameterServer,
    Shard,
    Sync,
    asks_for_hosts,
    joins_hosts,
    served_by,
    shown,
)

__all__ = [
    "ACROSS",
    "ALL",
    "BY_NODE",
    "FIRSTS",
    "NODE",
    "AllGather",
    "AllReduce",
    "Blocks",
    "BufferPolicy",
    "Cast",
    "Collective",
    "Compression",
    "Dynamic",
    "ErrorFeedback",
    "Even",
    "Geo",
    "Groups",
    "Hash",
    "Hashed",
    "Int8",
    "LeastLoaded",
    "Local",
    "LocalSteps",
    "Mean",
    "On",
    "Optimizer",
    "Outer",
    "ParameterServer",
    "Partition",
    "Piece",
    "Placement",
    "Plan",
    "PowerSGD",
    "RoundRobin",
    "Rules",
    "Shard",
    "Sharing",
    "Small",
    "Sync",
    "TopK",
    "Uncuttable",
    "Uneven",
    "Update",
    "Whole",
    "asks_for_hosts",
    "axis_length",
    "check",
    "cut",
    "is_within",
    "joins_hosts",
    "place",
    "plan_at",
    "resolve",
    "served_by",
    "shown",
    "starts_of",
]
