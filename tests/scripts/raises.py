"""Fails before its first step."""


def load():
    raise FileNotFoundError("no data here")


load()
