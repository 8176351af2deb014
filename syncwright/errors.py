"""What can go wrong, as a tree.

    SyncwrightError
    ├── CaptureError        the step, the model or the optimizer cannot become a program
    ├── ProgramError        a program breaks a rule that every program keeps      (one subclass per rule)
    ├── PlanError           rules or a plan that cannot be meant
    ├── ClusterError        the machines are not the ones that the plan was made for
    ├── LoweringError       a plan that cannot be carried out exactly on this program
    ├── DeferredError       a tensor that is not made yet is asked for what its record cannot hold or give
    ├── TableError          a table of rows by id cannot hold, find or restore what it is asked to
    │   └── TableFull           its capacity is used up
    ├── BatchError          a batch that does not fit the step
    ├── RequestError        the command line, or a trainer, was asked for something that is not there
    └── JobError            a running job cannot go on
        ├── PeerLost            a role that others wait for is gone
        ├── DeadlineExceeded    a role that others wait for is late
        └── Disagreement        two roles derived different jobs from the script

Every message says which variable, node or line it is about, what was found, what was expected and what to do.
"""


class SyncwrightError(Exception):
    """Everything that Syncwright raises on purpose."""


class CaptureError(SyncwrightError):
    """The step, the model or the optimizer cannot become a program."""


class ProgramError(SyncwrightError):
    """A program breaks a rule that every program keeps."""


class PlanError(SyncwrightError, ValueError):
    """Rules or a plan that cannot be meant."""


class ClusterError(SyncwrightError):
    """The machines are not the ones that the plan was made for."""


class LoweringError(SyncwrightError):
    """A plan that cannot be carried out exactly on this program."""


class DeferredError(SyncwrightError, RuntimeError):
    """A tensor that is not made yet is asked for what its record cannot hold or give."""


class TableError(SyncwrightError):
    """A table of rows by id cannot hold, find or restore what it is asked to."""


class TableFull(TableError):
    """Its capacity is used up."""


class BatchError(SyncwrightError, ValueError):
    """A batch that does not fit the step."""


class RequestError(SyncwrightError):
    """The command line, or a trainer, was asked for something that is not there."""


class JobError(SyncwrightError, RuntimeError):
    """A running job cannot go on."""


class PeerLost(JobError):
    """A role that others wait for is gone."""


class DeadlineExceeded(JobError):
    """A role that others wait for is late."""


class Disagreement(JobError):
    """Two roles derived different jobs from the script."""
