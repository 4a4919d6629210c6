"""Is it cheaper to read what a session holds, or to compute it again? Pure arithmetic on rates measured in the session.

New tokens attend to everything that is stored, so a prompt that goes on from a session reads its K, V once for each
chunk of new tokens. A fast processor beside a slow disk computes them sooner than it reads them (SparKV, arXiv
2604.21231, which streams or computes KV caches by cost). Nothing is written again either way. Without new tokens there
is nothing to weigh: a decode step reads selected groups alone.
"""

from __future__ import annotations

from dataclasses import dataclass

LEAST_TOKENS = 512
"""What is measured on less says little."""
MARGIN = 1.2
"""How much cheaper computing has to look: reading is what was measured more often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Best rates seen, 0 tokens for none: microseconds for a prompt of ``prefill_tokens`` computed from nothing, and
    that reading ``load_tokens`` stored tokens held up the computation."""

    prefill_tokens: int = 0
    prefill_us: int = 0
    load_tokens: int = 0
    load_us: int = 0

    def better(self, other: Rates) -> Rates:
        """The better of both, each rate apart: one busy moment of the disk must not decide for ever."""
        prefill, load = self, self
        if other.prefill_tokens >= LEAST_TOKENS and not _slower(
            other.prefill_us, other.prefill_tokens, self.prefill_us, self.prefill_tokens
        ):
            prefill = other
        if other.load_tokens >= LEAST_TOKENS and not _slower(
            other.load_us, other.load_tokens, self.load_us, self.load_tokens
        ):
            load = other
        return Rates(
            prefill_tokens=prefill.prefill_tokens,
            prefill_us=prefill.prefill_us,
            load_tokens=load.load_tokens,
            load_us=load.load_us,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Whether to compute what is stored ``again``, and what either way is expected to take; None where unknown."""

    again: bool = False
    load_s: float | None = None
    recompute_s: float | None = None


def choose(rates: Rates | None, held_tokens: int, passes: int) -> Choice:
    """The cheaper way for a prompt whose new tokens need ``passes`` readings of the ``held_tokens`` before them."""
    if rates is None or not held_tokens:
        return Choice()
    load_s = recompute_s = None
    if rates.load_tokens:
        load_s = 1e-6 * rates.load_us / rates.load_tokens * held_tokens * passes
    if rates.prefill_tokens:  # attention grows with the context: at worst in proportion past what was measured
        longer = max(1.0, held_tokens / rates.prefill_tokens)
        recompute_s = 1e-6 * rates.prefill_us / rates.prefill_tokens * held_tokens * longer
    again = load_s is not None and recompute_s is not None and recompute_s * MARGIN < load_s
    return Choice(again=again, load_s=load_s, recompute_s=recompute_s)


def _slower(us: int, tokens: int, other_us: int, other_tokens: int) -> bool:
    return other_tokens > 0 and us * other_tokens > other_us * tokens
