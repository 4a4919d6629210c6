"""The evaluation tasks by name. They are import paths, so that listing them loads nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kvswap.errors import ConfigError

if TYPE_CHECKING:
    from kvswap.lab.evals.samples import Task

TASKS = {
    "agreement": "kvswap.lab.evals.tasks.next_token:AGREEMENT",
    "perplexity": "kvswap.lab.evals.tasks.next_token:PERPLEXITY",
    "needle": "kvswap.lab.evals.tasks.ruler:GRID",
    "ruler-s1": "kvswap.lab.evals.tasks.ruler:S1",
    "ruler-s2": "kvswap.lab.evals.tasks.ruler:S2",
    "ruler-mk1": "kvswap.lab.evals.tasks.ruler:MK1",
    "ruler-mq": "kvswap.lab.evals.tasks.ruler:MQ",
    "ruler-mv": "kvswap.lab.evals.tasks.ruler:MV",
    "ruler-vt": "kvswap.lab.evals.tasks.ruler:VT",
    "ruler-qa1": "kvswap.lab.evals.tasks.passages:QA1",
    "ruler-qa2": "kvswap.lab.evals.tasks.passages:QA2",
    "text2json": "kvswap.lab.evals.tasks.text2json:TEXT2JSON",
    "facts-one": "kvswap.lab.evals.tasks.facts:FACTS_ONE",
    "facts-all": "kvswap.lab.evals.tasks.facts:FACTS_ALL",
    "facts-values": "kvswap.lab.evals.tasks.facts:FACTS_VALUES",
    "facts-json": "kvswap.lab.evals.tasks.facts:FACTS_JSON",
    "longbench": "kvswap.lab.evals.tasks.longbench:LONGBENCH",
}


def find_task(name: str) -> Task:
    """Return the task of this name. Raises ConfigError, with the known names, for any other."""
    if name not in TASKS:
        raise ConfigError(f"task: got {name!r}", hint=f"use one of {', '.join(TASKS)}")
    module, _, attribute = TASKS[name].partition(":")
    task: Task = getattr(importlib.import_module(module), attribute)
    return task
