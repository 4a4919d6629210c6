"""How likely a model finds a text: the log-probability of each of its tokens after those before it.

Attention is exact, as in every prompt. Nothing stays on disk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.core.layer_major import Progress
from kvswap.models.adapter import cache_keyword, check_length, check_token_ids
from kvswap.models.loading import LoadedModel
from kvswap.models.logprobs import TokenLogprob, token_logprob

ROWS = 512
"""So many tokens at a time, because each has a logit for every token of the vocabulary."""


def score_prompt(
    loaded: LoadedModel, config: Config, ids: Sequence[int], top: int, *, on_progress: Progress | None = None
) -> list[TokenLogprob | None]:
    """Log-probabilities of ``ids``, with the ``top`` likeliest tokens of each place; None for the first token.

    Raises InputError where they do not fit the model, MemoryBudgetError, StorageError.
    """
    model, ids = loaded.model, check_token_ids(loaded.model, ids)
    check_length(model, len(ids), "the prompt")
    found: list[TokenLogprob | None] = [None]
    given = torch.tensor([ids], device=model.device)
    with torch.no_grad(), attach(model, config, tokenizer=loaded.tokenizer) as cache:
        for start in range(0, len(ids), ROWS):
            piece = given[:, start : start + ROWS]
            with cache.prompt():
                logits = model(input_ids=piece, use_cache=True, **{cache_keyword(model): cache}).logits[0]
            for row, token_id in zip(logits, ids[start + 1 : start + ROWS + 1], strict=False):
                found.append(token_logprob(torch.log_softmax(row.float(), dim=-1), token_id, top))
            if on_progress is not None:
                on_progress("prefill", min(start + ROWS, len(ids)), len(ids))
    return found
