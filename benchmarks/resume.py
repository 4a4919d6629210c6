"""Measure sessions: resuming against prefill, forks, and the cost of checksums and encryption.

    python benchmarks/resume.py --model smollm2-135m --tokens 7000 --json out.json

One session is prefilled with text that was never calibrated on, once unencrypted and once encrypted, and closed. Then
three things are measured in one process with the model loaded:

* First token: the time from opening the session (reading it, checking the model, attaching) to one token, without new
  tokens and with --question new tokens that attend to the stored context. For prefill, the time to its first token.
* Fork: seconds, and bytes of new disk space.
* Decode: --turns turns of forced steps, each on a fresh fork, so that all begin equally. In the unencrypted session,
  steps with and without verification of checksums alternate, --steps of each; then come --steps in the encrypted
  session. The time of verifying and decrypting alone is also measured, because the noise of a shared machine could hide
  it in the step times.

The files lie below --kv-dir and are removed at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import secrets
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import kvswap
from kvswap.disk.folders import kv_folder
from kvswap.lab.evals.evaluation_text import evaluation_text
from kvswap.models.adapter import cache_keyword
from kvswap.models.loading import LoadedModel, load_model
from kvswap.sessions.encryption import KEY_VARIABLE, new_key
from kvswap.sessions.session import Session
from kvswap.store.persistent import PersistentGroupStore
from kvswap.tuning.machine import describe_machine

WARM_STEPS = 4
KINDS = ("unverified", "checksums", "encrypted")


class Meter:
    """Measures the seconds in ``PersistentGroupStore.unseal`` since ``reset``, and the groups that it processed."""

    def __init__(self) -> None:
        self.seconds, self.groups = 0.0, 0
        self._unseal = PersistentGroupStore.unseal
        meter, unseal = self, self._unseal

        def timed(store: PersistentGroupStore, rows: Any, *rest: Any) -> None:
            started_s = time.perf_counter()
            unseal(store, rows, *rest)
            meter.seconds += time.perf_counter() - started_s
            meter.groups += len(rows)

        PersistentGroupStore.unseal = timed  # type: ignore[method-assign]

    def reset(self) -> None:
        """Set the counters to zero."""
        self.seconds, self.groups = 0.0, 0

    def close(self) -> None:
        """Restore the original function."""
        PersistentGroupStore.unseal = self._unseal  # type: ignore[method-assign]


def prompt_ids(loaded: LoadedModel, tokens: int) -> list[int]:
    """Return ``tokens`` tokens of evaluation text. Raises SystemExit when the text is too short."""
    ids: list[int] = []
    for _, text in evaluation_text():
        ids += loaded.tokenizer(text, verbose=False)["input_ids"]
        if len(ids) >= tokens:
            return ids[:tokens]
    raise SystemExit(f"the evaluation text has {len(ids):,} tokens, {tokens:,} are needed: use fewer --tokens")


def evict(folder: Path) -> None:
    """Remove a session's files from the page cache, so that reads of them come from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)  # only written pages can be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def first_token_s(session: Session, new: list[int], started_s: float) -> float:
    """Append ``new`` and generate one token; return the seconds from ``started_s`` until the token exists."""
    if new:
        session.append(new)
    stream = session.generate(max_new_tokens=1)
    for _ in stream:
        break
    took_s = time.perf_counter() - started_s
    list(stream)
    return took_s


def measure_first_tokens(loaded: LoadedModel, config: kvswap.Config, ids: list[int], args: Any) -> dict[str, Any]:
    """Measure first tokens of prefill and of the resumed session, unencrypted and encrypted."""
    from kvswap.sessions.catalog import session_path

    found: dict[str, Any] = {}
    context, question = ids[: args.tokens], ids[args.tokens : args.tokens + args.question]
    for kind, encrypt in (("plain", False), ("secret", True)):
        with Session.create(kind, loaded, config, encrypt=encrypt) as session:
            assert session.cache is not None  # calibrates before the time is measured
            prefill_s = first_token_s(session, context, time.perf_counter())
            session.undo()  # removes the token again, so that the session is the context alone
        resumed: dict[str, list[float]] = {"resume_s": [], "question_s": []}
        for _ in range(args.repeat):
            for name, new in (("resume_s", []), ("question_s", question)):
                fork(config, kind, "scratch")
                evict(session_path(config.kv_dir, "scratch").parent)
                started_s = time.perf_counter()
                with Session.open("scratch", loaded, config) as session:
                    resumed[name].append(first_token_s(session, new, started_s))
                remove(config, "scratch")
        found[kind] = {"prefill_s": prefill_s, **resumed}
    return found


def measure_forks(config: kvswap.Config, repeat: int) -> dict[str, Any]:
    """Measure the seconds of a fork, and its new disk space as the session and as the disk count it."""
    from kvswap.sessions.catalog import open_store, session_path, used_bytes
    from kvswap.sessions.sharing import fork as fork_store

    times, root = [], session_path(config.kv_dir, "plain").parent
    for _ in range(repeat):
        with open_store(config.kv_dir, "plain") as store:
            before_bytes = used_bytes(root)
            started_s = time.perf_counter()
            written_bytes = fork_store(store, session_path(config.kv_dir, "scratch"))
            times.append(time.perf_counter() - started_s)
            disk_bytes = used_bytes(root) - before_bytes
        remove(config, "scratch")
    return {"fork_s": times, "written_bytes": written_bytes, "disk_bytes": disk_bytes}


def measure_decode(loaded: LoadedModel, config: kvswap.Config, ids: list[int], args: Any) -> dict[str, Any]:
    """Measure the step times of each kind by turn, and the share of verification and decryption in them."""
    meter = Meter()
    found: dict[str, Any] = {kind: {"step_s": [], "unseal_s": [], "unsealed_groups": []} for kind in KINDS}
    plain = ("unverified", "checksums")
    try:
        for turn in range(args.turns):
            turns = [("plain", (plain[turn % 2], plain[1 - turn % 2])), ("secret", ("encrypted",))]
            for source, kinds in turns if turn % 2 else turns[::-1]:
                fork(config, source, "scratch")
                with Session.open("scratch", loaded, config) as session:
                    forced = [*session.token_ids[session.tokens :], *ids[args.tokens :]]
                    forced = forced[: WARM_STEPS + args.steps * len(kinds)]
                    steps = decode(loaded, session, forced, kinds, meter)
                remove(config, "scratch")
                for kind in kinds:
                    times = [step for step in steps if step["kind"] == kind]
                    found[kind]["step_s"].append([round(each["step_s"], 6) for each in times])
                    found[kind]["unseal_s"].append(round(sum(each["unseal_s"] for each in times), 6))
                    found[kind]["unsealed_groups"].append(sum(each["groups"] for each in times))
    finally:
        meter.close()
    return found


@torch.no_grad()
def decode(
    loaded: LoadedModel, session: Session, forced: list[int], kinds: tuple[str, ...], meter: Meter
) -> list[dict[str, Any]]:
    """Decode forced tokens, alternating the kinds; return one record for each step after the warm-up."""
    model, records = loaded.model, []
    for number, token in enumerate(forced):
        kind = kinds[number % len(kinds)]
        if number:  # the first one opens the store
            session.cache._state.store.checked = kind != "unverified"
        meter.reset()
        started_s = time.perf_counter()
        step = torch.tensor([[token]], device=model.device)
        model(input_ids=step, use_cache=True, **{cache_keyword(model): session.cache}).logits.float().cpu()
        took_s = time.perf_counter() - started_s
        records.append({"kind": kind, "step_s": took_s, "unseal_s": meter.seconds, "groups": meter.groups})
    return records[WARM_STEPS:]


def fork(config: kvswap.Config, name: str, new: str) -> None:
    """Fork a closed session."""
    from kvswap.sessions.catalog import open_store, session_path
    from kvswap.sessions.sharing import fork as fork_store

    with open_store(config.kv_dir, name) as store:
        fork_store(store, session_path(config.kv_dir, new))


def remove(config: kvswap.Config, name: str) -> None:
    """Remove a closed session."""
    from kvswap.sessions.catalog import remove as remove_path
    from kvswap.sessions.catalog import session_path

    remove_path(session_path(config.kv_dir, name))


def summarise(first: dict[str, Any], forks: dict[str, Any], steps: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers that the docs show."""
    medians = {kind: [statistics.median(turn) for turn in each["step_s"]] for kind, each in steps.items()}
    shares = {kind: sum(each["unseal_s"]) / sum(sum(turn) for turn in each["step_s"]) for kind, each in steps.items()}
    plain, secret = first["plain"], first["secret"]
    return {
        "prefill_s": plain["prefill_s"],
        "prefill_encrypted_s": secret["prefill_s"],
        "resume_s": statistics.median(plain["resume_s"]),
        "resume_encrypted_s": statistics.median(secret["resume_s"]),
        "question_s": statistics.median(plain["question_s"]),
        "question_encrypted_s": statistics.median(secret["question_s"]),
        "resume_times_faster": plain["prefill_s"] / statistics.median(plain["resume_s"]),
        "fork_s": statistics.median(forks["fork_s"]),
        "fork_disk_bytes": forks["disk_bytes"],
        "step_s": {kind: statistics.median(each) for kind, each in medians.items()},
        "step_ratio": {
            kind: statistics.median(a / b for a, b in zip(medians[kind], medians["unverified"], strict=True))
            for kind in ("checksums", "encrypted")
        },
        "unseal_share": {kind: shares[kind] for kind in ("checksums", "encrypted")},
    }


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=7000, help="tokens of the session")
    parser.add_argument("--question", type=int, default=32, help="new tokens of a question to it")
    parser.add_argument("--repeat", type=int, default=5, help="how often first tokens and forks are timed")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--steps", type=int, default=24, help="steps of each kind in a turn")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kv-memory", default="auto")
    parser.add_argument("--kv-dir", help="default: below the user's cache folder")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ[KEY_VARIABLE] = new_key()
    loaded = load_model(args.model, dtype=args.dtype)
    ids = prompt_ids(loaded, args.tokens + max(args.question, WARM_STEPS + 2 * args.steps) + 1)
    place = kv_folder(args.kv_dir) / f"resume-{secrets.token_hex(4)}"
    config = kvswap.Config(kv_memory=args.kv_memory, kv_dir=str(place))
    try:
        first = measure_first_tokens(loaded, config, ids, args)
        forks = measure_forks(config, args.repeat)
        steps = measure_decode(loaded, config, ids, args)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    summary = summarise(first, forks, steps)
    options = {name: value for name, value in vars(args).items() if name not in ("json", "kv_dir", "model")}
    content = {
        "format": "kvswap-resume",
        "version": 1,
        "model": Path(args.model).name,
        "options": options,
        "machine": dataclasses.asdict(describe_machine()),
        "threads": torch.get_num_threads(),
        "summary": summary,
        "first_tokens": first,
        "forks": forks,
        "decode": steps,
    }
    print(json.dumps(summary, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
