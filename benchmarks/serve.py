"""How long a client of ``kvswap serve`` waits: first turn, next turn, after a restart, after an edit.

    python benchmarks/serve.py --model smollm2-135m --tokens 7000

Starts the real command on loopback with a folder of its own, and talks to it over HTTP. Prints a table in Markdown. The
page cache is as the run leaves it. The last rows are the time a token takes through the server and by ``kvswap run``.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

TEXT = "In chapter {n} the keeper of house {n} counts {m} sheep and writes the number on the door. "


@contextmanager
def server(model: str, kv_dir: str, *, kill: bool = False) -> Iterator[httpx.Client]:
    """A server that is ready."""
    words = ["-m", "kvswap", "serve", "--model", model, "--port", "8123", "--kv-dir", kv_dir, "--alias", "m"]
    process = subprocess.Popen([sys.executable, *words])
    try:
        with httpx.Client(base_url="http://127.0.0.1:8123", timeout=3600) as client:
            while process.poll() is None:
                try:
                    client.get("/health")
                    break
                except httpx.ConnectError:
                    time.sleep(0.1)
            yield client
    finally:
        process.send_signal(signal.SIGKILL if kill else signal.SIGINT)
        process.wait(60)


def ask(client: httpx.Client, messages: list[dict[str, str]], max_tokens: int = 16) -> dict[str, object]:
    """One streamed answer: seconds to its first text, seconds a token after it, and what was cached."""
    body = {"messages": messages, "max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True}}
    started_s, first_s, text, used = time.perf_counter(), 0.0, "", {}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            used = chunk.get("usage") or used
            piece = chunk["choices"][0]["delta"].get("content", "") if chunk["choices"] else ""
            if piece and not text:
                first_s = time.perf_counter()
            text += piece
    token_s = (time.perf_counter() - first_s) / max(1, used["completion_tokens"] - 1)
    cached = used["prompt_tokens_details"]["cached_tokens"]
    return {
        "text": text,
        "first_s": first_s - started_s,
        "token_s": token_s,
        "tokens": used["prompt_tokens"],
        "cached": cached,
    }


def main() -> None:
    """Run the sequence and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=7000)
    parser.add_argument("--folder", default=None)
    args = parser.parse_args()
    rows: list[tuple[str, dict[str, object]]] = []

    def show(name: str, found: dict[str, object]) -> dict[str, object]:
        rows.append((name, found))
        print(
            f"| {name} | {found['tokens']:,} | {found['cached']:,} "
            f"| {found['first_s']:.2f} | {1e3 * found['token_s']:.1f} |",
            flush=True,
        )
        return found

    print("| request | prompt tokens | of them stored | first token, s | ms a token |\n|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        story = "".join(TEXT.format(n=n, m=n * 7 % 90) for n in range(args.tokens // 24))
        messages = [{"role": "user", "content": story + "\n\nWho counts in chapter 9?"}]
        with server(args.model, folder) as client:
            ask(client, [{"role": "user", "content": "Hello"}])  # calibration, once a model
            first = show("first turn", ask(client, messages))
            messages += [
                {"role": "assistant", "content": first["text"]},
                {"role": "user", "content": "How many sheep?"},
            ]
            second = show("second turn", ask(client, messages))
            for number in range(5):
                ask(client, [{"role": "user", "content": f"Write a title for a chat, number {number}."}])
            edited = [*messages[:-1], {"role": "user", "content": "Where is the number?"}]
            show("last turn edited, after 5 side requests", ask(client, edited))
            messages += [{"role": "assistant", "content": second["text"]}, {"role": "user", "content": "And then?"}]
            third = show("third turn", ask(client, messages))
        messages += [{"role": "assistant", "content": third["text"]}, {"role": "user", "content": "Why?"}]
        with server(args.model, folder, kill=True) as client:
            fourth = show("fourth turn, after a restart", ask(client, messages))
        messages += [{"role": "assistant", "content": fourth["text"]}, {"role": "user", "content": "Where?"}]
        with server(args.model, folder) as client:
            show("fifth turn, after a kill", ask(client, messages, 128))
            long = show("short prompt, long answer", ask(client, [{"role": "user", "content": "Tell a story."}], 200))
        Path(folder, "x.json").touch()
        words = ["-m", "kvswap", "run", "--model", args.model, "--ask", "Tell a story.", "--max-new-tokens", "200"]
        words += ["--kv-dir", folder, "--stats-json", f"{folder}/x.json"]
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rate = json.loads(Path(folder, "x.json").read_text())["decode_tokens_per_s"]
        print(f"\nkvswap run: {1e3 / rate:.1f} ms a token; through the server {1e3 * long['token_s']:.1f} ms")
        share = rows[0][1]["first_s"] / rows[1][1]["first_s"]
        print(f"The first token of the second turn came {share:.0f} times sooner than that of the first.")


if __name__ == "__main__":
    main()
