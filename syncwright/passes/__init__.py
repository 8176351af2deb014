"""The passes that turn a captured program into a whole program of what every role does, in the order in which they run.

A pass is one public function `name(program, plan) -> Program`, alone in its file.
"""

from syncwright.passes.average import average_gradients, average_values
from syncwright.passes.bucket import bucket
from syncwright.passes.compensate import compensate
from syncwright.passes.flatten import flatten
from syncwright.passes.serve_parameters import serve_parameters
from syncwright.passes.share_globals import share_globals
from syncwright.passes.tidy import tidy

PIPELINE = (serve_parameters, compensate, share_globals, average_gradients, average_values, bucket, tidy)
COMPILED = (serve_parameters, compensate, share_globals, average_gradients, average_values, bucket, flatten, tidy)
