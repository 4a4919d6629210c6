"""The result of ``kvswap tune`` as a file: configurations for batches and contexts, with predictions and reasons.

``tune.tune`` builds a ``TunedConfig``. ``kvswap run --config`` reads its file and chooses the solution for the prompt.
A file belongs to one model. Values do not change after they are built; any thread may read them.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvswap.config import Config
from kvswap.disk.folders import user_path
from kvswap.disk.json_files import build, read_json, save_json
from kvswap.errors import ConfigError

FORMAT, VERSION = "kvswap-tuned", 2
_FILE_KEYS = {"prediction": "promise", "kl_bound": "promised_kl"}
"""Names here, and their keys in files of version 2 where these differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a solution is predicted to do, by the cost model and the tables. Times are seconds of one step.

    KL is KL(full || kvswap) of the next-token distribution in nats, as the mean over the steps of a text.
    ``expected_kl`` is the predicted mean over texts. ``kl_bound`` is what nine of ten texts are expected to stay below;
    texts differ by up to a factor of five.
    """

    tokens_per_s: float
    compute_s: float
    predict_s: float
    slots_s: float
    submit_s: float
    wait_s: float
    reads: float
    read_bytes: float
    reuse_rate: float
    expected_kl: float
    kl_bound: float
    memory_parts: dict[str, int]

    @property
    def step_s(self) -> float:
        """Seconds of one step."""
        return 1.0 / self.tokens_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The configuration for ``batch`` sequences of up to ``context_tokens`` tokens. ``values`` are keys of Config."""

    batch: int
    context_tokens: int
    values: dict[str, Any]
    prediction: Prediction
    reasons: list[str]

    @property
    def config(self) -> Config:
        """The configuration. Raises ConfigError when a value is not allowed."""
        return Config(**self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedConfig:
    """Solutions for one model.

    ``fingerprint`` is the model's. ``made`` is the time of tuning. ``disk`` describes the disk that was tuned for.
    """

    model: str
    fingerprint: str
    made: str
    disk: str
    prefer: str
    solutions: list[Solution]

    def nearest(self, *, batch: int = 1, context_tokens: int) -> Solution:
        """Choose the smallest solution that is large enough, or the largest one where none is."""
        return min(
            self.solutions,
            key=lambda each: (
                each.batch < batch,
                abs(each.batch - batch),
                each.context_tokens < context_tokens,
                abs(each.context_tokens - context_tokens),
            ),
        )

    def config(self, *, batch: int = 1, context_tokens: int) -> Config:
        """Return the configuration for ``batch`` sequences of ``context_tokens`` tokens."""
        return self.nearest(batch=batch, context_tokens=context_tokens).config

    def check_model(self, fingerprint: str) -> None:
        """Raise ConfigError unless this was tuned for the model of this fingerprint."""
        if fingerprint != self.fingerprint:
            raise ConfigError(
                f"the configuration was tuned for another model, {self.model}",
                hint="run `kvswap tune` for this model",
            )

    def save(self, path: str | Path) -> None:
        """Write this as JSON. Raises ConfigError when the file cannot be written."""
        values = dataclasses.asdict(self)
        values["solutions"] = [_rename(each, _FILE_KEYS) for each in values["solutions"]]
        save_json(path, {"format": FORMAT, "version": VERSION, **values})


def load_tuned(path: str | Path) -> TunedConfig:
    """Read what ``TunedConfig.save`` wrote. Raises ConfigError for anything else."""
    values = read_json(path, kind=FORMAT, version=VERSION, command="kvswap tune")
    fields = {key: value for key, value in values.items() if key not in ("format", "version")}
    names = {key: name for name, key in _FILE_KEYS.items()}
    if isinstance(solutions := fields.get("solutions"), list):
        fields["solutions"] = [_rename(each, names) for each in solutions]
    tuned = build(TunedConfig, fields, str(path), hint="run `kvswap tune` again")
    if not tuned.solutions:
        raise ConfigError(f"{path}: damaged: no solution", hint="run `kvswap tune` again")
    for solution in tuned.solutions:
        _ = solution.config  # raises where a value is not allowed
        if solution.prediction.tokens_per_s <= 0:
            raise ConfigError(f"{path}: damaged: tokens_per_s", hint="run `kvswap tune` again")
    return tuned


def is_tuned(path: str | Path) -> bool:
    """Return whether a file claims to be one that ``kvswap tune`` wrote; False also where it cannot be read."""
    try:
        values = json.loads(user_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get("format") == FORMAT


def _rename(value: Any, names: dict[str, str]) -> Any:
    """Rename the keys of a JSON object and of the objects directly in it."""
    if not isinstance(value, dict):
        return value
    inner = {key: _rename(each, names) if key in names else each for key, each in value.items()}
    return {names.get(key, key): each for key, each in inner.items()}
