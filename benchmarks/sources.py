"""Measure whether the passage that holds the answer is the first source that kvswap names.

    python benchmarks/sources.py --model smollm2-135m --document BOOK.txt --context 4096,7000 --texts 2 --json FILE

As in the needle grid of ``kvswap eval``, each text hides one sentence with a number at one of five depths. The model is
asked for the number, as a user would ask it, with the defaults. Counted are cells that are answered rightly, and those
of them in which the first of ``engine.stats.sources`` has the sentence. At depth 1 the sentence is followed by some
others, because the newest 64 tokens are attended to always and are no source. An existing file is continued.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from kvswap.app.documents import Document, read_document
from kvswap.app.engine import load
from kvswap.disk.json_files import write_json
from kvswap.lab.evals.evaluation_text import evaluation_text
from kvswap.lab.evals.samples import Source
from kvswap.lab.evals.tasks.ruler import GRID_DEPTHS, NEEDLE, hidden, names, sentences
from kvswap.models.loading import load_model

QUESTION = "What is the special magic number for {key} mentioned in the document? Answer with the number."
NEW_TOKENS, LAST_SENTENCES = 24, 6


def cell(loaded: Any, source: Source, context: int, text: int, depth: float) -> dict[str, Any]:
    """Ask about one text with the needle at one depth; return what came of it."""
    dice = random.Random(f"sources/{text}")
    pieces = sentences(source, text, context)
    (key,), value = names(dice, 1), str(dice.randint(10**6, 10**7 - 1))
    needle = NEEDLE.format(key=key, value=value)
    low, high = 0, len(pieces)
    while low < high:  # as many sentences as fit
        middle = (low + high + 1) // 2
        fits = source.count_tokens(hidden(pieces[:middle], [needle], [depth])) <= context - 100
        low, high = (middle, high) if fits else (low, middle - 1)
    text_pieces, last = pieces[: low - LAST_SENTENCES], " ".join(pieces[low - LAST_SENTENCES : low])
    document = Document("book", f"{hidden(text_pieces, [needle], [depth])} {last}")
    with load(loaded) as engine:
        answer = "".join(engine.ask(QUESTION.format(key=key), [document], max_new_tokens=NEW_TOKENS))
        stats = engine.stats
    return {
        "context": context,
        "text": text,
        "depth": depth,
        "prompt_tokens": stats.prompt_tokens,
        "right": value in answer,
        "places": [number for number, each in enumerate(stats.sources) if value in each.text],
        "shares": [each.share for each in stats.sources],
        "mass_kept": stats.mass_kept,
        "answer": answer,
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Format a Markdown table: one line a context."""
    lines = ["| context | cells | answered rightly | its passage is the first source |", "|--:|--:|--:|--:|"]
    for context in sorted({row["context"] for row in rows}):
        here = [row for row in rows if row["context"] == context]
        right = [row for row in here if row["right"]]
        first = [row for row in right if row["places"][:1] == [0]]
        share = f"{len(first)} ({len(first) / len(right):.0%})" if right else "none"
        lines.append(f"| {context:,} | {len(here)} | {len(right)} | {share} |")
    return lines


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--document", type=Path, help="a text in UTF-8; default: the project's evaluation text")
    parser.add_argument("--context", default="4096", help="tokens, with commas between them")
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    loaded = load_model(args.model)
    documents = [read_document(args.document)] if args.document else []
    passages = evaluation_text(documents)[: len(documents) or None]
    source = Source(tokenizer=loaded.tokenizer, passages=passages, seed=0, steps=0)
    rows = json.loads(args.json.read_text()) if args.json.exists() else []
    done = {(row["context"], row["text"], row["depth"]) for row in rows}
    for context in map(int, args.context.split(",")):
        for text in range(args.texts):
            for depth in GRID_DEPTHS:
                if (context, text, depth) not in done:
                    rows.append(cell(loaded, source, context, text, depth))
                    write_json(args.json, rows)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
