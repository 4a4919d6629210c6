"""Moves a cache's state to and from a session's folder.

``SessionBinding`` opens a session's files for the group store, restores a checkpoint, and commits. Which groups are on
disk, sketched and pinned decides the next selection. So a checkpoint stores all of that as it is, and a commit flushes
nothing. Called by the thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.config import Config
from kvswap.core.batch_state import BatchState, check_finite
from kvswap.core.load_or_recompute import Rates
from kvswap.disk.backend import ReadBackend
from kvswap.errors import ConfigError, DamagedError, SessionError, UnsupportedError
from kvswap.models.adapter import inspect
from kvswap.models.identity import rope_hash, tokenizer_hash, weights_hash
from kvswap.models.loading import LoadedModel
from kvswap.selection.basis import Basis
from kvswap.selection.sketch import LayerSketch
from kvswap.selection.transform_sketch import full_precision_basis
from kvswap.sessions.arrays import Arrays, take
from kvswap.sessions.checkpoint_contents import CheckpointContents
from kvswap.sessions.commits import SessionStore
from kvswap.sessions.index import LayerIndex
from kvswap.sessions.manifest import ITEMSIZES_BYTES, Layout, Manifest, Model
from kvswap.store.persistent import PersistentFiles, PersistentGroupStore
from kvswap.store.segments import Segments
from kvswap.terms import ceil_div

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MODEL_WORDS = {
    "fingerprint": "has other weights",
    "tokenizer": "has another tokenizer",
    "rope": "has other positions (RoPE)",
    "dtype": "computes in another dtype",
}


class SessionBinding:
    """Binds one session to one cache (``core/binding.py``). ``tokens`` are stored when the cache begins.

    ``reserve(bytes, planned=...)`` is called before files take more space, and when a context is planned; it raises
    StorageError to refuse.
    """

    def __init__(
        self, session: SessionStore, model: Model, *, verify: bool = True, reserve: Callable[..., None] | None = None
    ) -> None:
        self.session, self.model = session, model
        self._verify, self._reserve = verify, reserve
        self._check_model()
        self._stored: CheckpointContents | None = session.load()
        self.tokens = self._stored.tokens if self._stored else 0
        self._sliding: list[tuple[int, Any]] = []
        self._data_bytes = 0

    # ---- before a cache is made

    @property
    def layout(self) -> Layout | None:
        """What the session's groups look like; None in an empty one."""
        return self.session.manifest.layout

    @property
    def alignment_bytes(self) -> int:
        """What groups are aligned to on disk; 0 in an empty session."""
        return self.layout.alignment_bytes if self.layout else 0

    def reserve(self, nbytes: int, *, planned: bool = False) -> None:
        """Ask for more disk space; raises StorageError where it is refused."""
        if self._reserve is not None:
            self._reserve(nbytes, planned=planned)

    def config(self, config: Config) -> Config:
        """``config`` with the settings that the session has fixed. Raises ConfigError where another was asked for."""
        layout = self.layout
        if layout is None:
            return config
        fixed: dict[str, Any] = {
            "group_tokens": layout.group_tokens,
            "sink_tokens": layout.sink_tokens,
            "recent_tokens": layout.recent_tokens,
            "sketch_rank": layout.sketch_rank,
        }
        if ITEMSIZES_BYTES.get(config.store_dtype, 0) != ITEMSIZES_BYTES[layout.dtypes[0]]:
            fixed["store_dtype"] = layout.dtypes[0] if layout.dtypes[0] == "float32" else "auto"
        for key, value in fixed.items():
            requested, default = getattr(config, key), getattr(Config(), key)
            if requested not in (value, default):
                raise ConfigError(
                    f"{key}: got {requested!r}, {self.session.label} was made with {value!r}",
                    hint="leave it out, or start another session",
                )
        return config.replace(**fixed)

    def bases(self, device: torch.device) -> list[tuple[Basis, int]] | None:
        """The directions of every layer's sketch and their bits, as stored; None in an empty session."""
        layout = self.layout
        if layout is None:
            return None
        matrices = [torch.from_numpy(matrix.copy()).to(device) for matrix in self.session.basis()]
        split: Callable[[torch.Tensor], Basis] = partial(Basis.split, kind=layout.sketch_kind)
        if any(len(matrix) != layout.basis_rows for matrix in matrices):
            split = full_precision_basis
        return [(split(matrix), layout.sketch_bits) for matrix in matrices]

    def restore_layers(
        self, layers: Sequence[Any], orders: Sequence[int | None], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Give cache layers that stay in memory (those whose order is None) their stored state.

        Raises UnsupportedError where a layer has no K, V to store, and DamagedError.
        """
        self._sliding = sliding_layers(layers, orders)
        if self._stored is None or not self._sliding:
            return
        layout, tail, what = self.layout, self._stored.tail, self.session.label
        assert layout is not None
        lengths = take(tail, "sliding-lengths", np.int64, what, len(self._sliding))
        for (index, layer), length in zip(self._sliding, lengths.tolist(), strict=True):
            kept = min(length, int(layer.sliding_window) - 1)
            found = []
            for part in ("keys", "values"):
                raw = take(tail, f"sliding-{index}-{part}", np.uint8, what)
                values = torch.from_numpy(raw.view(np.uint8).copy()).view(dtype)
                if length != self.tokens or kept <= 0 or values.numel() % kept:
                    raise DamagedError(f"{what} is damaged: state of layer {index}", hint="try: kvswap sessions repair")
                found.append(values.view(1, -1, kept, layout.head_dim).to(device))
            layer.lazy_initialization(*found)
            layer.keys, layer.values = found
            layer.cumulative_length = length

    # ---- while one lives

    def files(self, backend: ReadBackend, layers: int) -> PersistentFiles:
        """The session's files, opened in ``backend``."""
        current = self.session.base
        stored_groups = np.array(current.flushed if current else [0] * layers, np.int64)
        sealer = self.session.sealer
        seals = np.zeros((layers, int(stored_groups.max())), sealer.dtype)
        segments = Segments(layers)
        for number, _ in current.segments if current else ():
            segment = self.session.manifest.segment(number)
            files = self._adopt(backend, segment.names())
            segments.add(np.array(segment.start, np.int64), files, segment.stripe_groups)
        for layer, index in enumerate(self._stored.groups if self._stored else ()):
            seals[layer, : len(index.seals)] = index.seals

        def begin(first: NDArray[np.int64], stripe_groups: int) -> int:
            segment = self.session.begin_segment(tuple(first.tolist()), stripe_groups)
            return int(self._adopt(backend, segment.names())[0])

        return PersistentFiles(
            segments=segments,
            stored_groups=stored_groups,
            seals=seals,
            sealer=sealer,
            appendable=self.session.appendable(),
            verify=self._verify,
            label=self.session.label,
            begin_segment=begin,
            reserve=self.reserve,
        )

    def restore(self, state: BatchState) -> None:
        """Bring back the current checkpoint into a new state."""
        stored, self._stored = self._stored, None
        layout = self.layout
        if stored is None or layout is None:
            return
        state.tokens[0] = stored.tokens
        state.flushed[:, 0] = stored.flushed
        for layer, index in enumerate(stored.groups):
            state.pool.dtypes[layer] = DTYPES[layout.dtypes[layer]]
            _codes(state, layer).restore(0, index.codes, index.scales)
            _pin(state, layer, stored)

    def commit(
        self, state: BatchState, ids: Sequence[int], conversation: bytes = b"", *, interim: bool = False, rates: Rates
    ) -> None:
        """Make the state durable with its token ids and the conversation as JSON.

        There is at most one id more than tokens. The next commit replaces an ``interim`` one. Raises DiskError, and
        DamagedError for keys or values that are not finite.
        """
        store, current = state.store, self.session.base
        assert isinstance(store, PersistentGroupStore)
        if state.batch != 1:
            raise ValueError(f"a session has one sequence, not {state.batch}")
        store.sync()
        tokens, flushed = int(state.tokens[0]), tuple(state.flushed[:, 0].tolist())
        if not tokens <= len(ids) <= tokens + 1:
            raise ValueError(f"{len(ids)} token ids for {tokens} tokens")
        before = current.flushed if current else (0,) * len(flushed)
        group_tokens, groups = state.window.group_tokens, []
        for layer, (start, stop) in enumerate(zip(before, flushed, strict=True)):
            codes, scales = _codes(state, layer).dump(0, start * group_tokens, stop * group_tokens)
            groups.append(LayerIndex(store.seals(layer, start, stop), codes, scales))
        written_bytes = store.backend.counters.write_bytes
        self.session.commit(
            model=self.model,
            layout=_layout(state),
            basis=_basis_arrays(state) if self.session.manifest.basis is None else None,
            tokens=tokens,
            flushed=flushed,
            new_groups=groups,
            tail=_tail(state, self._sliding, ids, conversation),
            data_bytes=written_bytes - self._data_bytes,
            interim=interim,
            rates=rates,
        )
        self._data_bytes = written_bytes

    def _adopt(self, backend: ReadBackend, names: Sequence[str]) -> NDArray[np.int64]:
        opened = [backend.adopt(self.session.open_data(name, direct=backend.direct)) for name in names]
        return np.array(opened, np.int64)

    def _check_model(self) -> None:
        stored = self.session.manifest.model
        if stored is None:
            return
        for key, words in _MODEL_WORDS.items():
            if getattr(stored, key) != getattr(self.model, key):
                detail = f" ({self.model.dtype}, not {stored.dtype})" if key == "dtype" else ""
                raise SessionError(
                    f"{self.session.label} belongs to {stored.name}; the model given {words}{detail}",
                    hint="give the model that it was made with, or start another session",
                )


def identify(loaded: LoadedModel) -> Model:
    """What a session stores of its model, to know it again."""
    parts = inspect(loaded.model)
    return Model(
        name=loaded.name[:1024],
        fingerprint=weights_hash(parts),
        tokenizer=tokenizer_hash(loaded.tokenizer),
        rope=rope_hash(parts),
        dtype=str(parts.dtype).removeprefix("torch."),
    )


def compatible(manifest: Manifest, model: Model, config: Config) -> bool:
    """Whether a session is of that model and has what a new one would get by ``config``."""
    layout = manifest.layout
    if (
        layout is None
        or manifest.model is None
        or any(getattr(manifest.model, key) != getattr(model, key) for key in _MODEL_WORDS)
    ):
        return False
    elements, bits = layout.kv_heads * layout.head_dim, config.sketch_bits
    rank = config.sketch_rank or min(elements, config.sketch_bytes(elements) * 8 // bits)
    size_bytes = ITEMSIZES_BYTES.get(config.store_dtype, 2)
    same_store = ITEMSIZES_BYTES[layout.dtypes[0]] == size_bytes and (
        config.store_dtype == "auto" or set(layout.dtypes) == {config.store_dtype}
    )
    window = (layout.group_tokens, layout.sink_tokens, layout.recent_tokens)
    return (
        same_store
        and window == (config.group_tokens, config.sink_tokens, config.recent_tokens)
        and (layout.sketch_kind, layout.sketch_rank, layout.sketch_bits) == ("transform", rank, bits)
    )


def sliding_layers(layers: Sequence[Any], orders: Sequence[int | None]) -> list[tuple[int, Any]]:
    """Index and cache layer of those that are not offloaded. Raises UnsupportedError where one cannot be kept."""
    found = [(index, layer) for index, (layer, order) in enumerate(zip(layers, orders, strict=True)) if order is None]
    for index, layer in found:
        if not hasattr(layer, "sliding_window"):
            raise UnsupportedError(
                f"a session of a model whose layer {index} has no K, V to keep", hint="run it without --session"
            )
    return found


def _pin(state: BatchState, layer: int, stored: CheckpointContents) -> None:
    """Sinks and recent window from disk, what was on no disk from the tail."""
    window, flushed, dtype = state.window, stored.flushed[layer], state.pool.dtypes[layer]
    ring = window.ring_start((stored.tokens - 1) // window.group_tokens)
    for low, high in ((0, min(window.sink_groups, flushed)), (ring, flushed)):
        state.read_back(layer, 0, low, high)
    waiting = stored.tail[f"waiting-{layer}"]
    if waiting.size:
        shape = (2, state.shape.kv_heads, -1, state.shape.head_dim)
        kv = torch.from_numpy(waiting.view(np.uint8).copy()).view(dtype).view(shape).to(state.shape.device)
        state.pool.put_groups(layer, 0, flushed, kv[0], kv[1])


def _tail(state: BatchState, sliding: Sequence[tuple[int, Any]], ids: Sequence[int], conversation: bytes) -> Arrays:
    tokens, group_tokens = int(state.tokens[0]), state.window.group_tokens
    tail: Arrays = {"ids": np.array(ids, np.int64)}
    for layer in range(state.shape.layers):
        flushed = int(state.flushed[layer, 0])
        waiting = tokens - flushed * group_tokens
        if waiting:
            kv = state.pool.read_pinned(layer, 0, flushed, ceil_div(waiting, group_tokens))[:, :, :waiting]
            check_finite(layer, kv)
            tail[f"waiting-{layer}"] = _raw(kv)
        else:
            tail[f"waiting-{layer}"] = np.empty(0, np.uint8)
    for index, stock in sliding:
        tail[f"sliding-{index}-keys"], tail[f"sliding-{index}-values"] = _raw(stock.keys), _raw(stock.values)
    if sliding:
        tail["sliding-lengths"] = np.array([stock.cumulative_length for _, stock in sliding], np.int64)
    if conversation:
        tail["conversation"] = np.frombuffer(conversation, np.uint8)
    return tail


def _raw(tensor: torch.Tensor) -> NDArray[np.uint8]:
    raw: NDArray[np.uint8] = tensor.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy()
    return raw


def _layout(state: BatchState) -> Layout:
    config, shape, sketch = state.config, state.shape, _codes(state, 0)
    return Layout(
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        group_tokens=config.group_tokens,
        dtypes=tuple(_NAMES[dtype] for dtype in state.pool.dtypes),
        alignment_bytes=state.layout.alignment_bytes,
        sketch_rank=sketch.rank,
        sketch_bits=sketch.bits,
        sketch_kind=sketch.basis.kind,
        sink_tokens=config.sink_tokens,
        recent_tokens=config.recent_tokens,
    )


def _basis_arrays(state: BatchState) -> Arrays:
    bases = (_codes(state, layer).basis for layer in range(state.shape.layers))
    return {str(layer): basis.joined().cpu().numpy() for layer, basis in enumerate(bases)}


def _codes(state: BatchState, layer: int) -> LayerSketch:
    sketch = state.sketches[layer]
    assert isinstance(sketch, LayerSketch)  # attach refuses sessions of other methods
    return sketch
