"""Scope FLOW: tokens stay merged from a block on."""
