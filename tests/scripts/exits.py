"""Does not like its arguments."""

import sys

sys.exit(3)
