"""Configurations from a file and from options, and option values that are lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvswap.errors import ConfigError

if TYPE_CHECKING:
    from kvswap.app.prompt import Message
    from kvswap.config import Config
    from kvswap.models.loading import LoadedModel
    from kvswap.tuning.solution import TunedConfig


_NUMBER = re.compile(r"0*[1-9][0-9]{0,8}")
"""Up to 999,999,999: no context or batch is longer. str.isdigit would also accept digits that int does not read."""


@dataclass(frozen=True, slots=True)
class TunedChoice:
    """A file of ``kvswap tune``, which has a configuration for each length of context, and options that override it."""

    tuned: TunedConfig
    overrides: dict[str, Any]

    def choose(self, loaded: LoadedModel, *, messages: Sequence[Message] | None, new_tokens: int) -> Config:
        """The configuration for a prompt; without messages, for the longest context. Raises ConfigError: other model.

        A session uses the one for the longest context, so that it stays the same as the session grows.
        """
        from kvswap.app.prompt import check_length, encode, render
        from kvswap.models.adapter import context_limit, inspect
        from kvswap.models.identity import attention_fingerprint

        self.tuned.check_model(attention_fingerprint(inspect(loaded.model)))
        tokens = max(solution.context_tokens for solution in self.tuned.solutions)
        if messages is not None:
            check_length(loaded.tokenizer, messages, context_limit(loaded.model))
            tokens = len(encode(loaded.tokenizer, render(loaded.tokenizer, messages), first=True)) + new_tokens
        return self.tuned.config(context_tokens=tokens).replace(**self.overrides)


def plain_config(config_file: str | None, **options: str | None) -> Config:
    """The configuration of commands that take no tuned file. Raises ConfigError."""
    from kvswap.config import Config

    given = {name: value for name, value in options.items() if value is not None}
    return (Config() if config_file is None else Config.from_file(config_file)).replace(**given)


def split_list(option: str, text: str) -> list[str]:
    """The values of an option that are separated by commas, each once. Raises ConfigError where there is none."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise ConfigError(f"{option}: got {text!r}", hint="give one or more, with commas between them")
    return found


def split_numbers(option: str, text: str) -> list[int]:
    """As ``split_list``, for integers from 1 up."""
    parts = split_list(option, text)
    for part in parts:
        if not _NUMBER.fullmatch(part):
            raise ConfigError(f"{option}: got {part[:40]!r}", hint="give whole numbers from 1 up, such as 4096,8192")
    return [int(part) for part in parts]


def read_config(config_file: str | None, **options: str | None) -> tuple[Config, TunedChoice | None]:
    """The configuration from a file and from options; where the file is a tuned one, also what chooses by context.

    Raises ConfigError.
    """
    from kvswap.config import Config
    from kvswap.tuning.solution import is_tuned, load_tuned

    given = {name: value for name, value in options.items() if value is not None}
    if config_file is None:
        return Config(**given), None
    if not is_tuned(config_file):
        return Config.from_file(config_file).replace(**given), None
    choice = TunedChoice(load_tuned(config_file), given)
    longest = max(choice.tuned.solutions, key=lambda solution: solution.context_tokens)
    return longest.config.replace(**given), choice
