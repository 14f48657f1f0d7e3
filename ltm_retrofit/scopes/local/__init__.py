"""Scope LOCAL: tokens are merged within one block only."""
