"""The chat template of a tokenizer: which one is used, what it makes of messages, and which token ends a turn.

``app.prompt`` renders conversations with it, ``streaming`` asks for the end of a turn. A template is a program
of the checkpoint and may raise anything; that becomes a ModelError. Any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvswap.errors import ModelError
from kvswap.models.tokens import special_tokens

_NOT_FOR_CHAT = ("tool_use", "rag")
_ANSWER = "kvswapanswer"


def has_template(tokenizer: Any) -> bool:
    """Whether the model has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def apply_template(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    *,
    answer_follows: bool = True,
    tools: Sequence[dict[str, Any]] | None = None,
) -> str:
    """The text of the messages, with the beginning of an answer where ``answer_follows``. Raises ModelError.

    ``tools`` (JSON schemas of functions) go to the template, which may ignore them.
    """
    name = _template_name(tokenizer)
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages),
            chat_template=name,
            tools=list(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=answer_follows,
        )
    except Exception as error:  # what a program of the checkpoint raises
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"the model's chat template cannot be used: {lines[0]}",
            hint="check chat_template in its tokenizer files, or use a model with another one",
        ) from error
    return text


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the template puts after an answer; None where there is none."""
    if not has_template(tokenizer):
        return None
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = apply_template(tokenizer, messages, answer_follows=False)
    except ModelError:
        return None
    _, found, rest = text.rpartition(_ANSWER)
    rest = rest.lstrip()
    ends = [(len(token), number) for number, token in special_tokens(tokenizer).items() if rest.startswith(token)]
    return max(ends)[1] if found and ends else None


def _template_name(tokenizer: Any) -> str | None:
    """Which of several templates to use; None for the only one, or the one named "default"."""
    templates = tokenizer.chat_template
    if not isinstance(templates, dict) or "default" in templates:
        return None
    names = [name for name in templates if name not in _NOT_FOR_CHAT]
    if len(names) != 1:
        raise ModelError(
            f'the model has chat templates named {", ".join(sorted(templates))}, and none named "default"',
            hint="rename one of them to default in its tokenizer files",
        )
    return str(names[0])
