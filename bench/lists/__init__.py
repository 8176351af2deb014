"""Who is measured, one file per command: names and options, no code of theirs."""
