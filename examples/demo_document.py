"""Write the document that ``make demo`` asks about: a part of the Python language reference.

    python examples/demo_document.py FILE [TOPIC ...]

Topics come from ``pydoc_data.topics``, which every Python carries. kvswap calibrates on one half of them. This takes
only topics of the other half.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvswap.core.corpus import evaluation_topics

DEFAULT = ("numeric-types", "comparisons", "objects", "calls")


def main() -> None:
    """Command line."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    topics = dict(evaluation_topics())
    names = sys.argv[2:] or DEFAULT
    unknown = [name for name in names if name not in topics]
    if unknown:
        raise SystemExit(f"not an evaluation topic: {', '.join(unknown)}; there are {', '.join(topics)}")
    Path(sys.argv[1]).write_text("\n\n".join(topics[name].strip() for name in names) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
