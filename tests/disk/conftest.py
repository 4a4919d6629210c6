"""Memory to read to, in which no byte looks like data."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvswap.disk import Slab
from tests.helpers.backends import POISON, UNIT


@pytest.fixture
def slab() -> Iterator[Slab]:
    made = Slab(64 * UNIT)
    made.array[:] = POISON
    yield made
    made.close()
