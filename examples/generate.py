"""A transformers script with its KV cache on disk: a ``with`` line, and an argument of ``generate``.

python examples/generate.py MODEL FILE "Question?"

MODEL is what transformers takes: a local directory or a hub id. FILE is text in UTF-8. The answer is followed by the
statistics of the cache.
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
    # The tokenizer is for calibration, once a model. After the block the model is as it was.
    with kvswap.attach(model, tokenizer=tokenizer, kv_memory="auto") as cache:
        model.generate(
            **inputs,
            cache=cache,  # transformers 5.23 calls it past_key_values
            max_new_tokens=64,
            do_sample=False,
            streamer=TextStreamer(tokenizer, skip_prompt=True),
        )
        print(cache.stats)


if __name__ == "__main__":
    main()
