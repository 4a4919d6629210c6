"""How one memory limit is divided, and which limit is refused. Arithmetic from geometry and settings to bytes.

Everything that stays in memory during decode is counted here. The rest of the limit becomes reuse slots. Allocations
are counted by ``memory/ledger.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvswap.errors import MemoryBudgetError
from kvswap.selection.window import Window
from kvswap.store.layout import STREAM_TILE_TOKENS, TILE_BUFFERS
from kvswap.terms import ceil_div, round_up
from kvswap.units import KIB, format_bytes, format_parts, parse_bytes

GROWTH_TOKENS = 256
WRITE_QUEUE_BYTES = 1 << 20
OWNER_BYTES = 8 + 4 + 4  # who lives in a reuse slot, its worth, and when that was true
TALLY_BYTES = 8  # how much attention a group of a sequence got, and how sharply
STAGING_SLACK = 2.0  # room for gaps that are read through
STEP_GROUPS = 16
"""A selection that grows with the context grows by so many groups."""
SKETCH_TILE_TOKENS = 2048
"""Tokens of a prompt that go into the sketch at a time."""
SHORT_TOKENS = 2048
"""``"auto"`` gives every context what keeps so many tokens in memory whole."""
PROMPT_PARTS = ("basis", "sketch", "tables", "tails", "write_queue")
"""Parts that a first prompt fills, beside its share of slots. Staging and scratch are not touched before decode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeeds:
    """Everything that decides how much memory a request takes.

    Parameters
    ----------
    token_bytes, slot_bytes
        K and V of one token in one layer as stored, and one group with its padding.
    sketch_token_bytes, scoring_token_bytes
        The sketch of one token in one layer, scales included, and temporary memory to score it.
    basis_bytes
        The bases of all layers together.
    extra_scratch_bytes
        What the decode path of a method to compare with needs beside kvswap's own.
    seal_group_bytes
        The seal of one group of a session, else 0.
    """

    layers: int
    batch: int
    scoring_token_bytes: int
    window: Window
    slot_bytes: int
    token_bytes: int
    compute_itemsize_bytes: int
    store_itemsize_bytes: int
    sketch_token_bytes: int
    basis_bytes: int
    extra_scratch_bytes: int = 0
    seal_group_bytes: int = 0

    @property
    def sequences(self) -> int:
        """Sequence-layer pairs."""
        return self.layers * self.batch

    def staging_groups(self, select_groups: int) -> int:
        """Groups that can land for one layer, which selects ``select_groups``."""
        return self.batch * max(1, int(select_groups * self.window.selections * STAGING_SLACK))

    def select_groups(self, tokens: int, limit_bytes: int) -> int:
        """Groups to select from a context of ``tokens``: as its length wants, with half of the spare memory at most.

        Like room for tokens, it changes in steps of ``GROWTH_TOKENS``, and depends on nothing but the arguments.
        """
        least, reach = self.window.select_groups, grown(tokens)
        wanted = self.window.wanted_groups(reach)
        if wanted == least:
            return least
        sizes = (self.parts(capacity_for(reach), each) for each in (least, least + STEP_GROUPS))
        smallest, next_bytes = (sum(each.values()) for each in sizes)
        spare_bytes = max(0, limit_bytes - smallest) // 2
        steps = min(wanted - least, spare_bytes // (next_bytes - smallest) * STEP_GROUPS) // STEP_GROUPS
        return least + steps * STEP_GROUPS

    @property
    def write_queue_bytes(self) -> int:
        """The write queue: one group fills while another is written, however large they are."""
        return max(WRITE_QUEUE_BYTES, 2 * self.slot_bytes)

    def parts(self, capacity_tokens: int, select_groups: int = 0) -> dict[str, int]:
        """Bytes of every part but the slots when the context may grow to ``capacity_tokens``.

        Each layer selects ``select_groups``; 0 is the smallest selection.
        """
        window, selected = self.window, select_groups or self.window.select_groups
        groups = ceil_div(capacity_tokens, window.group_tokens)
        attended = self.batch * (window.pinned_groups + selected * window.selections)
        gathered = attended * self.slot_bytes + attended * window.group_tokens * self.token_bytes * (
            self.compute_itemsize_bytes // self.store_itemsize_bytes or 1
        )
        scoring = self.batch * capacity_tokens * self.scoring_token_bytes
        return {
            "basis": self.basis_bytes,
            "sketch": self.sequences * capacity_tokens * self.sketch_token_bytes,
            "tables": groups * (self.sequences * (4 + self.seal_group_bytes) + self.batch * TALLY_BYTES),
            "tails": self.sequences * window.pinned_groups * self.slot_bytes,
            "staging": 2 * self.staging_groups(selected) * self.slot_bytes,
            "scratch": gathered + scoring + self.extra_scratch_bytes,
            "write_queue": self.write_queue_bytes,
        }

    def minimum_parts(self, tokens: int) -> dict[str, int]:
        """What each part needs at the smallest limit under which a context of ``tokens`` works, without any reuse."""
        return self.parts(capacity_for(tokens))

    def minimum_bytes(self, tokens: int) -> int:
        """Smallest limit under which a context of ``tokens`` works, without any reuse."""
        return sum(self.minimum_parts(tokens).values())

    def groups_bytes(self, tokens: int) -> int:
        """Slots for all groups of ``tokens`` tokens a sequence."""
        return self.sequences * ceil_div(tokens, self.window.group_tokens) * self.slot_bytes

    def whole_bytes(self, tokens: int) -> int:
        """Smallest limit under which a context of ``tokens`` is in memory as a whole, so that nothing is read."""
        groups = self.sequences * ceil_div(capacity_for(tokens), self.window.group_tokens)
        return self.minimum_bytes(tokens) + groups * (self.slot_bytes + OWNER_BYTES)

    def longest_capacity(self, limit_bytes: int) -> int:
        """Most tokens that a context under ``limit_bytes`` can grow to without any reuse; 0 when none."""
        low, high = 0, (1 << 32) // GROWTH_TOKENS
        while low < high:
            middle = (low + high + 1) // 2
            fits = sum(self.parts(middle * GROWTH_TOKENS).values()) <= limit_bytes
            low, high = (middle, high) if fits else (low, middle - 1)
        return low * GROWTH_TOKENS

    def longest_tokens(self, limit_bytes: int) -> int:
        """Longest context that works under ``limit_bytes``; 0 when none does."""
        low, high = 0, 1 << 32
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.minimum_bytes(middle) <= limit_bytes else (low, middle - 1)
        return low

    def full_bytes(self, tokens: int) -> int:
        """K and V of all offloaded layers for ``tokens`` tokens a sequence, as stored, without padding."""
        return self.sequences * tokens * self.token_bytes

    def auto_limit_bytes(self, tokens: int) -> int:
        """The limit that ``"auto"`` means: an eighth of the full 16-bit KV, at least the workable minimum.

        And at least what keeps a context of ``SHORT_TOKENS`` in memory as a whole.
        """
        sixteen_bit = self.full_bytes(tokens) * 2 // self.store_itemsize_bytes
        return max(sixteen_bit // 8, self.minimum_bytes(tokens), self.whole_bytes(SHORT_TOKENS))

    def limit_bytes(self, kv_memory: str | int, tokens: int) -> int:
        """The limit that ``kv_memory`` means for ``tokens``. Raises MemoryBudgetError where it is too small."""
        if kv_memory == "auto":
            return self.auto_limit_bytes(grown(tokens))
        limit_bytes = parse_bytes(kv_memory, name="kv_memory")
        if limit_bytes < self.minimum_bytes(tokens):
            raise self.too_little(limit_bytes, tokens)
        return limit_bytes

    def check_answer(self, limit_bytes: int, tokens: int, answer_tokens: int) -> None:
        """Raise MemoryBudgetError where a context of ``tokens`` cannot grow by an answer, not even without reuse."""
        if answer_tokens and self.longest_capacity(limit_bytes) < tokens + answer_tokens:
            raise self.too_little(limit_bytes, tokens, answer_tokens=answer_tokens)

    def too_little(
        self, limit_bytes: int, tokens: int, *, growing: bool = False, answer_tokens: int = 0
    ) -> MemoryBudgetError:
        """The error for a limit under which ``tokens`` do not work, or into which a context cannot go on ``growing``.

        With ``answer_tokens`` the context works, but not with an answer so long. It names the smallest limit that works
        and the longest context that this limit allows.
        """
        parts, longest = self.minimum_parts(tokens), self.longest_tokens(limit_bytes)
        limit = f"kv_memory: {format_bytes(limit_bytes)}"
        if growing or answer_tokens:
            parts, longest = self.parts(grown(tokens + answer_tokens)), self.longest_capacity(limit_bytes)
        smallest = f"{ceil_div(sum(parts.values()), KIB)}KiB ({format_parts(parts)})"  # rounded up, to be typed in
        if answer_tokens:
            message = (
                f"{limit} is too small for {tokens:,} tokens and an answer of up to {answer_tokens:,}; "
                f"it allows {longest:,} together"
            )
            hint = f"set kv_memory to at least {smallest}, leave it at auto, or lower max_new_tokens"
        elif growing:
            message = f"{limit} is used up; it allows {longest:,} tokens, {tokens:,} are needed"
            hint = f"set kv_memory to at least {smallest} or generate fewer tokens"
        else:
            reach = f"it allows at most {longest:,} tokens" if longest else "it is too small for any context"
            message = f"{limit} is too small for {tokens:,} tokens; {reach}"
            hint = f"set kv_memory to at least {smallest} or leave it at auto"
        return MemoryBudgetError(
            message, minimum_bytes=sum(parts.values()), longest_tokens=longest, parts=parts, hint=hint
        )

    def reuse_slots(self, capacity_tokens: int, free_bytes: int) -> int:
        """Reuse slots that ``free_bytes`` pay for, no more than there are groups."""
        groups = self.sequences * ceil_div(capacity_tokens, self.window.group_tokens)
        return max(0, min(groups, free_bytes // (self.slot_bytes + OWNER_BYTES)))


def capacity_for(tokens: int) -> int:
    """Tokens to make room for when the context has ``tokens``: whole growth steps with some headroom."""
    return grown(tokens + GROWTH_TOKENS)


def grown(tokens: int) -> int:
    """``tokens`` in whole growth steps: the least room for so many."""
    return round_up(tokens, GROWTH_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillNeeds:
    """Temporary memory of a prompt: one layer's K, V, hidden states and the activations of one chunk.

    Parameters
    ----------
    chunk_tokens
        The longest chunk.
    eager
        Whether attention weights are computed, in float32.
    tile_bytes
        The size of a tile where the prompt is appended to a context, which is streamed in tiles; else 0.
    ropes
        How many kinds of RoPE the layers have (Gemma 3 has two).
    sliding_tokens
        The windows of all sliding-window layers together.
    """

    batch: int
    tokens: int
    chunk_tokens: int
    hidden_elements: int
    inner_elements: int
    query_heads: int
    query_elements: int
    key_elements: int
    itemsize_bytes: int
    eager: bool = False
    tile_bytes: int = 0
    ropes: int = 1
    sliding_tokens: int = 0

    def transient_bytes(self) -> int:
        """K, V of one layer and of windows; hidden states in, between and out; positions, mask; the widest moment."""
        token_bytes = 2 * self.batch * self.key_elements * self.itemsize_bytes
        keys_values = self.tokens * token_bytes
        hidden = 3 * self.batch * self.tokens * self.hidden_elements * self.itemsize_bytes
        widest = max(self._chunk_bytes(), self._attention_bytes(), self._finish_bytes(keys_values))
        positions = 2 * self.ropes * self.tokens * self._head_dim * self.itemsize_bytes
        return keys_values + self.sliding_tokens * token_bytes + hidden + positions + self._mask_bytes() + widest

    def _chunk_bytes(self) -> int:
        """The widest moment of the linear layers: three of the MLP's inner states, four of the others."""
        wide = max(3 * self.inner_elements, 4 * self.query_elements) + 4 * self.hidden_elements
        return self.batch * self.chunk_tokens * wide * self.itemsize_bytes

    def _attention_bytes(self) -> int:
        """Attention that makes weights, beside queries and output: logits and what they become are there at once."""
        states = self.batch * self.chunk_tokens * 2 * (self.query_elements + self.hidden_elements)
        rows = self.query_heads * self.chunk_tokens
        if self.tile_bytes:  # tile by tile and one sequence at a time, in float32
            tiles = TILE_BUFFERS * self.tile_bytes + 2 * self.tile_bytes  # as they are read, and one as float32
            return states * self.itemsize_bytes + rows * (2 * STREAM_TILE_TOKENS + 3 * self._head_dim) * 4 + tiles
        if self.eager:  # K and V are repeated for all heads of queries
            repeated = 2 * self.batch * self.tokens * self.query_elements
            return (states + repeated) * self.itemsize_bytes + 2 * self.batch * rows * self.tokens * 4
        return states * self.itemsize_bytes

    def _finish_bytes(self, keys_values_bytes: int) -> int:
        """A tile on its way into the sketch, as rows and up to four times projected; tokens that waited before it."""
        tile = min(self.tokens, SKETCH_TILE_TOKENS) * 4 * self.key_elements * 4
        return tile + (keys_values_bytes // self.batch if self.tile_bytes else 0)

    def _mask_bytes(self) -> int:
        """All chunks but the first share one band; a prompt of one chunk needs none."""
        if self.tokens <= self.chunk_tokens:
            return 0
        return self.chunk_tokens * (self.tokens + self.chunk_tokens) * self.itemsize_bytes

    @property
    def _head_dim(self) -> int:
        return self.query_elements // self.query_heads
