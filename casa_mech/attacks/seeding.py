"""Randomness that belongs to a query: the same seed and id give the same draw, whatever else is in the list."""

from __future__ import annotations

import hashlib

import numpy as np

from casa_mech.queries import Query


def query_rng(query: Query, seed: int, purpose: str) -> np.random.Generator:
    """A generator fixed by `seed`, the query's id and what it is for."""
    digest = hashlib.sha256(f"{seed}\0{purpose}\0{query.id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))
