"""Scope GRID: a token map goes on smaller."""
