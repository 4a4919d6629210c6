"""Ask a question about a file, then a second one about the same file.

python examples/ask.py MODEL FILE "First question?" "Second question?"
"""

from __future__ import annotations

import sys

import kvswap


def main() -> None:
    """Command line."""
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    model, document, *questions = sys.argv[1:]
    with kvswap.load(model, kvswap.Config(kv_memory="auto")) as engine:
        for number, question in enumerate(questions):
            for text in engine.ask(question, [document] if number == 0 else [], max_new_tokens=64):
                print(text, end="", flush=True)
            stats = engine.stats
            print(f"\n  {stats.prompt_tokens:,} tokens, {stats.stored_tokens:,} of them stored before")


if __name__ == "__main__":
    main()
