"""Old names, until their callers have moved."""

from __future__ import annotations

from ltm_retrofit.merging.pool import PoolMask
from ltm_retrofit.merging.slice import SliceMask
from ltm_retrofit.merging.tome import ToMeMask

__all__ = ["PoolMask", "SliceMask", "ToMeMask"]
