"""What a program can do wrong: one error class for each cause.

    ProgramError
    ├── BrokenByPass             one of the below behind a pass, which it names
    └── BrokenRule
        ├── BrokenGraph          the fx graph is not well formed
        │   ├── UsedTooEarly         a node is used above the line that defines it
        │   └── BadOutput            there is not one output, last, from names to nodes
        ├── UnknownVariable      a placeholder, result or guard names no variable of the program
        ├── ReadTwice            two placeholders read one variable
        ├── ReadTooLate          a placeholder stands behind a computing node
        ├── UnreadableRole       a variable of this role can only be written
        ├── WrongRead            a placeholder's value does not have its variable's shape and dtype
        ├── WrongResult          a written value does not have its variable's shape and dtype
        ├── MissingValue         a node without meta["val"]
        ├── UnknownOp            a node that does something else than call an op that programs may call
        ├── MutatingOp           an op that writes to what it is given
        ├── WrongArgument        an argument that the op cannot take: a number for a tensor, or the reverse
        ├── InputChanged         a run changed a value that the program was given
        ├── RandomOpsChanged     a pass dropped, copied or reordered ops that draw random numbers
        └── NotForServers        a server's program reaches beyond the updates of what the server owns
            ├── ServerReadsBatch     it reads a batch
            ├── ServerRunsForward    it computes what forward and backward compute
            ├── ServerDrawsRandom    it draws random numbers
            ├── ServerReadsForeign   it reads what another role owns
            └── ServerWritesForeign  it writes what another role owns

Every message says which node or variable it is about, what was found, what was expected and what to do.
"""

from syncwright.errors import ProgramError


class BrokenRule(ProgramError):
    """A rule that a program breaks. `about` is the node, variable or guard; `remedy` says what to do."""

    def __init__(self, about: str, found: str, expected: str, remedy: str) -> None:
        super().__init__(about, found, expected, remedy)
        self.about, self.found, self.expected, self.remedy = about, found, expected, remedy

    def __str__(self) -> str:
        return f"{self.about}: found {self.found}, expected {self.expected}; {self.remedy}"


class BrokenGraph(BrokenRule):
    """The fx graph is not well formed."""


class UsedTooEarly(BrokenGraph):
    """A node is used above the line that defines it, or belongs to another graph."""


class BadOutput(BrokenGraph):
    """There must be one output node, last, with a dict from variables' names to nodes."""


class UnknownVariable(BrokenRule):
    """A placeholder, result or guard must name a variable of the program."""


class ReadTwice(BrokenRule):
    """A variable must have at most one placeholder."""


class ReadTooLate(BrokenRule):
    """Placeholders must stand before everything that computes."""


class UnreadableRole(BrokenRule):
    """An OUTPUT must not be read: it exists only behind the step."""


class WrongRead(BrokenRule):
    """A placeholder's value must have its variable's shape and dtype."""


class WrongResult(BrokenRule):
    """A written value must have its variable's shape and dtype."""


class MissingValue(BrokenRule):
    """Every node but the output must have meta["val"]."""


class UnknownOp(BrokenRule):
    """A node must call an op that programs may call."""


class MutatingOp(BrokenRule):
    """An op must not write to what it is given, unless the caller excepts it."""


class WrongArgument(BrokenRule):
    """An op must be given what its schema asks for."""


class InputChanged(BrokenRule):
    """A run must leave the values that it is given as they are, to the bit."""


class RandomOpsChanged(BrokenRule):
    """Passes must keep every op that draws random numbers, once, in order."""


class BrokenByPass(ProgramError):
    """A pass must turn a legal program into a legal program."""


class NotForServers(BrokenRule):
    """A server's program must only update what the server owns."""


class ServerReadsBatch(NotForServers):
    """A server must not read a batch."""


class ServerRunsForward(NotForServers):
    """A server must not compute gradients or the step's outputs."""


class ServerDrawsRandom(NotForServers):
    """A server must not draw random numbers: they belong to the trainers' streams."""


class ServerReadsForeign(NotForServers):
    """A server must not read a parameter, buffer, state or gradient that it does not own."""


class ServerWritesForeign(NotForServers):
    """A server must not write a parameter, buffer or state that it does not own."""
