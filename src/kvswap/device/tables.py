"""Tables of one model, from calibration text: what a setting costs in quality, and which groups steps ask for.

*Quality* is KL(full || selected) of the next-token distribution in nats, over sketch, group size and selection.
*Rankings* are the groups that steps would select, best first; reuse rates and reads for any capacity follow from them
(``traffic.simulate``). *Kept* is the attention mass that a layer keeps with so many groups: how diffuse it is.

A file of safetensors: nothing in it is executed, everything is checked. It belongs to a model and to this version of
kvswap, not to a machine, so it can be computed on a faster one and copied.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kvswap.device.machine import version_of
from kvswap.disk import default_kv_dir
from kvswap.errors import ConfigError
from kvswap.jsonfile import build
from kvswap.sketch.transform import TransformSketch

FORMAT, VERSION = "kvswap-tables", 2
GROUPS = (1, 2, 4, 8, 16)
SELECTED = (200, 400, 800)


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
    """KL of one setting: mean and standard error over steps. ``by_layer``: with a budget for each layer."""

    tokens: int
    rank: int
    bits: int
    group_tokens: int
    select_tokens: int
    by_layer: bool
    kl: float
    kl_error: float


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
class Tables:
    """``rankings[tokens, G]`` is int32 ``[texts, steps, L, K]``, ``kept[tokens, G]`` float32 ``[L, K + 1]``."""

    facts: TablesFacts
    rankings: dict[tuple[int, int], NDArray[np.int32]]
    kept: dict[tuple[int, int], NDArray[np.float32]]

    def nearest_context(self, tokens: int) -> int:
        """The measured context nearest to ``tokens`` by ratio."""
        return min(self.facts.contexts, key=lambda each: abs(np.log(each / max(1, tokens))))

    def kl(self, tokens: int, sketch: Sketching, group_tokens: int, select_tokens: int, *, by_layer: bool) -> float:
        """KL expected of a setting, interpolated in the logarithms of context and selection.

        A sketch other than the default, and budgets by layer, are measured at some settings only: what they change
        there, as a factor, is taken for all.
        """
        default = self._default()
        base = self._over_contexts(tokens, default, group_tokens, select_tokens, by_layer=False)
        factor = 0.0
        for near in self._near_groups(group_tokens):
            plain = self._over_contexts(tokens, default, near, 400, by_layer=False)
            factor += self._over_contexts(tokens, sketch, near, 400, by_layer=by_layer) - plain
        return float(np.exp(base + factor / len(self._near_groups(group_tokens))))

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

    def _over_contexts(
        self, tokens: int, sketch: Sketching, group_tokens: int, select_tokens: int, *, by_layer: bool
    ) -> float:
        """Logarithm of KL; beyond the measured contexts that of the nearest."""
        places = sorted(self.facts.contexts)
        logs = [self._over_selected(each, sketch, group_tokens, select_tokens, by_layer) for each in places]
        return float(np.interp(np.log(tokens), np.log(places), logs))

    def _over_selected(
        self, context: int, sketch: Sketching, group_tokens: int, select_tokens: int, by_layer: bool
    ) -> float:
        line = sorted(
            (each.select_tokens, max(each.kl, 1e-7))
            for each in self.facts.qualities
            if (each.tokens, each.rank, each.bits) == (context, sketch.rank, sketch.bits)
            and (each.group_tokens, each.by_layer) == (group_tokens, by_layer)
        )
        if not line:
            raise ConfigError(f"tables: nothing measured for {sketch} and G = {group_tokens}", hint="compute them anew")
        logs = [float(np.log(kl)) for _, kl in line]
        return float(np.interp(np.log(select_tokens), [float(np.log(count)) for count, _ in line], logs))

    # ---- files

    def save(self, path: str | Path) -> None:
        """Write or replace the file in one move. Raises ConfigError."""
        target = Path(path).expanduser().absolute()
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        about = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self.facts)}
        tensors: dict[str, NDArray[Any]] = {}
        for (tokens, group_tokens), ranking in self.rankings.items():
            tensors[f"ranking.{tokens}.{group_tokens}"] = ranking
            tensors[f"kept.{tokens}.{group_tokens}"] = self.kept[tokens, group_tokens]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata={"kvswap": json.dumps(about)})
            partial.replace(target)
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
    facts = build(TablesFacts, about, f"tables {path}")
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
    return Tables(facts, rankings, kept)


def cached_tables(fingerprint: str) -> Path:
    """Where the tables of a model are kept."""
    return default_kv_dir().parent / "tables" / f"{fingerprint[:24]}.safetensors"
