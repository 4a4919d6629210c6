"""Ends an answer at a stop string, wherever tokens begin and end. Pure; one thread.

``StopText`` takes the text of an answer piece by piece. It holds back what may be the beginning of a stop string, and
gives nothing from a stop string on.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Text up to the first of several strings. ``found`` is that string, empty as long as there is none."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.found = ""
        self._strings = [each for each in strings if each]
        self._longest = max(map(len, self._strings), default=0)
        self._held = ""

    def push(self, piece: str) -> str:
        """Take a piece; returns the text that is certain to come before any stop string."""
        if self.found:
            return ""
        text, self._held = self._held + piece, ""
        places = [(place, -len(each), each) for each in self._strings if (place := text.find(each)) >= 0]
        if places:
            place, _, self.found = min(places)
            return text[:place]
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(each.startswith(text[start:]) for each in self._strings):
                self._held = text[start:]
                return text[:start]
        return text

    def end(self) -> str:
        """What was held back, where the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held
