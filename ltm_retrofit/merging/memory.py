"""Old names, until their callers have moved."""

from __future__ import annotations

from ltm_retrofit.merging.statistics import Memory

__all__ = ["Memory"]
