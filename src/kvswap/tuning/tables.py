"""Tables of one model, measured on calibration text: the quality of each setting, and the groups that steps select.

Tables hold three things:

* *qualities*: KL(full || selected) of the next-token distribution in nats, for sketch sizes, group sizes and
  selections. There is one value for each text, because texts differ by up to a factor of five.
* *rankings*: for each step and layer the groups by score, best first. ``traffic.simulate`` derives reuse rates and
  reads from them for any number of reuse slots.
* *kept*: the attention mass that each layer keeps with its best 0, 1, 2, ... groups.

``measure_tables`` produces them and ``search`` uses them. They are stored as a safetensors file; everything in it is
checked when it is read. The file belongs to a model and a version of kvswap, not to a machine, so it can be computed on
a faster machine and copied. Tables do not change after they are built; any thread may read them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kvswap.config import Config
from kvswap.disk.atomic import atomic_file
from kvswap.disk.folders import tables_folder, user_path
from kvswap.disk.json_files import build
from kvswap.errors import ConfigError
from kvswap.selection.transform_sketch import TransformSketch
from kvswap.tuning.machine import version_of

FORMAT, VERSION = "kvswap-tables", 5
GROUPS = (1, 2, 4, 8, 16)
SELECTED = (200, 400, 800, 1600)
COVERED = 0.9
"""Share of unseen texts that are expected to stay below ``PredictedKL.bound``."""
LEAST_SHARE, MOST_SHARE = 0.4, 2.0
"""Least and most groups of a layer, as shares of the mean over layers. The most decides the size of staging memory."""


@dataclass(frozen=True, slots=True, order=True)
class SketchSize:
    """Rank and bits of a sketch: how many numbers it keeps of each key, and the bits of each number."""

    rank: int
    bits: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return TransformSketch.token_bytes(self.rank, self.bits)

    def __str__(self) -> str:
        return f"rank {self.rank} in {self.bits} bit"


def sketch_sizes(key_elements: int) -> list[SketchSize]:
    """Return the sketch sizes that are measured and tuned over, for keys of ``key_elements`` elements (D).

    They take from D/4 x 2 down to D/32 x 2 bytes per token and layer. The default comes first.
    """
    found = []
    for share, bits in ((8, 4), (4, 4), (16, 4), (32, 4), (8, 2), (16, 2), (32, 2)):
        step = 8 // bits  # whole bytes
        each = SketchSize(min(key_elements, max(8, key_elements // share * 2 * step // step * step)), bits)
        if each not in found:
            found.append(each)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Measured KL of one setting at a context of ``tokens``.

    ``kl_by_text`` holds the mean over steps of each text. ``by_layer``: layers select different numbers of groups.
    """

    tokens: int
    rank: int
    bits: int
    group_tokens: int
    select_tokens: int
    by_layer: bool
    kl_by_text: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TablesFacts:
    """Origin of tables, and the measured qualities.

    ``steps`` decode steps were measured after each of ``contexts``, in each of ``texts`` texts. ``text`` describes the
    text.
    """

    model: str
    fingerprint: str
    kvswap_version: str
    text: str
    texts: int
    steps: int
    contexts: list[int]
    qualities: list[Quality]


@dataclass(frozen=True, slots=True)
class PredictedKL:
    """Predicted KL of a setting in nats: ``expected`` is the mean over texts; 9 of 10 texts stay below ``bound``."""

    expected: float
    bound: float


@dataclass(frozen=True, slots=True)
class Tables:
    """Tables of one model.

    Parameters
    ----------
    rankings
        By context in tokens and group size: int32 ``[texts, steps, L, K]``, groups by score, best first.
    kept
        By context in tokens and group size: float32 ``[L, K + 1]``, the mass kept with the best k groups.
    """

    facts: TablesFacts
    rankings: dict[tuple[int, int], NDArray[np.int32]]
    kept: dict[tuple[int, int], NDArray[np.float32]]

    def nearest_context(self, tokens: int) -> int:
        """Return the measured context whose ratio to ``tokens`` is nearest to 1."""
        return min(self.facts.contexts, key=lambda each: abs(np.log(each / max(1, tokens))))

    def kl(
        self, tokens: int, sketch: SketchSize, group_tokens: int, select_tokens: int, *, by_layer: bool
    ) -> PredictedKL:
        """Predict the KL of a setting at a context of ``tokens``.

        All settings were measured on the same texts, so settings are compared text by text: log KL is modelled as the
        sum of a text's and a setting's contribution, and ratios are geometric means over texts. A ratio of mean KLs
        would follow the one or two texts with the largest KL. The absolute level is the arithmetic mean over texts of
        the default setting's KL.

        ``bound`` is the upper end of a one-sided prediction interval for an unseen text. Log KL of texts is about
        normal, and its mean and deviation are estimated from the measured texts. Between measured contexts the bounds
        are interpolated, not the texts: interpolated texts would differ less than measured ones.
        """
        places = sorted(self.facts.contexts)
        by_place = [self._by_text(each, sketch, group_tokens, select_tokens, by_layer) for each in places]
        bound = np.interp(math.log(tokens), np.log(places), [prediction_bound(each) for each in by_place])
        mean = float(_between(tokens, places, by_place).mean())
        return PredictedKL(expected=math.exp(mean + self._above_geometric(tokens)), bound=math.exp(float(bound)))

    def measured(self, sketch: SketchSize) -> bool:
        """Return whether the tables have this sketch size."""
        return any((each.rank, each.bits) == (sketch.rank, sketch.bits) for each in self.facts.qualities)

    def _default(self) -> SketchSize:
        first = self.facts.qualities[0]
        return SketchSize(first.rank, first.bits)

    def _near_groups(self, group_tokens: int) -> list[int]:
        """Of the group sizes at which every sketch was measured, the one or two nearest to ``group_tokens``."""
        both = sorted({each.group_tokens for each in self.facts.qualities if each.by_layer})
        nearest = min(abs(np.log(each / group_tokens)) for each in both)
        return [each for each in both if abs(np.log(each / group_tokens)) <= nearest + 1e-9]

    def _by_text(
        self, tokens: int, sketch: SketchSize, group_tokens: int, select_tokens: int, by_layer: bool
    ) -> NDArray[np.float64]:
        """Logarithm of each text's KL, float64 ``[texts]``, interpolated in the logarithms of context and selection.

        Sketches other than the default, and selections that differ by layer, were measured at some settings only. The
        factor by which they change KL there is applied to all settings.
        """
        default = self._default()
        found = self._over_contexts(tokens, default, group_tokens, select_tokens, by_layer=False)
        factors = [
            self._over_contexts(tokens, sketch, near, 400, by_layer=by_layer)
            - self._over_contexts(tokens, default, near, 400, by_layer=False)
            for near in self._near_groups(group_tokens)
        ]
        return np.asarray(found + np.mean(factors, axis=0), dtype=np.float64)

    def _above_geometric(self, tokens: int) -> float:
        """Logarithm of arithmetic over geometric mean of the texts' KL, at the default setting."""
        places, reference = sorted(self.facts.contexts), Config()
        logs = [
            self._over_selected(each, self._default(), reference.group_tokens, reference.least_select_tokens, False)
            for each in places
        ]
        above = [math.log(np.exp(each).mean()) - each.mean() for each in logs]
        return float(np.interp(math.log(tokens), np.log(places), above))

    def _over_contexts(
        self, tokens: int, sketch: SketchSize, group_tokens: int, select_tokens: int, *, by_layer: bool
    ) -> NDArray[np.float64]:
        """Logarithm of KL, float64 ``[texts]``; beyond the measured contexts that of the nearest one."""
        places = sorted(self.facts.contexts)
        logs = [self._over_selected(each, sketch, group_tokens, select_tokens, by_layer) for each in places]
        return _between(tokens, places, logs)

    def _over_selected(
        self, context: int, sketch: SketchSize, group_tokens: int, select_tokens: int, by_layer: bool
    ) -> NDArray[np.float64]:
        measured = sorted(
            (each.select_tokens, each.kl_by_text)
            for each in self.facts.qualities
            if (each.tokens, each.rank, each.bits) == (context, sketch.rank, sketch.bits)
            and (each.group_tokens, each.by_layer) == (group_tokens, by_layer)
        )
        if not measured:
            raise ConfigError(
                f"tables: nothing was measured for {sketch} and G = {group_tokens}",
                hint="compute them again: run `kvswap tune` without --tables",
            )
        logs = [np.log(np.maximum(kl, 1e-7)) for _, kl in measured]
        return _between(select_tokens, [count for count, _ in measured], logs)

    # ---- files

    def save(self, path: str | Path) -> None:
        """Write the file, or replace it atomically. Raises ConfigError when that fails."""
        target = user_path(path).absolute()
        about = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self.facts)}
        tensors: dict[str, NDArray[Any]] = {}
        for (tokens, group_tokens), ranking in self.rankings.items():
            tensors[f"ranking.{tokens}.{group_tokens}"] = ranking
            tensors[f"kept.{tokens}.{group_tokens}"] = self.kept[tokens, group_tokens]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(target) as file:
                save_file(tensors, file.name, metadata={"kvswap": json.dumps(about)})
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error}", hint="give a file in a writable folder") from error


def load_tables(path: str | Path, fingerprint: str, layers: int, *, force: bool = False) -> Tables:
    """Read the tables of the model with this fingerprint and this number of offloaded layers.

    Raises ConfigError for a damaged file and, unless ``force``, for tables of another model or version of kvswap.
    """
    hint = "compute them again: run `kvswap tune` without --tables"
    try:
        with safe_open(user_path(path), framework="np") as file:
            about = json.loads((file.metadata() or {}).get("kvswap", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else f"damaged: {error}"
        raise ConfigError(f"tables {path}: {reason}", hint=hint) from error
    if not isinstance(about, dict) or about.pop("format", None) != FORMAT:
        raise ConfigError(f"tables {path}: not a {FORMAT} file", hint=hint)
    if (version := about.pop("version", None)) != VERSION:
        raise ConfigError(f"tables {path}: version {version!r}, this kvswap reads {VERSION}", hint=hint)
    facts = build(TablesFacts, about, f"tables {path}", hint=hint)
    differences = []
    if facts.fingerprint != fingerprint:
        differences.append(f"model {facts.model}")
    if facts.kvswap_version != version_of("kvswap"):
        differences.append(f"kvswap {facts.kvswap_version}")
    if differences and not force:
        raise ConfigError(
            f"tables {path}: computed for {' and '.join(differences)}",
            hint="compute them here, or use them anyway with --force",
        )
    return _checked(facts, tensors, layers, f"tables {path}", hint)


def cached_tables(fingerprint: str) -> Path:
    """Path of the cached tables of a model."""
    return tables_folder() / f"{fingerprint[:24]}.safetensors"


def groups_by_layer(kept: NDArray[np.float32], mean_groups: int) -> list[int]:
    """Distribute selected groups over layers so that they keep the most attention mass in total.

    Some layers spread their attention widely and need more groups (BaKlaVa, arXiv 2502.13176). The mean over layers is
    at most ``mean_groups``, and each layer gets from LEAST_SHARE to MOST_SHARE of it.

    Parameters
    ----------
    kept
        float32 ``[L, K + 1]``: the mass that a layer keeps with its best k groups; K is at least ``mean_groups``.
    """
    layers, most = len(kept), min(kept.shape[1] - 1, max(1, int(mean_groups * MOST_SHARE)))
    least = min(most, max(1, int(mean_groups * LEAST_SHARE)))
    gains = np.diff(kept.astype(np.float64), axis=1)[:, least:most]
    # Gains should fall with rank. Where they do not in the sample, each is raised to the largest gain after it.
    falling = np.maximum.accumulate(gains[:, ::-1], axis=1)[:, ::-1]
    spare = max(0, min(layers * (mean_groups - least), falling.size))
    order = np.argsort(-falling, axis=None, kind="stable")[:spare]
    extra = np.bincount(order // max(1, falling.shape[1]), minlength=layers) if spare else np.zeros(layers, int)
    return [int(least + count) for count in extra]


def prediction_bound(values: NDArray[np.float64]) -> float:
    """Upper bound for one more value of a normal distribution, with probability 0.9, after ``values`` ``[n]``, n > 1.

    The bound is mean + t * deviation * sqrt(1 + 1/n). Student's t for n - 1 degrees of freedom comes from its expansion
    around the normal quantile (Abramowitz and Stegun, 26.7.5). Its error is below 0.3 % from two degrees of freedom up,
    and 4 % for one.
    """
    count = len(values)
    z, freedom = NormalDist().inv_cdf(COVERED), count - 1
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return float(values.mean() + t * values.std(ddof=1) * math.sqrt(1 + 1 / count))


def _checked(facts: TablesFacts, tensors: dict[str, NDArray[Any]], layers: int, where: str, hint: str) -> Tables:
    """Build tables from a file's content. Raises ConfigError where shapes, types or values are wrong."""
    rankings, kept = {}, {}
    for context in facts.contexts:
        for group_tokens in GROUPS:
            ranking = tensors.get(f"ranking.{context}.{group_tokens}")
            mass = tensors.get(f"kept.{context}.{group_tokens}")
            valid = (
                ranking is not None
                and mass is not None
                and ranking.dtype == np.int32
                and mass.dtype == np.float32
                and ranking.ndim == 4
                and ranking.shape[:2] == (facts.texts, facts.steps)
                and ranking.size > 0
                and mass.shape == (ranking.shape[2], ranking.shape[3] + 1)
                and bool((ranking >= 0).all() and (ranking < context).all() and np.isfinite(mass).all())
            )
            if not valid or ranking is None or mass is None:
                raise ConfigError(f"{where}: damaged: ranking of {context} tokens, G = {group_tokens}", hint=hint)
            if ranking.shape[2] != layers:
                raise ConfigError(f"{where}: {ranking.shape[2]} layers, the model has {layers}", hint=hint)
            rankings[context, group_tokens], kept[context, group_tokens] = ranking, mass
    if not facts.contexts or not facts.qualities:
        raise ConfigError(f"{where}: damaged: nothing was measured", hint=hint)
    for each in facts.qualities:
        if len(each.kl_by_text) != facts.texts or facts.texts < 2 or not np.isfinite(each.kl_by_text).all():
            raise ConfigError(f"{where}: damaged: KL of {len(each.kl_by_text)} texts", hint=hint)
    return Tables(facts, rankings, kept)


def _between(at: int, places: list[int], rows: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Interpolate ``rows`` at ``at`` in the logarithm of ``places``; beyond them the nearest row."""
    place = float(np.interp(math.log(at), np.log(places), np.arange(len(places))))
    low = min(int(place), len(places) - 2) if len(places) > 1 else 0
    part = place - low
    return np.asarray(rows[low] if not part else (1 - part) * rows[low] + part * rows[low + 1], dtype=np.float64)
