"""What ``kvswap tune`` found: one configuration for each batch and context, with what it promises and why.

``kvswap run --config`` takes the file and picks the solution for its prompt. It belongs to one model.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvswap.config import Config
from kvswap.disk.json_files import build, read_json, save_json
from kvswap.errors import ConfigError

FORMAT, VERSION = "kvswap-tuned", 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What a solution is expected to do, by the cost model and the tables. Times of one step in seconds.

    KL is KL(full || kvswap) of the next-token distribution in nats, in the mean over the steps of a text:
    ``expected_kl`` in the mean over texts, ``promised_kl`` what nine of ten texts are to stay below, since texts differ
    up to five times.
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
    promised_kl: float
    memory_parts: dict[str, int]

    @property
    def step_s(self) -> float:
        """One step."""
        return 1.0 / self.tokens_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The configuration for ``batch`` sequences of up to ``context_tokens``; ``values`` are keys of Config."""

    batch: int
    context_tokens: int
    values: dict[str, Any]
    promise: Promise
    reasons: list[str]

    @property
    def config(self) -> Config:
        """The configuration. Raises ConfigError when a value is not allowed."""
        return Config(**self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedConfig:
    """Solutions for one model. ``fingerprint`` is the model's, ``disk`` says what was tuned for."""

    model: str
    fingerprint: str
    made: str
    disk: str
    prefer: str
    solutions: list[Solution]

    def nearest(self, *, batch: int = 1, context_tokens: int) -> Solution:
        """The solution to use: the nearest that is large enough, or the largest where none is."""
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
        """The configuration to use for ``batch`` sequences of ``context_tokens``."""
        return self.nearest(batch=batch, context_tokens=context_tokens).config

    def check_model(self, fingerprint: str) -> None:
        """Raise ConfigError unless this was tuned for the model of this fingerprint."""
        if fingerprint != self.fingerprint:
            raise ConfigError(f"the configuration was tuned for another model, {self.model}", hint="run `kvswap tune`")

    def save(self, path: str | Path) -> None:
        """Write as JSON. Raises ConfigError."""
        save_json(path, {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)})


def load_tuned(path: str | Path) -> TunedConfig:
    """Read what ``save`` wrote. Raises ConfigError for anything else."""
    values = read_json(path, kind=FORMAT, version=VERSION, command="kvswap tune")
    fields = {key: value for key, value in values.items() if key not in ("format", "version")}
    tuned = build(TunedConfig, fields, str(path), hint="run `kvswap tune` again")
    if not tuned.solutions:
        raise ConfigError(f"{path}: damaged: no solution", hint="run `kvswap tune` again")
    for solution in tuned.solutions:
        _ = solution.config  # raises where a value is not allowed
        if solution.promise.tokens_per_s <= 0:
            raise ConfigError(f"{path}: damaged: tokens_per_s", hint="run `kvswap tune` again")
    return tuned


def is_tuned(path: str | Path) -> bool:
    """Whether a file says that it is one of ``save``; False for anything else, also for what cannot be read."""
    try:
        values = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("format") == FORMAT
