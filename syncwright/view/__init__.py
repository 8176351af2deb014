"""What the command line shows: a script's first step, its plan as a table, programs and diffs, verdicts."""
