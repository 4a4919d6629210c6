"""The tasks by name, as import paths: naming them loads nothing. One file a kind of task."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kvswap.errors import ConfigError

if TYPE_CHECKING:
    from kvswap.evals.samples import Task

TASKS = {
    "agreement": "kvswap.evals.tasks.text:AGREEMENT",
    "perplexity": "kvswap.evals.tasks.text:PERPLEXITY",
}


def find_task(name: str) -> Task:
    """The task of this name. Raises ConfigError with the names there are."""
    if name not in TASKS:
        raise ConfigError(f"task: got {name!r}", hint=f"use one of {', '.join(TASKS)}")
    module, _, attribute = TASKS[name].partition(":")
    task: Task = getattr(importlib.import_module(module), attribute)
    return task
