"""What is checked before anything runs: programs, what passes make of them, and the programs of servers.

`causes` draws the errors. Rules of one program stand in `program` and `arguments`, of a run in `running`, of
a pass in `passes`, of a server in `server`; rules of a whole job (every push has its pull) belong in a file
`job` beside them.
"""

from syncwright.verify.causes import (
    BadOutput,
    BrokenByPass,
    BrokenGraph,
    BrokenRule,
    InputChanged,
    MissingValue,
    MutatingOp,
    NotForServers,
    RandomOpsChanged,
    ReadTooLate,
    ReadTwice,
    ServerDrawsRandom,
    ServerReadsBatch,
    ServerReadsForeign,
    ServerRunsForward,
    ServerWritesForeign,
    UnknownOp,
    UnknownVariable,
    UnreadableRole,
    UsedTooEarly,
    WrongArgument,
    WrongRead,
    WrongResult,
)
from syncwright.verify.passes import draws_random, verify_after
from syncwright.verify.program import verify
from syncwright.verify.running import verify_inputs_unchanged
from syncwright.verify.server import verify_server

__all__ = [
    "BadOutput",
    "BrokenByPass",
    "BrokenGraph",
    "BrokenRule",
    "InputChanged",
    "MissingValue",
    "MutatingOp",
    "NotForServers",
    "RandomOpsChanged",
    "ReadTooLate",
    "ReadTwice",
    "ServerDrawsRandom",
    "ServerReadsBatch",
    "ServerReadsForeign",
    "ServerRunsForward",
    "ServerWritesForeign",
    "UnknownOp",
    "UnknownVariable",
    "UnreadableRole",
    "UsedTooEarly",
    "WrongArgument",
    "WrongRead",
    "WrongResult",
    "draws_random",
    "verify",
    "verify_after",
    "verify_inputs_unchanged",
    "verify_server",
]
