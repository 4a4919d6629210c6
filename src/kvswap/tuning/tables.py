"""Tables of one model, from calibration text: what a setting costs in quality, and which groups steps ask for.

*Quality* is KL(full || selected) of the next-token distribution in nats, over sketch, group size and selection, by
text: texts differ up to five times in it, which a mean alone would hide.
*Rankings* are the groups that steps would select, best first; reuse rates and reads for any capacity follow from them
(``traffic.simulate``). *Kept* is the attention mass that a layer keeps with so many groups: how diffuse it is.

A file of safetensors: nothing in it is executed, everything is checked. It belongs to a model and to this version of
kvswap, not to a machine, so it can be computed on a faster one and copied.
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
from kvswap.disk.folders import tables_folder
from kvswap.disk.json_files import build
from kvswap.errors import ConfigError
from kvswap.selection.transform import TransformSketch
from kvswap.tuning.machine import version_of

FORMAT, VERSION = "kvswap-tables", 4
GROUPS = (1, 2, 4, 8, 16)
SELECTED = (200, 400, 800)
COVERED = 0.9
"""Share of texts whose KL is to stay below what is promised."""


@dataclass(frozen=True, slots=True, order=True)
class Sketching:
    """Rank and bits of a sketch."""

    rank: int
    bits: int

    @property
    def token_bytes(self) -> int:
        """Of one token and layer."""
        return TransformSketch.token_bytes(self.rank, self.bits)

    def __str__(self) -> str:
        return f"rank {self.rank} in {self.bits} bit"


def sketchings(key_elements: int) -> list[Sketching]:
    """What is measured and tuned over, for keys of D elements: from D/4 to D/32 times two bytes, the default first."""
    found = []
    for share, bits in ((8, 4), (4, 4), (16, 4), (32, 4), (8, 2), (16, 2), (32, 2)):
        step = 8 // bits  # whole bytes
        each = Sketching(min(key_elements, max(8, key_elements // share * 2 * step // step * step)), bits)
        if each not in found:
            found.append(each)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """KL of one setting: of each text the mean over its steps. ``by_layer``: with a budget for each layer."""

    tokens: int
    rank: int
    bits: int
    group_tokens: int
    select_tokens: int
    by_layer: bool
    kl_by_text: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TablesFacts:
    """Where tables come from and what was measured: ``steps`` after each context of each of ``texts`` stretches."""

    model: str
    fingerprint: str
    kvswap_version: str
    text: str
    texts: int
    steps: int
    contexts: list[int]
    qualities: list[Quality]


@dataclass(frozen=True, slots=True)
class TextKL:
    """KL of a setting, in nats: ``expected`` in the mean over texts, ``promised`` what 9 of 10 texts stay below."""

    expected: float
    promised: float


@dataclass(frozen=True, slots=True)
class Tables:
    """``rankings[tokens, G]`` is int32 ``[texts, steps, L, K]``, ``kept[tokens, G]`` float32 ``[L, K + 1]``."""

    facts: TablesFacts
    rankings: dict[tuple[int, int], NDArray[np.int32]]
    kept: dict[tuple[int, int], NDArray[np.float32]]

    def nearest_context(self, tokens: int) -> int:
        """The measured context nearest to ``tokens`` by ratio."""
        return min(self.facts.contexts, key=lambda each: abs(np.log(each / max(1, tokens))))

    def kl(self, tokens: int, sketch: Sketching, group_tokens: int, select_tokens: int, *, by_layer: bool) -> TextKL:
        """KL of a setting, from the logarithms by text.

        All settings were measured on the same texts, so two settings are compared text by text: ratios are geometric
        means over texts (a two-way model of log KL, text + setting), where a quotient of mean KLs would be that of the
        one or two texts with the largest. The level, which is no ratio, is the mean over texts of the reference
        setting's KL: the defaults.

        A text nobody has seen is expected below the upper end of a one-sided prediction interval: log KL by text is
        about normal, with mean and deviation known from a few texts. Between measured contexts those ends are
        interpolated: texts that were interpolated first would differ less than any that there are.
        """
        places = sorted(self.facts.contexts)
        by_place = [self._by_text(each, sketch, group_tokens, select_tokens, by_layer) for each in places]
        bound = np.interp(math.log(tokens), np.log(places), [prediction_bound(each) for each in by_place])
        mean = float(_between(tokens, places, by_place).mean())
        return TextKL(expected=math.exp(mean + self._above_geometric(tokens)), promised=math.exp(float(bound)))

    def measured(self, sketch: Sketching) -> bool:
        """Whether this sketch is in the tables."""
        return any((each.rank, each.bits) == (sketch.rank, sketch.bits) for each in self.facts.qualities)

    def _default(self) -> Sketching:
        first = self.facts.qualities[0]
        return Sketching(first.rank, first.bits)

    def _near_groups(self, group_tokens: int) -> list[int]:
        """Group sizes at which all sketches were measured, those nearest to this one."""
        both = sorted({each.group_tokens for each in self.facts.qualities if each.by_layer})
        nearest = min(abs(np.log(each / group_tokens)) for each in both)
        return [each for each in both if abs(np.log(each / group_tokens)) <= nearest + 1e-9]

    def _by_text(
        self, tokens: int, sketch: Sketching, group_tokens: int, select_tokens: int, by_layer: bool
    ) -> NDArray[np.float64]:
        """Logarithm of each text's KL ``[texts]``, interpolated in the logarithms of context and selection.

        A sketch other than the default, and budgets by layer, are measured at some settings only: what they change
        there, as a factor, is taken for all.
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
        """Logarithm of the mean over the geometric mean over texts, at the reference setting."""
        places, reference = sorted(self.facts.contexts), Config()
        logs = [
            self._over_selected(each, self._default(), reference.group_tokens, reference.select_tokens, False)
            for each in places
        ]
        above = [math.log(np.exp(each).mean()) - each.mean() for each in logs]
        return float(np.interp(math.log(tokens), np.log(places), above))

    def _over_contexts(
        self, tokens: int, sketch: Sketching, group_tokens: int, select_tokens: int, *, by_layer: bool
    ) -> NDArray[np.float64]:
        """Logarithm of KL ``[texts]``; beyond the measured contexts that of the nearest."""
        places = sorted(self.facts.contexts)
        logs = [self._over_selected(each, sketch, group_tokens, select_tokens, by_layer) for each in places]
        return _between(tokens, places, logs)

    def _over_selected(
        self, context: int, sketch: Sketching, group_tokens: int, select_tokens: int, by_layer: bool
    ) -> NDArray[np.float64]:
        line = sorted(
            (each.select_tokens, each.kl_by_text)
            for each in self.facts.qualities
            if (each.tokens, each.rank, each.bits) == (context, sketch.rank, sketch.bits)
            and (each.group_tokens, each.by_layer) == (group_tokens, by_layer)
        )
        if not line:
            raise ConfigError(f"tables: nothing measured for {sketch} and G = {group_tokens}", hint="compute them anew")
        return _between(select_tokens, [count for count, _ in line], [np.log(np.maximum(kl, 1e-7)) for _, kl in line])

    # ---- files

    def save(self, path: str | Path) -> None:
        """Write or replace the file in one move. Raises ConfigError."""
        target = Path(path).expanduser().absolute()
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
            raise ConfigError(f"{path}: cannot be written: {error}", hint="give a file in a folder of yours") from error


def load_tables(path: str | Path, fingerprint: str, layers: int, *, force: bool = False) -> Tables:
    """Read tables of the model with this fingerprint. Raises ConfigError, for those of another unless ``force``."""
    hint = "compute them anew: run `kvswap tune` without --tables"
    try:
        with safe_open(Path(path).expanduser(), framework="np") as file:
            about = json.loads((file.metadata() or {}).get("kvswap", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
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
            f"tables {path}: made for {' and '.join(differences)}", hint="compute them here, or use them with --force"
        )
    return _checked(facts, tensors, layers, f"tables {path}", hint)


def _checked(facts: TablesFacts, tensors: dict[str, NDArray[Any]], layers: int, where: str, hint: str) -> Tables:
    rankings, kept = {}, {}
    for context in facts.contexts:
        for group_tokens in GROUPS:
            ranking = tensors.get(f"ranking.{context}.{group_tokens}")
            mass = tensors.get(f"kept.{context}.{group_tokens}")
            right = (
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
            if not right or ranking is None or mass is None:
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


def prediction_bound(values: NDArray[np.float64]) -> float:
    """What one more value of a normal distribution stays below with probability 0.9, after ``values`` ``[n]``, n > 1.

    Mean + t * deviation * sqrt(1 + 1/n), with Student's t for n - 1 degrees of freedom by its expansion around the
    normal quantile (Abramowitz and Stegun, 26.7.5): within 0.3 % from two degrees of freedom up, 4 % for one.
    """
    count = len(values)
    z, freedom = NormalDist().inv_cdf(COVERED), count - 1
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return float(values.mean() + t * values.std(ddof=1) * math.sqrt(1 + 1 / count))


def _between(wanted: int, places: list[int], rows: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The row at ``wanted``, interpolated in its logarithm between those at ``places``, the nearest beyond them."""
    place = float(np.interp(math.log(wanted), np.log(places), np.arange(len(places))))
    low = min(int(place), len(places) - 2) if len(places) > 1 else 0
    part = place - low
    return np.asarray(rows[low] if not part else (1 - part) * rows[low] + part * rows[low + 1], dtype=np.float64)


def cached_tables(fingerprint: str) -> Path:
    """Where the tables of a model are kept."""
    return tables_folder() / f"{fingerprint[:24]}.safetensors"
