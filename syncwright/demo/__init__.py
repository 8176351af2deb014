"""What `syncwright demo` shows; the script that it trains is `examples/flights.py`, which the wheel holds here."""
