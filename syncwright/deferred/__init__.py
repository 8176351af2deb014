"""Large tensors that are recorded, and made by who keeps them."""

from syncwright.deferred.mode import deferred

__all__ = ["deferred"]
