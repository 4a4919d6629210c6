"""One program in a process of its own, asked through its standard input: ``python -m kvswap.lab.peers.worker NAME``.

Every request is one line of JSON with the key ``do``; every answer is one line of JSON on standard output. What
libraries print goes to standard error. ``run.Worker`` is the other side. One thread asks; a program computes with the
threads that it is told to use.

The first request is ``load`` (``model``, ``file``, ``threads``, ``context_tokens``, ``config``). ``memory`` asks for
the memory of the process. Every other request is a method of the program, with its arguments. An error answers
``{"error": text, "hint": text}`` and ends the process.
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
    """A loaded model with one empty context. Every method gives an answer as it is sent."""

    def prefill(self, tokens: Sequence[int]) -> Answer:
        """Take a prompt into the context: ``prefill_s`` is seconds until the logits of its last token are there."""

    def resume(self, context: str) -> Answer:
        """Take a stored context in place of a prompt: ``resume_s`` is the seconds of that."""

    def steps(self, tokens: Sequence[int]) -> Answer:
        """Take tokens one by one: ``step_s`` is the seconds of each, ``top`` the most likely token after it."""

    def versions(self) -> Answer:
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


def serve(name: str, requests: IO[str], answers: IO[str]) -> None:
    """Answer requests until there are no more. The first one is ``load``."""
    program: Program | None = None
    for line in requests:
        request = json.loads(line)
        try:
            do = request.pop("do")
            if program is None:
                program = importlib.import_module(PROGRAMS[name]).open_program(request)
                found: Answer = {"versions": program.versions()}
            else:
                found = memory() if do == "memory" else getattr(program, do)(**request)
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
