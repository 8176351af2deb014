"""How each variable is shared: what a person writes (`Rules`) and what it means for one program (`Plan`).

partition and placement   how a variable is cut, and which server keeps each piece
sync                      the ways of sharing a variable: the union `Sync`
rules                     Rules and their YAML
plan                      Plan and its YAML
resolve, check            Rules -> Plan; does a Plan fit a program and a cluster?
"""

from syncwright.plan.check import check
from syncwright.plan.partition import Blocks, Even, Partition, Uneven, Whole, axis_length, cut
from syncwright.plan.placement import Hash, LeastLoaded, On, Placement, RoundRobin, Small, place
from syncwright.plan.plan import Piece, Plan, Sharing
from syncwright.plan.resolve import Update, resolve
from syncwright.plan.rules import BufferPolicy, Rules, Uncuttable
from syncwright.plan.sync import AllReduce, Local, ParameterServer, Sync

__all__ = [
    "AllReduce",
    "Blocks",
    "BufferPolicy",
    "Even",
    "Hash",
    "LeastLoaded",
    "Local",
    "On",
    "ParameterServer",
    "Partition",
    "Piece",
    "Placement",
    "Plan",
    "RoundRobin",
    "Rules",
    "Sharing",
    "Small",
    "Sync",
    "Uncuttable",
    "Uneven",
    "Update",
    "Whole",
    "axis_length",
    "check",
    "cut",
    "place",
    "resolve",
]
