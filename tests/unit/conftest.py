from __future__ import annotations

from hypothesis import settings

# A first example may wait for an import or for a busy machine; that is no failure.
settings.register_profile("kvswap", deadline=None)
settings.load_profile("kvswap")
