"""From a whole program to a program for each role."""

from syncwright.cut.roles import Roles, cut

__all__ = ["Roles", "cut"]
