"""Is it cheaper to load what a session stores, or to recompute it? Pure arithmetic on rates measured in the session.

New tokens attend to everything that is stored, so a prompt that continues a session reads the stored K, V once for each
chunk of new tokens. A fast processor with a slow disk recomputes them sooner than it reads them (SparKV, arXiv
2604.21231, which streams or computes KV caches by cost). Neither way writes anything again. A decode step reads only
selected groups, so without a prompt there is nothing to choose.
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_TOKENS = 512
"""A rate measured on fewer tokens is ignored."""
MARGIN = 1.2
"""Recomputing is chosen where loading is expected to take this many times as long; loading is measured more often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The best rates measured. 0 tokens means that nothing was measured yet.

    Computing a prompt of ``prefill_tokens`` from nothing took ``prefill_us`` microseconds. Reading ``load_tokens``
    stored tokens delayed the computation by ``load_us`` microseconds.
    """

    prefill_tokens: int = 0
    prefill_us: int = 0
    load_tokens: int = 0
    load_us: int = 0

    def better(self, other: Rates) -> Rates:
        """The better of both for each rate, because one busy moment of the disk must not decide for ever."""
        prefill, load = self, self
        if other.prefill_tokens >= MIN_TOKENS and not _slower(
            other.prefill_us, other.prefill_tokens, self.prefill_us, self.prefill_tokens
        ):
            prefill = other
        if other.load_tokens >= MIN_TOKENS and not _slower(
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
    """Whether to ``recompute`` what is stored instead of loading it, and how long each way is expected to take.

    A time is None where it is not known.
    """

    recompute: bool = False
    load_s: float | None = None
    recompute_s: float | None = None


def load_or_recompute(rates: Rates | None, stored_tokens: int, passes: int) -> Choice:
    """The cheaper way for a prompt whose new tokens read the ``stored_tokens`` before them ``passes`` times."""
    if rates is None or not stored_tokens:
        return Choice()
    load_s = recompute_s = None
    if rates.load_tokens:
        load_s = 1e-6 * rates.load_us / rates.load_tokens * stored_tokens * passes
    if rates.prefill_tokens:  # attention grows with the context: assume in proportion, beyond what was measured
        longer = max(1.0, stored_tokens / rates.prefill_tokens)
        recompute_s = 1e-6 * rates.prefill_us / rates.prefill_tokens * stored_tokens * longer
    recompute = load_s is not None and recompute_s is not None and recompute_s * MARGIN < load_s
    return Choice(recompute=recompute, load_s=load_s, recompute_s=recompute_s)


def _slower(us: int, tokens: int, other_us: int, other_tokens: int) -> bool:
    return other_tokens > 0 and us * other_tokens > other_us * tokens
