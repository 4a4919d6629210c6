"""One program in a process of its own, asked through its standard input: ``python -m kvswap.lab.peers.worker NAME``.

Every request is one line of JSON with the key ``do``; every answer is one line of JSON on standard output. What
libraries print goes to standard error. ``run.Worker`` is the other side. One thread asks; a program computes with the
threads that it is told to use.

Requests: ``load`` (``model``, ``threads``, ``context_tokens``, ``config``), ``encode`` (``documents``), ``prefill``
(``tokens``), ``steps`` (``tokens``), ``memory``. An error answers ``{"error": text, "hint": text}`` and ends the
process.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import IO, Any, Protocol

from kvswap.errors import KVSwapError

PROGRAMS = {"kvswap": "kvswap.lab.peers.own", "llama.cpp": "kvswap.lab.peers.llama_cpp"}
"""The module of each program; its ``open_program`` loads a model."""
Answer = dict[str, Any]


class Program(Protocol):
    """A loaded model with one empty context."""

    def encode(self, documents: Sequence[str]) -> list[int]:
        """Token ids of the evaluation text, the user's documents first."""

    def prefill(self, tokens: Sequence[int]) -> float:
        """Take a prompt into the context; returns seconds until the logits of its last token are there."""

    def steps(self, tokens: Sequence[int]) -> tuple[list[float], list[int]]:
        """Take tokens one by one; returns the seconds of each step and the most likely token after it."""

    def versions(self) -> dict[str, str]:
        """What computes, by name."""


def memory() -> Answer:
    """Memory of this process in bytes: anonymous, and mapped from files. Zero where the system does not tell."""
    found = {"RssAnon": 0, "RssFile": 0}
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name in found:
                    found[name] = int(value.split()[0]) << 10
    except OSError:
        pass
    return {"anonymous_bytes": found["RssAnon"], "mapped_bytes": found["RssFile"]}


def answer(program: Program, request: Answer) -> Answer:
    """Do what one request asks of a loaded program."""
    if request["do"] == "encode":
        return {"tokens": program.encode(request["documents"])}
    if request["do"] == "prefill":
        return {"prefill_s": program.prefill(request["tokens"])}
    if request["do"] == "steps":
        step_s, top = program.steps(request["tokens"])
        return {"step_s": step_s, "top": top}
    return memory()


def serve(name: str, requests: IO[str], answers: IO[str]) -> None:
    """Answer requests until there are no more. The first one is ``load``."""
    program: Program | None = None
    for line in requests:
        request = json.loads(line)
        try:
            if program is None:
                program = importlib.import_module(PROGRAMS[name]).open_program(request)
                found: Answer = {"versions": program.versions()}
            else:
                found = answer(program, request)
        except KVSwapError as error:
            found = {"error": error.message, "hint": error.hint}
        print(json.dumps(found), file=answers, flush=True)
        if "error" in found:
            return


def main() -> None:
    """Serve on this process's standard input and output."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not stand between answers
    serve(sys.argv[1], sys.stdin, answers)


if __name__ == "__main__":
    main()
