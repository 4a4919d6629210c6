"""Measure the tables of a model (``tables.Tables``) on calibration text.

For every text and context, the prompt is computed once. Some decode steps then run with exact attention, and the same
steps run again under every setting; ``replay`` holds the cache that allows this. ``kvswap tune`` calls
``measure_tables``. One thread, which must be the one that runs the model.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.config import Config
from kvswap.core.calibration import CALIBRATION_TOKENS, calibrate
from kvswap.core.corpus import calibration_topics
from kvswap.core.model_patch import Attachment
from kvswap.errors import InputError
from kvswap.models.adapter import ModelParts, cache_keyword, context_limit
from kvswap.models.identity import attention_fingerprint
from kvswap.models.loading import LoadedModel
from kvswap.selection.basis import KeyCovariance
from kvswap.selection.kvswap import score
from kvswap.selection.sketch import LayerSketch
from kvswap.selection.transform_sketch import TransformSketch, transform_basis
from kvswap.selection.window import Window
from kvswap.tuning.machine import version_of
from kvswap.tuning.measure_disk import Progress
from kvswap.tuning.replay import Recording, ReplayCache, Selection
from kvswap.tuning.tables import (
    GROUPS,
    SELECTED,
    Quality,
    SketchSize,
    Tables,
    TablesFacts,
    groups_by_layer,
    sketch_sizes,
)

CONTEXTS = (2048, 7168)
TEXTS, STEPS = 6, 16
"""Number of texts, and of steps after each context of each text. KL differs between texts by up to a factor of five."""
COMMON_GROUPS = (2, 8)
"""Group sizes at which every sketch is measured. The default sketch is measured at all group sizes."""
_CHUNK_TOKENS = 512

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting to measure. ``by_layer``: layers select different numbers of groups."""

    sketch: SketchSize
    group_tokens: int
    select_tokens: int
    by_layer: bool = False

    @property
    def config(self) -> Config:
        """Configuration with this group size and selection."""
        return Config(group_tokens=self.group_tokens, select_tokens=self.select_tokens)


def settings_to_measure(key_elements: int) -> list[Setting]:
    """Return the settings that are measured at each context, ordered by sketch with the default sketch first."""
    default, *others = sketch_sizes(key_elements)
    found = [Setting(default, group, select) for group in GROUPS for select in SELECTED]
    found += [Setting(default, group, 400, True) for group in COMMON_GROUPS]
    for sketch in others:
        found += [Setting(sketch, group, 400, by) for by in (False, True) for group in COMMON_GROUPS]
    return found


def measure_tables(
    loaded: LoadedModel,
    *,
    contexts: tuple[int, ...] = CONTEXTS,
    texts: int = TEXTS,
    steps: int = STEPS,
    on_progress: Progress | None = None,
) -> Tables:
    """Measure tables on ``texts`` texts, at least 2, with ``steps`` decode steps after each context.

    ``on_progress`` is called with stages ``"calibrate"`` and ``"tables"``. Raises ModelError, and InputError when the
    calibration text is too short.
    """
    attachment = Attachment(loaded.model)
    try:
        return _Measurement(attachment, loaded, contexts, texts, steps, on_progress).run()
    finally:
        attachment.restore()


def stretches(ids: list[int], count: int, *, prompt_tokens: int, steps: int) -> list[list[int]]:
    """Cut ``count`` texts of ``prompt_tokens + steps`` tokens from ``ids``, evenly spread.

    The first CALIBRATION_TOKENS tokens are left out: the sketch's basis was learned from them, so results on them would
    be too good. Where there is little text, prompts overlap, but the steps after them do not. Raises InputError when
    there is too little text even for that.
    """
    each = prompt_tokens + steps
    stride = min(each, (len(ids) - CALIBRATION_TOKENS - each) // (count - 1))
    if stride < steps:
        needed = CALIBRATION_TOKENS + each + (count - 1) * steps
        raise InputError(f"the calibration text has {len(ids):,} tokens, {needed:,} are needed")
    return [ids[start : start + each] for start in range(CALIBRATION_TOKENS, len(ids), stride)[:count]]


class _Measurement:
    """State of one call of ``measure_tables``."""

    def __init__(
        self,
        attachment: Attachment,
        loaded: LoadedModel,
        contexts: tuple[int, ...],
        texts: int,
        steps: int,
        on_progress: Progress | None,
    ) -> None:
        self.parts, self.loaded, self.steps = attachment.parts, loaded, steps
        self.implementation = attachment.implementation
        self._on_progress = on_progress or (lambda stage, done, total: None)
        longest = context_limit(self.parts.model) or max(contexts) + steps
        self.contexts = sorted({min(each, (longest - steps) // 16 * 16) for each in contexts})
        text = "\n\n".join(text for _, text in calibration_topics())
        ids: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        self.texts = stretches(ids, texts, prompt_tokens=self.contexts[-1], steps=steps)
        self.settings = settings_to_measure(self.parts.kv_heads * self.parts.head_dim)
        logger.debug("tables: %d settings at %s tokens of %d texts", len(self.settings), self.contexts, texts)

    def run(self) -> Tables:
        """Measure all texts. The contexts of a text go from short to long; each extends the prompt of the last."""
        statistics = self._calibrate()
        tick = self._ticks()
        kl: dict[tuple[int, Setting], list[float]] = {}
        rankings: dict[tuple[int, int], list[NDArray[np.int32]]] = {}
        kept: dict[tuple[int, int], list[NDArray[np.float32]]] = {}
        for ids in self.texts:
            cache = ReplayCache(
                self.parts, self.implementation, capacity_tokens=self.contexts[-1], chunk_tokens=_CHUNK_TOKENS
            )
            for context in self.contexts:
                self._feed(cache, [ids[cache.padded_tokens : context]])
                tick()
                forced = ids[context : context + self.steps]
                cache.recording = recording = Recording()
                (exact,) = self._rows(cache, [None], forced)
                cache.recording = None
                sketches = {each: self._sketches(cache, statistics, each) for each in self._sketch_sizes()}
                mass = {}
                for group in GROUPS:
                    ranking, mass[group] = _rank(cache, self.parts, recording, sketches[self.settings[0].sketch], group)
                    rankings.setdefault((context, group), []).append(ranking)
                    kept.setdefault((context, group), []).append(mass[group])
                tick()
                rows = [_selection(each, sketches[each.sketch], mass[each.group_tokens]) for each in self.settings]
                for setting, found in zip(self.settings, self._rows(cache, rows, forced, tick), strict=True):
                    kl.setdefault((context, setting), []).append(_kl(exact, found))
        facts = TablesFacts(
            model=self.loaded.short_name,
            fingerprint=attention_fingerprint(self.parts),
            kvswap_version=version_of("kvswap"),
            text="calibration half of the Python language reference, after the tokens that the basis is from",
            texts=len(self.texts),
            steps=self.steps,
            contexts=list(self.contexts),
            qualities=[_quality(context, setting, found) for (context, setting), found in kl.items()],
        )
        return Tables(
            facts,
            {key: np.stack(found) for key, found in rankings.items()},
            {key: np.mean(found, axis=0, dtype=np.float32) for key, found in kept.items()},
        )

    def _ticks(self) -> Callable[[], None]:
        total, counter = len(self.texts) * len(self.contexts) * (2 + self.steps), itertools.count(1)
        return lambda: self._on_progress("tables", next(counter), total)

    def _sketch_sizes(self) -> list[SketchSize]:
        return list(dict.fromkeys(setting.sketch for setting in self.settings))

    def _calibrate(self) -> list[KeyCovariance]:
        return calibrate(
            self.parts,
            self.implementation,
            self.loaded.tokenizer,
            run=lambda ids, cache: self._call(ids, cache),
            chunk_tokens=_CHUNK_TOKENS,
            on_progress=self._on_progress,
        )

    def _sketches(self, cache: ReplayCache, statistics: list[KeyCovariance], sketch: SketchSize) -> list[LayerSketch]:
        found: list[LayerSketch] = []
        for order, covariance in enumerate(statistics):
            each = TransformSketch(
                batch=1,
                kv_heads=self.parts.kv_heads,
                head_dim=self.parts.head_dim,
                basis=transform_basis(covariance, sketch.rank, sketch.bits),
                bits=sketch.bits,
                capacity_tokens=cache.padded_tokens,
                device=self.parts.device,
            )
            each.append(0, cache.kv[order, 0, 0, :, : cache.padded_tokens])
            found.append(each)
        return found

    def _rows(
        self,
        cache: ReplayCache,
        selections: Sequence[Selection | None],
        forced: list[int],
        tick: Callable[[], None] = lambda: None,
    ) -> list[torch.Tensor]:
        """For each selection the log-probabilities after each forced token, float32 ``[steps, V]``."""
        found = []
        with cache.replay(selections, len(forced)):
            for token in forced:
                found.append(self._feed(cache, [[token]] * len(selections)))
                tick()
        return list(torch.stack(found, dim=1))

    def _feed(self, cache: ReplayCache, ids: list[list[int]]) -> torch.Tensor:
        """Log-probabilities after the last token of each row, float32 ``[rows, V]``."""
        output = self._call(torch.tensor(ids, device=self.parts.device), cache, logits_to_keep=1)
        rows: torch.Tensor = output.logits[:, -1].float().cpu().log_softmax(-1)
        return rows

    @torch.no_grad()
    def _call(self, ids: torch.Tensor, cache: Any, **options: Any) -> Any:
        model = self.parts.model
        caller: Callable[..., Any] = model if options else self.parts.decoder
        return caller(input_ids=ids, use_cache=True, **{cache_keyword(model): cache}, **options)


def _selection(setting: Setting, sketches: list[LayerSketch], kept: NDArray[np.float32]) -> Selection:
    config = setting.config
    window = Window(config.group_tokens, config.sink_groups, config.recent_groups, config.select_groups)
    uniform = [window.select_groups] * len(sketches)
    return Selection(window, groups_by_layer(kept, window.select_groups) if setting.by_layer else uniform, sketches)


def _quality(context: int, setting: Setting, kl_by_text: list[float]) -> Quality:
    return Quality(
        tokens=context,
        rank=setting.sketch.rank,
        bits=setting.sketch.bits,
        group_tokens=setting.group_tokens,
        select_tokens=setting.select_tokens,
        by_layer=setting.by_layer,
        kl_by_text=kl_by_text,
    )


def _kl(exact: torch.Tensor, other: torch.Tensor) -> float:
    """KL(exact || other) in nats as the mean over steps; both are log-probabilities ``[steps, V]``."""
    return float((exact.exp() * (exact - other)).sum(-1).double().mean())


@torch.no_grad()
def _rank(
    cache: ReplayCache, parts: ModelParts, recording: Recording, sketches: list[LayerSketch], group_tokens: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Groups by score, int32 ``[steps, L, K]``, and the mass kept with the best k of them, float32 ``[L, K + 1]``."""
    config = Config(group_tokens=group_tokens, select_tokens=max(SELECTED))
    context = cache.padded_tokens
    first, stop = config.sink_groups, context // group_tokens - config.recent_groups
    width = min(stop - first, 2 * config.select_groups)
    steps, layers = len(recording.true), len(sketches)
    ranking = np.zeros((steps, layers, width), np.int32)
    kept = np.zeros((layers, width + 1))
    for step, layer in _pairs(steps, layers):
        query = recording.predicted[step][layer][None]
        scores = score(sketches[layer], query, parts.scaling, group_tokens)[0, first:stop]
        best = scores.argsort(descending=True)[:width]
        ranking[step, layer] = (best + first).cpu().numpy()
        mass = _mass(recording.true[step][layer], cache.kv[layer, 0, 0, :, :context], parts.scaling)
        by_group = mass[: context // group_tokens * group_tokens].unflatten(0, (-1, group_tokens)).sum(1)
        pinned = float(by_group[:first].sum() + by_group[stop:].sum())
        kept[layer, 0] += pinned
        kept[layer, 1:] += pinned + by_group[first:stop][best].cumsum(0).cpu().numpy()
    return ranking, (kept / steps).astype(np.float32)


def _pairs(steps: int, layers: int) -> Iterator[tuple[int, int]]:
    return itertools.product(range(steps), range(layers))


def _mass(query: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention mass of each token ``[T]``, as the mean over heads, of query ``[H_q, d]`` and keys ``[H_kv, T, d]``."""
    by_head = query.view(keys.shape[0], -1, keys.shape[2]) @ keys.float().transpose(1, 2) * scaling
    return by_head.softmax(-1).flatten(0, 1).mean(0)
