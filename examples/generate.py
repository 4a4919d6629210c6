"""A transformers script with one line more: the cache of ``generate`` on disk.

python examples/generate.py MODEL FILE "Question?"
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import kvswap


def main() -> None:
    """Command line."""
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    name, document, question = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    text = f"{Path(document).read_text(encoding='utf-8')}\n\nQuestion: {question}\nAnswer:"
    inputs = tokenizer(text, return_tensors="pt")
    with kvswap.attach(model, kvswap.Config(kv_memory="auto"), tokenizer=tokenizer) as cache:
        model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=64,
            do_sample=False,
            streamer=TextStreamer(tokenizer, skip_prompt=True),
        )
        print(cache.stats)


if __name__ == "__main__":
    main()
