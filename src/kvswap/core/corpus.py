"""Text that comes with every Python, for calibration and evaluation: the language reference, ``pydoc_data.topics``.

Topics whose name has an even SHA-256 are for calibration, the others for evaluation. Evaluation leaves out topics with
more than 5 % of their lines in the calibration half, so that nothing is evaluated that was calibrated on.
"""

from __future__ import annotations

import hashlib
from pydoc_data.topics import topics

LARGEST_OVERLAP = 0.05


def calibration_topics() -> list[tuple[str, str]]:
    """Names and texts of the calibration half, by name."""
    return [(name, text) for name, text in sorted(topics.items()) if _even(name)]


def evaluation_topics() -> list[tuple[str, str]]:
    """Names and texts of the evaluation half, by name, less what overlaps calibration."""
    seen = {line for _, text in calibration_topics() for line in lines(text)}
    others = [(name, text) for name, text in sorted(topics.items()) if not _even(name)]
    return [(name, text) for name, text in others if overlap(text, seen) <= LARGEST_OVERLAP]


def lines(text: str) -> list[str]:
    """Stripped lines that are not blank."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def overlap(text: str, seen: set[str]) -> float:
    """Share of the lines of ``text`` that are in ``seen``."""
    own = lines(text)
    return sum(line in seen for line in own) / max(1, len(own))


def _even(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 2 == 0
