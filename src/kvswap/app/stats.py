"""Statistics of one answer, as ``Engine.stats`` and ``kvswap run --stats-json`` return them. Values only.

The field names are the keys of the JSON, so they stay as they are.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvswap.app.sources import Source
from kvswap.disk.folders import kv_folder

if TYPE_CHECKING:
    from kvswap.config import Config
    from kvswap.core.cache_stats import CacheStats
    from kvswap.models.loading import LoadedModel
    from kvswap.models.streaming import Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityStats:
    """Means over the checked steps: steps that were computed again with exact attention.

    Parameters
    ----------
    checks
        Number of checked steps.
    mass_kept
        Share of the attention mass that fell on attended tokens, as the mean over heads and layers.
    mass_kept_least
        The same in the worst checked step.
    kl
        KL(exact || selected) of the next-token distribution, in nats.
    same
        Share of checked steps where both have the same most likely token.
    check_s
        Seconds that all checks took.
    """

    checks: int
    mass_kept: float
    mass_kept_least: float
    kl: float
    same: float
    check_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStats:
    """Statistics of one answer. Sizes describe the whole stored context; times and counts describe this answer alone.

    Rates and latencies exclude the first token.

    Parameters
    ----------
    stored_tokens
        Prompt tokens that were in the cache before and were not computed again.
    resumed_tokens, computed_tokens
        In a named session: prompt tokens that came from the session, and those that were computed now.
    computed_again
        Whether the session's tokens were recomputed, because that was expected to be faster than loading them.
    load_expected_s, recompute_expected_s
        The two times that were compared for it. None: not measured yet.
    session_written_bytes, sessions_written_bytes
        Bytes written to disk since creation: for this session, and for all sessions of the folder.
    ttft_s
        Seconds to the first token after the model was loaded, without idle time and calibration.
    kv_full_bytes
        K and V of the offloaded layers for all tokens, at the stored dtype.
    kv_memory_limit_bytes, kv_memory_peak_bytes, memory_parts
        The memory limit (None: no limit), the peak of the memory that it covers, and the parts of that memory.
    sliding_kv_bytes
        KV cache of sliding-window layers; it is in memory outside the limit.
    weights_mapped_bytes, weights_anonymous_bytes
        Weights in pages of their file, which the system drops when it has to, and those in memory of the process.
    disk_read_bytes
        Bytes of submitted reads, including padding and gaps.
    select_tokens
        M: tokens that each step attended to in a layer, at the end of the answer.
    mass_kept
        Estimated share of the attention to stored tokens that fell on attended ones, by the sketch, as the mean over
        layers and steps that left tokens out; 1 where none did, None where the method does not estimate it.
        ``quality`` has the true one.
    sources
        The passages of the documents that the answer's tokens attended to most; see ``app/sources.py``.
    reuse_rate
        Share of the selected groups that were in memory already, without pinned groups.
    io_wait_s
        Seconds spent waiting for reads.
    """

    model: str
    method: str
    config: dict[str, Any]
    prompt_tokens: int = 0
    stored_tokens: int = 0
    session: str | None = None
    resumed_tokens: int = 0
    computed_tokens: int = 0
    computed_again: bool = False
    load_expected_s: float | None = None
    recompute_expected_s: float | None = None
    session_written_bytes: int = 0
    sessions_written_bytes: int = 0
    new_tokens: int = 0
    finish_reason: str = ""
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    prefill_s: float = 0.0
    calibration_s: float = 0.0
    ttft_s: float = 0.0
    decode_tokens_per_s: float | None = None
    itl_ms: dict[str, float] | None = None
    kv_full_bytes: int = 0
    kv_memory_limit_bytes: int | None = None
    kv_memory_peak_bytes: int = 0
    memory_parts: dict[str, int] = field(default_factory=dict)
    sliding_kv_bytes: int = 0
    prefill_peak_bytes: int = 0
    process_peak_rss_bytes: int = 0
    weights_mapped_bytes: int = 0
    weights_anonymous_bytes: int = 0
    disk_write_bytes: int = 0
    disk_read_bytes: int = 0
    disk_reads: int = 0
    select_tokens: int = 0
    mass_kept: float | None = None
    sources: list[Source] = field(default_factory=list)
    reuse_rate: float = 0.0
    io_wait_s: float = 0.0
    quality: QualityStats | None = None
    backend: str = "none"
    direct_io: bool = False
    notices: list[str] = field(default_factory=list)
    kvswap_version: str = ""
    torch_version: str = ""
    transformers_version: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        return dataclasses.asdict(self)


def blank_stats(loaded: LoadedModel, method: str, config: dict[str, Any]) -> RunStats:
    """What is known before anything has run: model, method, configuration and versions."""
    from kvswap.weights.placement import weight_bytes

    mapped_bytes, anonymous_bytes = weight_bytes(loaded.model)
    return RunStats(
        model=loaded.name,
        method=method,
        config=config,
        weights_mapped_bytes=mapped_bytes,
        weights_anonymous_bytes=anonymous_bytes,
        kvswap_version=importlib.metadata.version("kvswap"),
        torch_version=importlib.metadata.version("torch"),
        transformers_version=importlib.metadata.version("transformers"),
    )


def answer_numbers(
    generation: Generation, *, prompt_tokens: int, stored_tokens: int, started_s: float
) -> dict[str, Any]:
    """Numbers of one answer to a prompt of which ``stored_tokens`` were stored, by name."""
    times_s = generation.times_s
    return {
        "prompt_tokens": prompt_tokens,
        "stored_tokens": stored_tokens,
        "computed_tokens": prompt_tokens - stored_tokens,
        "new_tokens": len(generation.token_ids),
        "finish_reason": generation.finish_reason,
        "token_ids": generation.token_ids,
        "text": generation.text,
        "ttft_s": times_s[0] - started_s if times_s else 0.0,
        "decode_tokens_per_s": tokens_per_s(times_s),
        "itl_ms": latency_percentiles_ms(times_s),
    }


def resolved_config(config: Config, model: Any, cache: CacheStats | None) -> dict[str, Any]:
    """The configuration, with ``auto`` and None replaced by what they stand for here; ``cache`` once there is one."""
    values = config.to_dict()
    values["kv_dir"] = values["kv_dir"] or str(kv_folder(None))
    values |= {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
    if cache is not None:
        values |= {"sketch": cache.sketch, "resolved_backend": cache.backend}
    return values


def latency_percentiles_ms(times_s: list[float]) -> dict[str, float] | None:
    """Return p50, p90 and p99 of the differences between successive ``times_s``, in milliseconds; None without any."""
    return percentiles([1e3 * (after - before) for before, after in itertools.pairwise(times_s)])


def percentiles(values: list[float]) -> dict[str, float] | None:
    """Return p50, p90 and p99, interpolated; None without values."""
    if not values:
        return None
    return {f"p{share}": float(np.percentile(values, share)) for share in (50, 90, 99)}


def tokens_per_s(times_s: list[float]) -> float | None:
    """Return the rate of tokens after the first one; None for fewer than two tokens."""
    if len(times_s) < 2 or times_s[-1] <= times_s[0]:
        return None
    return (len(times_s) - 1) / (times_s[-1] - times_s[0])
