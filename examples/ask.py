"""Ask questions about a file, one after another. Only the first one reads the file.

python examples/ask.py MODEL FILE "First question?" "Second question?"

MODEL is a local directory, a .gguf file, a hub id or smollm2-135m. FILE is text, Markdown, source code or PDF. Each
answer is followed by the number of tokens of its prompt, and how many of them were in the cache already.
"""

from __future__ import annotations

import sys

import kvswap


def main() -> None:
    """Command line."""
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    model, document, *questions = sys.argv[1:]
    with kvswap.load(model, kv_memory="auto") as engine:
        for number, question in enumerate(questions):
            # The document comes before the first question and stays in the conversation.
            for text in engine.ask(question, [document] if number == 0 else [], max_new_tokens=64):
                print(text, end="", flush=True)
            stats = engine.stats
            print(f"\n  {stats.prompt_tokens:,} tokens, {stats.stored_tokens:,} of them stored before")


if __name__ == "__main__":
    main()
