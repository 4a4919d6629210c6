"""Runs ``generate`` in a thread and gives its text as an iterator.

``app`` iterates over it. The thread ends before the iterator does: when the text is read to its end, when the iterator
is closed early, and after an exception such as KeyboardInterrupt. An error of the thread is raised where the text is
read.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from kvswap.models.adapter import cache_keyword
from kvswap.models.sampling import Sampling


class Stopped(Exception):  # noqa: N818 - not an error
    """Raised in the generating thread to leave a prompt half-way."""


class Generation:
    """One answer on its way; iterate for its text, once. ``token_ids`` and ``times_s`` grow with it.

    ``watch(input_ids, scores)`` sees the logits of every step first and gives them back.
    """

    def __init__(
        self, model: Any, tokenizer: Any, ids: list[int], cache: Any, sampling: Sampling, watch: Any = None
    ) -> None:
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self._model, self._tokenizer, self._ids, self._cache = model, tokenizer, ids, cache
        self._sampling, self._watch = sampling, watch
        self._streamer = _TimedStreamer(tokenizer)

    @property
    def token_ids(self) -> list[int]:
        """Token ids generated so far."""
        return self._streamer.token_ids

    @property
    def times_s(self) -> list[float]:
        """When each token was there, by ``time.perf_counter``."""
        return self._streamer.times_s

    @property
    def finish_reason(self) -> str:
        """``stop`` after an end token, ``length`` after as many tokens as were asked for, or ``interrupted``."""
        ids = self.token_ids
        if ids and ids[-1] in (end_tokens(self._model, self._tokenizer) or ()):
            return "stop"
        return "length" if len(ids) >= self._sampling.max_new_tokens else "interrupted"

    def checkpoint(self) -> None:
        """Called by the generating thread between pieces of a prompt; raises Stopped there when it is to end."""
        if self.stop.is_set():
            raise Stopped

    def __iter__(self) -> Iterator[str]:
        worker = threading.Thread(target=self._run, name="kvswap-generate", daemon=True)
        worker.start()
        try:
            for text in self._streamer:
                if text:
                    yield text
        finally:
            self.stop.set()
            while worker.is_alive():  # it works on memory that the caller is about to give back
                with contextlib.suppress(KeyboardInterrupt):
                    worker.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            with torch.random.fork_rng(enabled=self._sampling.seed is not None):
                if self._sampling.seed is not None:
                    torch.manual_seed(self._sampling.seed)
                self._generate()
        except BaseException as error:  # noqa: BLE001 - raised again where the text is read
            self.error = error
        finally:
            self._streamer.text_queue.put(self._streamer.stop_signal)

    def _generate(self) -> None:
        ids = torch.tensor([self._ids], device=self._model.device)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=self._streamer,
            stopping_criteria=StoppingCriteriaList([_StopOn(self.stop)]),
            logits_processor=LogitsProcessorList([] if self._watch is None else [self._watch]),
            eos_token_id=end_tokens(self._model, self._tokenizer),
            pad_token_id=self._pad_token(),
            **self._sampling.arguments(),
            **{cache_keyword(self._model): self._cache},
        )

    def _pad_token(self) -> int:
        for owner in (self._model.generation_config, self._tokenizer):
            if owner.pad_token_id is not None:
                return int(owner.pad_token_id)
        return 0


def end_tokens(model: Any, tokenizer: Any) -> list[int] | None:
    """Tokens that end an answer: the model's and the tokenizer's, which differ in some checkpoints."""
    ends = model.generation_config.eos_token_id
    found = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    return sorted(found - {None}) or None


class _TimedStreamer(TextIteratorStreamer):  # type: ignore[misc] # transformers is not typed
    """Keeps the ids and the time of every token as it passes."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.token_ids: list[int] = []
        self.times_s: list[float] = []

    def put(self, value: Any) -> None:
        if not self.next_tokens_are_prompt:
            self.times_s.append(time.perf_counter())
            self.token_ids += value.reshape(-1).tolist()
        super().put(value)


class _StopOn(StoppingCriteria):  # type: ignore[misc] # transformers is not typed
    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device)
