"""Text in, text out: a model, its cache and one conversation.

``load`` gives an ``Engine``; ``ask`` streams an answer and remembers the turn, so that the next ``ask`` computes only
what is new. One answer at a time; an engine belongs to one thread (generation runs in a second one, joined before
``ask`` ends). Nothing is durable: closing the engine drops the cache and gives the model back as it was.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvswap.attachment import attach
from kvswap.baselines import registry
from kvswap.cache import KVSwapCache
from kvswap.config import Config
from kvswap.disk.files import default_kv_dir
from kvswap.documents import Document, read_document
from kvswap.errors import InputError
from kvswap.layer_major import FullCache, Progress
from kvswap.models.loading import LoadedModel, load_model
from kvswap.models.sampling import Sampling
from kvswap.models.streaming import Generation, end_tokens
from kvswap.prompt import Request, Turn, encode, make_request, render
from kvswap.stats import RunStats, latency_percentiles_ms, tokens_per_s
from kvswap.trace import CacheStats


def load(
    model: str | LoadedModel,
    config: Config | None = None,
    *,
    method: str = "kvswap",
    dtype: str = "auto",
    mmap: bool = True,
    on_progress: Progress | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> Engine:
    """Load a model and put its cache on disk.

    Parameters
    ----------
    model
        Local directory, ``.gguf`` file, hub id or ``smollm2-135m``; or what ``load_model`` gave.
    method
        A name in ``kvswap.baselines.registry``, for comparison; ``"full"`` keeps the cache in memory.
    dtype, mmap
        As for ``load_model``.
    on_progress
        Called with ``("calibrate" | "prefill", done, total)``.
    on_notice
        Called with a sentence where something falls back; by default it is logged as a warning.

    Raises
    ------
    ModelError, ConfigError, StorageError
    """
    registry.check_name(method)
    notice = on_notice or logging.getLogger("kvswap").warning
    loaded = load_model(model, dtype=dtype, mmap=mmap, on_notice=notice) if isinstance(model, str) else model
    return Engine(loaded, config or Config(), method=method, on_progress=on_progress, on_notice=notice)


class Engine:
    """One conversation with one model. Close it, or use it in a ``with`` block."""

    def __init__(
        self,
        loaded: LoadedModel,
        config: Config,
        *,
        method: str = "kvswap",
        on_progress: Progress | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> None:
        self.config, self.method = config, method
        self._loaded, self._on_progress, self._on_notice = loaded, on_progress, on_notice
        self._notices: list[str] = []
        self._stack = ExitStack()
        self._cache: KVSwapCache | FullCache | None = None
        self._generation: Generation | None = None
        self._setup_s = self._calibration_s = 0.0
        self._closed = False
        self._turns: list[Turn] = []
        self._seen_text, self._seen_ids = "", list[int]()
        self._stats = self._blank()
        self._open()

    def ask(
        self,
        question: str,
        documents: Sequence[str | Path | Document] = (),
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Stream the answer to a question about documents and about what was said before.

        Parameters
        ----------
        documents
            Paths, or ``Document`` objects; they come before the question and stay in the conversation.
        temperature, top_p, seed
            Temperature 0 takes the likeliest token each time.

        Raises
        ------
        InputError, ConfigError, MemoryBudgetError, StorageError
            At the first step of the iterator, before anything is computed.
        DiskError
            When the disk fails. The conversation is then as it was before the question.
        """
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        return self._ask(question, documents, sampling)

    @property
    def stats(self) -> RunStats:
        """The numbers of the last answer."""
        return self._stats

    def close(self) -> None:
        """Drop the cache and give the model back as it was. The engine is of no use afterwards."""
        if self._generation is not None:
            raise InputError("an answer is still being read", hint="read it to its end or close its iterator first")
        self._closed = True
        self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- one question

    def _ask(self, question: str, documents: Sequence[str | Path | Document], sampling: Sampling) -> Iterator[str]:
        if self._closed:
            raise InputError("the engine is closed", hint="load the model again")
        if self._generation is not None:
            raise InputError("an answer is still being read", hint="read it to its end or close its iterator first")
        started_s = time.perf_counter()
        texts = [item if isinstance(item, Document) else read_document(item) for item in documents]
        request = make_request(question, texts)
        text, ids = self._prompt(request)
        sampling = self._fit(len(ids), sampling)
        cache = self._cache or self._open()
        started_s -= self._setup_s - self._calibration_s
        before, stored = cache.stats, cache.get_seq_length()
        generation = Generation(self._loaded.model, self._loaded.tokenizer, ids, cache, sampling)
        self._generation = generation
        try:
            yield from generation
        finally:
            self._generation = None
            if generation.error is not None:
                self._drop()  # a forward broke off: layers hold different numbers of tokens
            else:
                self._remember(request, text, ids, generation.token_ids)
                self._stats = self._measure(generation, sampling, ids, stored, started_s, before, cache.stats)
                self._setup_s = self._calibration_s = 0.0

    def _prompt(self, request: Request) -> tuple[str, list[int]]:
        """The whole context as text and as token ids, which begin with what is stored."""
        tokenizer = self._loaded.tokenizer
        text = render(tokenizer, self._turns, request)
        if self._seen_ids and self._cache is not None and text.startswith(self._seen_text):
            return text, self._seen_ids + encode(tokenizer, text[len(self._seen_text) :], first=False)
        if self._cache is not None and self._cache.get_seq_length():
            self._notice("the chat template words the conversation anew, so all of it is computed again")
            self._drop()
        return text, encode(tokenizer, text, first=True)

    def _fit(self, tokens: int, sampling: Sampling) -> Sampling:
        """Keep the answer within the model's context; raises InputError when the prompt is past it."""
        limit = getattr(self._loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(limit, int):
            return sampling
        if tokens > limit:
            raise InputError(
                f"the context has {tokens:,} tokens, {tokens - limit:,} more than the model's limit of {limit:,}",
                hint="give fewer or shorter documents, or a model with a longer context",
            )
        room = limit - tokens + 1  # the last token is never computed with
        if room < sampling.max_new_tokens:
            self._notice(f"the model's limit of {limit:,} tokens leaves room for an answer of {room:,} tokens")
        return replace(sampling, max_new_tokens=min(room, sampling.max_new_tokens))

    def _remember(self, request: Request, text: str, ids: list[int], answer_ids: list[int]) -> None:
        decode = self._loaded.tokenizer.decode
        whole = {"clean_up_tokenization_spaces": False}
        self._turns.append(Turn(request, decode(answer_ids, skip_special_tokens=True, **whole)))
        self._seen_ids = ids + answer_ids
        self._seen_text = text + decode(answer_ids, skip_special_tokens=False, **whole)

    # ---- the cache

    def _open(self) -> KVSwapCache | FullCache:
        started_s = time.perf_counter()
        loaded = self._loaded
        self._cache = self._stack.enter_context(
            attach(
                loaded.model,
                self.config,
                tokenizer=loaded.tokenizer,
                method=self.method,
                on_progress=self._report,
                on_notice=self._notice,
            )
        )
        self._setup_s = time.perf_counter() - started_s
        self._calibration_s = self._cache.trace.calibration_s
        return self._cache

    def _drop(self) -> None:
        self._cache, self._seen_text, self._seen_ids = None, "", []
        self._stack.close()

    def _report(self, stage: str, done: int, total: int) -> None:
        if self._generation is not None:
            self._generation.checkpoint()
        if self._on_progress is not None:
            self._on_progress(stage, done, total)

    def _notice(self, text: str) -> None:
        if text not in self._notices:
            self._notices.append(text)
        if self._on_notice is not None:
            self._on_notice(text)

    # ---- numbers

    def _blank(self) -> RunStats:
        return RunStats(
            model=self._loaded.name,
            method=self.method,
            config=self._resolved(None),
            kvswap_version=importlib.metadata.version("kvswap"),
            torch_version=importlib.metadata.version("torch"),
            transformers_version=importlib.metadata.version("transformers"),
        )

    def _resolved(self, stats: CacheStats | None) -> dict[str, Any]:
        """The configuration with what ``auto`` and None became."""
        model, values = self._loaded.model, self.config.to_dict()
        values["kv_dir"] = values["kv_dir"] or str(default_kv_dir())
        values |= {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
        if stats is not None:
            values |= {"sketch": stats.sketch, "resolved_backend": stats.backend}
        return values

    def _measure(
        self,
        generation: Generation,
        sampling: Sampling,
        ids: list[int],
        stored: int,
        started_s: float,
        before: CacheStats,
        after: CacheStats,
    ) -> RunStats:
        loaded, times_s, token_ids = self._loaded, generation.times_s, generation.token_ids
        full = self.method in registry.MEMORY
        selected = after.selected_groups - before.selected_groups
        reused = after.reuse_rate * after.selected_groups - before.reuse_rate * before.selected_groups
        return replace(
            self._blank(),
            config=self._resolved(after),
            prompt_tokens=len(ids),
            stored_tokens=stored,
            new_tokens=len(token_ids),
            finish_reason=self._finish_reason(token_ids, sampling),
            token_ids=token_ids,
            text=loaded.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            prefill_s=after.prefill_s - before.prefill_s,
            calibration_s=self._calibration_s,
            ttft_s=times_s[0] - started_s if times_s else 0.0,
            decode_tokens_per_s=tokens_per_s(times_s),
            itl_ms=latency_percentiles_ms(times_s),
            kv_full_bytes=after.kv_full_bytes,
            kv_memory_limit_bytes=None if full else after.kv_memory_limit_bytes,
            kv_memory_peak_bytes=after.kv_memory_peak_bytes,
            memory_parts=after.memory_parts,
            sliding_kv_bytes=after.sliding_kv_bytes,
            prefill_peak_bytes=after.prefill_peak_bytes,
            process_peak_rss_bytes=_peak_rss_bytes(),
            disk_write_bytes=after.disk_write_bytes - before.disk_write_bytes,
            disk_read_bytes=after.disk_read_bytes - before.disk_read_bytes,
            disk_reads=after.disk_reads - before.disk_reads,
            reuse_rate=reused / selected if selected else 0.0,
            io_wait_s=after.io_wait_s - before.io_wait_s,
            backend=after.backend,
            direct_io=after.direct_io,
            notices=list(self._notices),
        )

    def _finish_reason(self, token_ids: list[int], sampling: Sampling) -> str:
        if token_ids and token_ids[-1] in (end_tokens(self._loaded.model, self._loaded.tokenizer) or ()):
            return "stop"
        return "length" if len(token_ids) >= sampling.max_new_tokens else "interrupted"


def _peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, weights included."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
