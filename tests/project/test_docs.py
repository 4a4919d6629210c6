"""The pages in docs say what the code says."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from kvswap import terms
from kvswap.config import Config
from kvswap.errors import ConfigError

DOCS = Path(__file__).parents[2] / "docs"


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def table(name: str, header: str) -> list[list[str]]:
    """Rows below ``header``, cells stripped."""
    lines = text(name).split(header + "\n", 1)[1].splitlines()
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[1:]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(name), re.MULTILINE | re.DOTALL)


def test_configuration_lists_every_key_with_its_default() -> None:
    rows = table("configuration.md", "| key | default | meaning |")
    listed = [(key.strip("`"), ast.literal_eval(default.strip("`"))) for key, default, _ in rows]
    assert listed == list(Config().to_dict().items())
    assert all(len(meaning) > 20 for _, _, meaning in rows)


@pytest.mark.parametrize("key", ["group_tokens", "read_depth", "read_gap_bytes"])
def test_configuration_tells_the_true_range(key: str) -> None:
    meaning = next(row[2] for row in table("configuration.md", "| key | default | meaning |") if row[0] == f"`{key}`")
    found = re.search(r"(\d+) to (\d+)", meaning)
    assert found is not None
    low, high = int(found[1]), int(found[2])
    assert Config(**{key: low, "select_tokens": 1000}).to_dict()[key] == low
    assert Config(**{key: high, "select_tokens": 1000}).to_dict()[key] == high
    for value in (low - 1, high + 1):
        with pytest.raises(ConfigError):
            Config(**{key: value, "select_tokens": 1000})


def test_configuration_examples_work(tmp_path: Path) -> None:
    (json_block,) = blocks("configuration.md", "json")
    path = tmp_path / "config.json"
    path.write_text(json_block)
    assert Config.from_file(path).to_dict() == {**Config().to_dict(), **json.loads(json_block)}
    (python_block,) = blocks("configuration.md", "python")
    names: dict[str, object] = {"kvswap": type("kvswap", (), {"Config": Config})}
    exec(python_block.replace("import kvswap\n", ""), names)
    assert names["wider"] == Config(kv_memory="24MiB", group_tokens=8, select_tokens=800)


def code_letters() -> dict[str, str]:
    """Letters and meanings of the docstring of terms.py."""
    found = {}
    for line in (terms.__doc__ or "").splitlines():
        if line.startswith("``"):
            letter, meaning = re.fullmatch(r"``(\w+)``\s+(.+)", line).groups()  # type: ignore[union-attr]
            for part in meaning.split("; ``"):  # H_q and H_kv stand on one line
                name, _, rest = part.partition("`` ")
                found.update({name: rest} if rest and part != meaning else {letter: part})
    return found


def test_glossary_has_the_letters_of_the_code() -> None:
    listed = {
        letter.strip("`"): meaning.replace("`", "") for letter, meaning in table("glossary.md", "| letter | meaning |")
    }
    assert listed == {letter: meaning.replace("`", "") for letter, meaning in code_letters().items()}
    assert len(listed) == 12


def test_glossary_has_the_words_of_the_code() -> None:
    words = set(re.findall(r"(?<!\*)\*(\w+)\*(?!\*)", terms.__doc__ or ""))
    assert words >= {"group", "extent", "slot", "sketch", "session"}
    assert words <= {word.strip("*") for word, _ in table("glossary.md", "| word | meaning |")}
