"""``python -m kvswap`` is the ``kvswap`` command."""

from __future__ import annotations

from kvswap.cli.main import main

if __name__ == "__main__":
    main()
