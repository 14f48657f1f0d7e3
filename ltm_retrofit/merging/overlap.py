"""Old names, until their callers have moved."""

from __future__ import annotations

from ltm_retrofit.merging.pool import overlaps

__all__ = ["overlaps"]
