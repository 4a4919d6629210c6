"""The glossary as code: one word and one letter for each thing, the same everywhere in this project.

========  ==================================================================================
letter    meaning
========  ==================================================================================
``B``     batch: sequences that are decoded together
``T``     tokens of one sequence
``L``     decoder layers
``H_q``   query heads; ``H_kv`` key/value heads
``d``     head_dim, elements of one head
``D``     ``H_kv * d``, elements of one token's key over all KV heads
``E``     hidden size
``G``     tokens per group
``N``     groups
``R``     rank of the sketch
``M``     selected tokens, sinks and recent window included, rolling tail not
========  ==================================================================================

*group*: G consecutive tokens of one layer, K and V of all heads.  *extent*: a byte range on disk.
*slot*: memory that holds one group.  *sketch*: the compressed keys.  *session*: one stored context.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT16_MAX = 65504.0
"""The largest float16; what is larger is stored as this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGeometry:
    """Shape of the keys and values of one offloaded layer; the same for all layers of a cache.

    ``itemsize_bytes`` is the size of one stored element.
    """

    kv_heads: int
    head_dim: int
    group_tokens: int
    itemsize_bytes: int

    @property
    def key_elements(self) -> int:
        """D: elements of one token's key over all KV heads."""
        return self.kv_heads * self.head_dim

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token of one layer."""
        return 2 * self.key_elements * self.itemsize_bytes

    @property
    def group_bytes(self) -> int:
        """Bytes of one group without padding."""
        return self.group_tokens * self.token_bytes


def ceil_div(value: int, step: int) -> int:
    """Smallest n with ``n * step >= value``."""
    return -(-value // step)


def round_up(value: int, step: int) -> int:
    """Smallest multiple of ``step`` that is at least ``value``."""
    return ceil_div(value, step) * step
