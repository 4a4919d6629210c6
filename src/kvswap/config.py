"""The frozen configuration of a cache. ``None`` and ``"auto"`` mean: chosen for this model and machine."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvswap.errors import ConfigError
from kvswap.terms import ceil_div
from kvswap.units import parse_bytes

STORE_DTYPES = ("auto", "float16", "bfloat16", "float32")
COMPILED_STEPS = ("auto", "off")
AUTO_LEAST_TOKENS = 400
AUTO_MOST_TOKENS = 4096
AUTO_SHARE = 6
"""``select_tokens="auto"`` is one token in so many of the context, from the least to the most above."""
BACKENDS = ("auto", "uring", "threads", "buffered", "memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fields:
    kv_memory: int | str = "auto"
    kv_dir: str | None = None
    select_tokens: int | str = "auto"
    layer_select_tokens: tuple[int, ...] | None = None
    group_tokens: int = 4
    sketch_token_bytes: int | None = None
    sketch_rank: int | None = None
    sketch_bits: int = 4
    sink_tokens: int = 4
    recent_tokens: int = 64
    store_dtype: str = "auto"
    backend: str = "auto"
    compiled_step: str = "auto"
    chunk_tokens: int = 512
    read_depth: int = 1024
    read_gap_bytes: int = 16 << 10


class Config(_Fields):
    """Settings of a KV cache on disk. They cannot be changed afterwards, and unknown names are refused.

    Parameters
    ----------
    kv_memory
        Limit for everything that lives while an answer is written, in bytes or as text (``"24MiB"``). ``"auto"`` is an
        eighth of the full 16-bit KV cache of the request, or the smallest limit that works. It is at least what keeps
        2,048 tokens in memory whole, so that for contexts up to this length nothing is read from disk.
    kv_dir
        Folder for KV files and sessions, on a disk. ``None`` is the folder of the environment or the user's cache.
    select_tokens
        M: tokens attended to at each step and layer. Sinks and recent window count, the rolling tail does not.
        ``"auto"`` grows with the context: a sixth of it on a fast disk, a twelfth or a 24th on slower ones. It is at
        least 400 and at most 4,096. It takes at most half of the spare memory; reuse gets the rest.
    layer_select_tokens
        M of each layer on disk, in order, as ``kvswap tune`` finds them. ``None`` is ``select_tokens`` in every layer.
    group_tokens
        G: consecutive tokens that are read together.
    sketch_token_bytes
        Bytes for the sketch of one token in one layer, whatever the method. ``None`` is ``D/8 * 2``.
    sketch_rank, sketch_bits
        R numbers of so many bits are kept of each token's key. Rank ``None`` is as many as fit ``sketch_token_bytes``.
    sink_tokens, recent_tokens
        First and newest tokens that are always attended to.
    store_dtype
        How K and V are stored. ``"auto"`` is the model's dtype if it has 16 bits, else float16, or bfloat16 where a
        value would overflow.
    backend
        How files are read: ``uring``, ``threads``, ``buffered``, or ``memory`` for tests. ``"auto"`` is the best that
        this disk and system allow.
    compiled_step
        How one token goes through a layer: ``"auto"`` in a few compiled calls, where the layer was proved to give the
        same so, ``"off"`` by the modules of the model.
    chunk_tokens
        Tokens that prefill takes through a layer at a time, a multiple of 512.
    read_depth
        Most reads in flight at a time. Further reads begin when earlier ones have ended.
    read_gap_bytes
        Longest gap between two requested groups that is read as well, so that two reads become one.

    Raises
    ------
    ConfigError
        For an unknown name, or a value that is not allowed.
    """

    __slots__ = ()

    def __init__(self, **values: Any) -> None:
        names = [field.name for field in dataclasses.fields(_Fields)]
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
                raise ConfigError(f"unknown config key {name!r}", hint=hint)
        if isinstance(values.get("layer_select_tokens"), list):  # as JSON has it
            values["layer_select_tokens"] = tuple(values["layer_select_tokens"])
        super().__init__(**values)
        self._check()

    def __repr__(self) -> str:
        values = ", ".join(f"{key}={value!r}" for key, value in self.to_dict().items())
        return f"Config({values})"

    def _check(self) -> None:
        _integer("group_tokens", self.group_tokens, low=1, high=64)
        _integer("sink_tokens", self.sink_tokens, low=0)
        _integer("recent_tokens", self.recent_tokens, low=0)
        _integer("read_depth", self.read_depth, low=1, high=1024)
        _integer("read_gap_bytes", self.read_gap_bytes, low=0, high=16 << 20)
        _integer("chunk_tokens", self.chunk_tokens, low=512)
        if self.chunk_tokens % 512:
            raise ConfigError(f"chunk_tokens: {self.chunk_tokens} is not a multiple of 512", hint="use 512 or 1024")
        if self.sketch_token_bytes is not None:
            _integer("sketch_token_bytes", self.sketch_token_bytes, low=1)
        if self.sketch_rank is not None:
            _integer("sketch_rank", self.sketch_rank, low=1)
        if self.kv_dir is not None and not isinstance(self.kv_dir, str):
            raise ConfigError(f"kv_dir: got {self.kv_dir!r}", hint="write the path of a folder as text")
        _choice("sketch_bits", self.sketch_bits, (2, 4, 8))
        _choice("store_dtype", self.store_dtype, STORE_DTYPES)
        _choice("backend", self.backend, BACKENDS)
        _choice("compiled_step", self.compiled_step, COMPILED_STEPS)
        if self.kv_memory != "auto":
            parse_bytes(self.kv_memory, name="kv_memory")
        self._check_selection()

    def _check_selection(self) -> None:
        if self.select_tokens != "auto":
            _integer("select_tokens", self.select_tokens, low=1)
        least = self.pinned_tokens + self.group_tokens
        if isinstance(self.select_tokens, int) and self.select_tokens < least:
            raise ConfigError(
                f"select_tokens: {self.select_tokens} leaves no group to select beside {self.pinned_tokens} "
                "sink and recent tokens",
                hint=f"use at least {least}",
            )
        if self.layer_select_tokens is not None:
            if not isinstance(self.layer_select_tokens, tuple) or not self.layer_select_tokens:
                raise ConfigError(
                    f"layer_select_tokens: got {self.layer_select_tokens!r}", hint="give a list of integers or null"
                )
            for count in self.layer_select_tokens:
                _integer("layer_select_tokens", count, low=least)

    def sketch_bytes(self, elements: int) -> int:
        """Bytes for the sketch of a token whose key has ``elements`` elements (D)."""
        return self.sketch_token_bytes or elements // 8 * 2

    @property
    def sink_groups(self) -> int:
        """Groups that hold the sinks."""
        return ceil_div(self.sink_tokens, self.group_tokens)

    @property
    def recent_groups(self) -> int:
        """Whole groups of the recent window, the rolling tail apart; at least one, which is on its way to disk."""
        return max(1, ceil_div(self.recent_tokens, self.group_tokens))

    @property
    def pinned_tokens(self) -> int:
        """Tokens in whole groups that are always attended to."""
        return (self.sink_groups + self.recent_groups) * self.group_tokens

    @property
    def grows(self) -> bool:
        """Whether M grows with the context."""
        return self.select_tokens == "auto" and self.layer_select_tokens is None

    @property
    def least_select_tokens(self) -> int:
        """M, or the least that it can be where it grows with the context."""
        if isinstance(self.select_tokens, int):
            return self.select_tokens
        return max(AUTO_LEAST_TOKENS, self.pinned_tokens + self.group_tokens)

    def selected_tokens(self, context_tokens: int) -> int:
        """M in a context of so many tokens, on a fast disk and with enough memory."""
        if not self.grows:
            return self.least_select_tokens
        return max(self.least_select_tokens, min(AUTO_MOST_TOKENS, context_tokens // AUTO_SHARE))

    @property
    def select_groups(self) -> int:
        """Groups chosen by prediction at each step, in the layer that chooses most; the least where they grow."""
        return (max(self.layer_select_tokens or (self.least_select_tokens,)) - self.pinned_tokens) // self.group_tokens

    def layer_select_groups(self, layers: int) -> list[int]:
        """Groups chosen by prediction at each step, for each of ``layers`` offloaded layers. Raises ConfigError."""
        counts = self.layer_select_tokens or (self.least_select_tokens,) * layers
        if len(counts) != layers:
            raise ConfigError(
                f"layer_select_tokens: {len(counts)} values for {layers} offloaded layers",
                hint="tune for this model, or leave it out",
            )
        return [(count - self.pinned_tokens) // self.group_tokens for count in counts]

    def to_dict(self) -> dict[str, Any]:
        """All keys and values, enough to build the same Config again."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(_Fields)}

    def replace(self, **changes: Any) -> Config:
        """A copy with some values changed."""
        return Config(**{**self.to_dict(), **changes})

    @classmethod
    def from_file(cls, path: str | Path) -> Config:
        """Read a JSON object of config keys, as ``to_dict`` gives them. Raises ConfigError."""
        try:
            values = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no such user after ~, or nested too deeply
            raise ConfigError(f"config file {path}: {error}", hint="it must be a JSON object of config keys") from error
        if not isinstance(values, dict):
            raise ConfigError(f"config file {path}: not a JSON object", hint='write for example {"select_tokens": 400}')
        return cls(**values)


def _integer(name: str, value: object, *, low: int, high: int | None = None) -> None:
    allowed = f"an integer from {low}" + (f" to {high}" if high is not None else " up")
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ConfigError(f"{name}: got {value!r}, must be {allowed}", hint="change the value or leave it out")


def _choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        raise ConfigError(f"{name}: got {value!r}", hint=f"use one of {', '.join(map(str, allowed))}")
