"""What a program can do wrong: one error class for each cause.

    ProgramError
    ├── BrokenByPass             one of the below behind a pass, which it names
    └── BrokenRule
        ├── BrokenGraph          the fx graph is not well formed
        │   ├── UsedTooEarly         a node is used above the line that defines it
        │   └── BadOutput            there is not one output, last, from names to nodes
        ├── UnknownVariable      a placeholder, result, guard or channel names no variable of the program
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
        ├── Misplaced            places in a whole program do not fit together
        │   ├── ReadElsewhere        a node reads what runs in another place, and no communication brings it
        │   ├── WrittenElsewhere     a variable is written where it is not kept
        │   ├── UnknownOwners        a node runs at the owners of what no server keeps
        │   └── WrongCrossing        a communication between other roles than its op is for
        ├── RandomOpsChanged     a pass dropped, copied or reordered ops that draw random numbers
        ├── NotForServers        a server's program reaches beyond the updates of what the server owns
        │   ├── ServerReadsBatch     it reads a batch
        │   ├── ServerRunsForward    it computes what forward and backward compute
        │   ├── ServerDrawsRandom    it draws random numbers
        │   ├── ServerReadsForeign   it reads what another role owns
        │   └── ServerWritesForeign  it writes what another role owns
        └── IllegalJob           programs that are each legal do not make a job together
            ├── NoSuchServer         a channel, owner or export names a server that the job does not have
            ├── UnknownChannel       a push that no server takes
            ├── WrongPush            what is pushed does not have its channel's shape and dtype
            ├── PushedTwice          two pushes to one channel in one step
            ├── NeverPushed          a server waits for a channel to which no trainer pushes
            ├── PulledFromNobody     a pull of what has no owner, or whose owner neither keeps nor computes it
            ├── WrongPull            a pull does not have the shape and dtype of what its owner keeps
            ├── PulledTooEarly       a value of this step is pulled without waiting for what it is made of
            ├── UnfedRead            a server reads what nobody keeps, pushes, computes or exports for it
            ├── WrittenTwice         two programs write one variable
            ├── HeldTwice            two servers keep one variable
            ├── ReducedTwice         two collectives of one channel in one step
            ├── BadWait              a collective that is not waited for once, or a wait for none
            ├── OtherSequence        the program for empty batches sends other things than the step
            └── Deadlock             servers and trainers wait for each other

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
    """A placeholder, result, guard or channel of a whole program must name a variable of the program."""


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


class Misplaced(BrokenRule):
    """The places in a whole program must fit together."""


class ReadElsewhere(Misplaced):
    """A node must read what runs where it runs, or what a communication brings there."""


class WrittenElsewhere(Misplaced):
    """A variable must be written where it is kept."""


class UnknownOwners(Misplaced):
    """A node may run at the owners of a variable only if servers keep that variable."""


class WrongCrossing(Misplaced):
    """Trainers push to servers and pull from them; servers send to one another, or gather from all owners."""


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


class IllegalJob(BrokenRule):
    """Programs that are each legal must also make a job together."""


class NoSuchServer(IllegalJob):
    """Channels, owners and exports must name servers of the job."""


class UnknownChannel(IllegalJob):
    """Every push must have a channel that a server takes."""


class WrongPush(IllegalJob):
    """What is pushed must have its channel's shape and dtype."""


class PushedTwice(IllegalJob):
    """A trainer must push to a channel once per step."""


class NeverPushed(IllegalJob):
    """Trainers must push to every channel: its server waits for them."""


class PulledFromNobody(IllegalJob):
    """Every pull must have an owner that keeps, merges or computes the value."""


class WrongPull(IllegalJob):
    """A pull must have the shape and dtype of what its owner keeps or computes."""


class PulledTooEarly(IllegalJob):
    """A pull of what is computed in this step must wait for a push of this step."""


class UnfedRead(IllegalJob):
    """What a server reads must be kept, merged or computed there, or exported to it."""


class WrittenTwice(IllegalJob):
    """A variable must be written by one program at most."""


class HeldTwice(IllegalJob):
    """A variable must be kept by one server at most."""


class ReducedTwice(IllegalJob):
    """A collective must have a channel of its own."""


class BadWait(IllegalJob):
    """Every collective must be waited for exactly once."""


class BadGroup(IllegalJob):
    """What trainers do in a group must be in one of the plan's, which has as many of them as the operation says."""


class OtherSequence(IllegalJob):
    """All programs of a trainer must send the same things in the same order, or its peers hang."""


class Deadlock(IllegalJob):
    """No value may be needed for something that it is itself made from."""
