"""Runs ``generate`` in a thread and gives its text as an iterator.

``app`` iterates over it. The thread ends before the iterator does: when the text is read to its end, when the iterator
is closed early, and after an exception such as KeyboardInterrupt. An error of the thread is raised where the text is
read.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList, TextIteratorStreamer

from kvswap.models.adapter import cache_keyword
from kvswap.models.chat_template import end_of_turn
from kvswap.models.generation_config import cleaned, remarks
from kvswap.models.logprobs import Logprobs
from kvswap.models.sampling import Sampling
from kvswap.models.stop_text import StopText

_MOST_CACHED_TOKENS = 64
"""So many tokens at most are decoded again for each new one, but for those in the middle of a character."""


class Stopped(Exception):  # noqa: N818 - not an error
    """Raised in the generating thread to leave a prompt half-way."""


class Generation:
    """One answer on its way; iterate for its text, once. ``token_ids`` and ``times_s`` grow with it.

    ``watch(input_ids, logits)`` sees the model's own logits of every step, whatever the checkpoint's settings make of
    them; ``logprobs`` sees them as well, and the chosen tokens. ``on_notice`` is told which of those settings count and
    which do not.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        ids: list[int],
        cache: Any,
        sampling: Sampling,
        watch: Any = None,
        on_notice: Callable[[str], None] | None = None,
        logprobs: Logprobs | None = None,
    ) -> None:
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self._interrupted = False
        self._model, self._tokenizer, self._ids, self._cache = model, tokenizer, ids, cache
        self._sampling, self._watches = sampling, [each for each in (watch, logprobs) if each is not None]
        self._streamer = _TimedStreamer(tokenizer, StopText(sampling.stop), logprobs)
        if on_notice is not None:
            for remark in remarks(model.generation_config):
                on_notice(remark)

    @property
    def token_ids(self) -> list[int]:
        """Token ids generated so far."""
        return self._streamer.token_ids

    @property
    def times_s(self) -> list[float]:
        """When each token was there, by ``time.perf_counter``."""
        return self._streamer.times_s

    @property
    def text(self) -> str:
        """The answer so far, as it was given: without special tokens, up to a stop string."""
        return "".join(self._streamer.shown)

    @property
    def stopped_by(self) -> str:
        """The stop string that ended the answer; empty where none did."""
        return self._streamer.stop_text.found

    @property
    def finish_reason(self) -> str:
        """Why the answer ended: "stop", "length" or "interrupted"."""
        if self.stopped_by or (
            self.token_ids and self.token_ids[-1] in (end_tokens(self._model, self._tokenizer) or ())
        ):
            return "stop"
        if len(self.token_ids) >= self._sampling.max_new_tokens:
            return "length"
        return "interrupted" if self._interrupted or not self.token_ids else "stop"  # by a string of the checkpoint

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
        self._cache.answer_tokens = self._sampling.max_new_tokens - 1  # K, V of the last one are never computed
        ids = torch.tensor([self._ids], device=self._model.device)
        arguments = {**self._sampling.arguments(), cache_keyword(self._model): self._cache}
        if self._model.generation_config.stop_strings:
            arguments["tokenizer"] = self._tokenizer
        with _cleaned_config(self._model), _watching(self._model, self._watches) as watchers:
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                streamer=self._streamer,
                stopping_criteria=StoppingCriteriaList([self._stopped]),
                logits_processor=LogitsProcessorList(watchers),
                eos_token_id=end_tokens(self._model, self._tokenizer),
                pad_token_id=self._pad_token(),
                **arguments,
            )

    def _stopped(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """The stopping criterion of ``generate``."""
        self._interrupted = self.stop.is_set() and not self.stopped_by
        ends = self._interrupted or bool(self.stopped_by)
        return torch.full((input_ids.shape[0],), ends, device=input_ids.device)

    def _pad_token(self) -> int:
        for owner in (self._model.generation_config, self._tokenizer):
            if owner.pad_token_id is not None:
                return int(owner.pad_token_id)
        return 0


def end_tokens(model: Any, tokenizer: Any) -> list[int] | None:
    """Tokens that end an answer: the model's, the tokenizer's and the chat template's differ in some checkpoints."""
    ends = model.generation_config.eos_token_id
    found = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    return sorted(found - {None}) or None


class _TimedStreamer(TextIteratorStreamer):  # type: ignore[misc] # transformers is not typed
    """Keeps the ids and the time of every token as it passes, and gives text up to a stop string.

    Text comes as soon as its characters are whole, not word by word as transformers has it: an answer has to end at the
    very token that completes a stop string.
    """

    def __init__(self, tokenizer: Any, stop_text: StopText, logprobs: Logprobs | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.token_cache: list[int] = []
        self.print_len, self.next_tokens_are_prompt = 0, True
        self.token_ids: list[int] = []
        self.times_s: list[float] = []
        self.shown: list[str] = []
        self.stop_text, self._logprobs = stop_text, logprobs

    def put(self, value: Any) -> None:
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.times_s.append(time.perf_counter())
        ids = value.reshape(-1).tolist()
        self.token_ids += ids
        if self._logprobs is not None:
            self._logprobs.chosen(ids[-1])
        self.token_cache += ids
        text = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)
        whole = text[self.print_len :].rstrip("\ufffd")  # the last bytes of a character may be missing
        self.print_len += len(whole)
        if text.endswith("\n") or len(self.token_cache) >= _MOST_CACHED_TOKENS:
            self._forget()
        self.on_finalized_text(whole)

    def _forget(self) -> None:
        """Keep the last token only, so that decoding takes the same time at every token.

        It stays because some tokenizers drop a space which begins a text. A token that is part of a character, or that
        has no text, cannot stand alone: then all tokens stay until a later one comes.
        """
        last = self.token_cache[-1:]
        text = self.tokenizer.decode(last, **self.decode_kwargs)
        if text and "\ufffd" not in text:
            self.token_cache, self.print_len = last, len(text)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        shown = self.stop_text.push(text)
        shown += self.stop_text.end() if stream_end else ""
        self.shown.append(shown)
        super().on_finalized_text(shown, stream_end=stream_end)


@contextlib.contextmanager
def _cleaned_config(model: Any) -> Iterator[None]:
    """The model without the settings of its checkpoint that are set aside: ``generate`` refuses some before it looks at
    its arguments."""
    given = model.generation_config
    model.generation_config = cleaned(given)
    try:
        yield
    finally:
        model.generation_config = given


@contextlib.contextmanager
def _watching(model: Any, watches: Sequence[Any]) -> Iterator[list[Any]]:
    """Logits processors that show ``watches`` the logits as the model gave them and change nothing."""
    if not watches:
        yield []
        return
    latest: list[torch.Tensor] = []

    def keep(module: Any, arguments: Any, output: Any) -> None:
        latest[:] = [output.logits[:, -1]]

    def show(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for watch in watches:
            watch(input_ids, latest[0].to(scores.dtype))
        return scores

    handle = model.register_forward_hook(keep)
    try:
        yield [show]
    finally:
        handle.remove()
