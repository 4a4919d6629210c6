"""The pages in docs say what the code says."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import kvswap
from kvswap import terms
from kvswap.cli.main import kvswap as command_line
from kvswap.config import Config
from kvswap.errors import ConfigError

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
WRITTEN = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))]
WRITTEN.append(ROOT / "benchmarks" / "METHODOLOGY.md")


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


def test_settings_lists_every_key_with_its_default() -> None:
    rows = table("settings.md", "| key | default | meaning |")
    listed = [(key.strip("`"), ast.literal_eval(default.strip("`"))) for key, default, _ in rows]
    assert listed == list(Config().to_dict().items())
    assert all(len(meaning) > 20 for _, _, meaning in rows)


@pytest.mark.parametrize("key", ["group_tokens", "read_depth", "read_gap_bytes"])
def test_settings_tells_the_true_range(key: str) -> None:
    meaning = next(row[2] for row in table("settings.md", "| key | default | meaning |") if row[0] == f"`{key}`")
    found = re.search(r"(\d+) to (\d+)", meaning)
    assert found is not None
    low, high = int(found[1]), int(found[2])
    assert Config(**{key: low, "select_tokens": 1000}).to_dict()[key] == low
    assert Config(**{key: high, "select_tokens": 1000}).to_dict()[key] == high
    for value in (low - 1, high + 1):
        with pytest.raises(ConfigError):
            Config(**{key: value, "select_tokens": 1000})


def test_settings_examples_work(tmp_path: Path) -> None:
    (json_block,) = blocks("settings.md", "json")
    path = tmp_path / "config.json"
    path.write_text(json_block)
    assert Config.from_file(path).to_dict() == {**Config().to_dict(), **json.loads(json_block)}
    (python_block,) = blocks("settings.md", "python")
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


# ---- the command line page


def test_command_line_page_is_what_the_commands_say() -> None:
    specification = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert specification is not None and specification.loader is not None
    generate = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(generate)
    assert generate.page() == text("command-line.md"), "run: make docs"


def test_command_line_page_lists_every_option_with_its_default() -> None:
    section = text("command-line.md").split("## kvswap run\n", 1)[1].split("\n## ", 1)[0]
    rows = dict(re.findall(r"^\| `(--[\w-]+)(?: [^`]*)?`(?:, `-\w`)* \| (.*?) \|", section, re.MULTILINE))
    run = command_line.get_command(click.Context(command_line), "run")
    assert run is not None
    named = {next(name for name in parameter.opts if name.startswith("--")): parameter for parameter in run.params}
    assert list(rows) == list(named)
    for name, parameter in named.items():
        stated = rows[name].strip("`")
        if isinstance(parameter.default, str | int | float) and not isinstance(parameter.default, bool):
            assert stated == str(parameter.default)


def test_command_line_page_has_every_command() -> None:
    page = text("command-line.md")
    context = click.Context(command_line)
    for name in command_line.list_commands(context):
        assert f"\n## kvswap {name}\n" in page


def commands(page: Path) -> Iterator[list[str]]:
    """Commands of kvswap and of benchmarks that a page tells the reader to run, in blocks and in the text."""
    content = page.read_text(encoding="utf-8")
    in_blocks = "\n".join(re.findall(r"^```console\n(.*?)^```", content, re.MULTILINE | re.DOTALL))
    lines = re.findall(r"^\$ (.+)$", in_blocks.replace("\\\n", " "), re.MULTILINE)
    lines += re.findall(r"`((?:kvswap|python benchmarks/)[^`\n]* [^`\n]*)`", content)
    for line in lines:
        for words in re.split(r"\s(?=kvswap |python benchmarks/)", line.split(" #")[0].replace("...", "")):
            if re.match(r"(\.venv/bin/)?kvswap |python benchmarks/", words):
                yield shlex.split(words.strip().rstrip(")"))


def options_of(words: list[str]) -> set[str]:
    """All options that the command behind ``words`` has."""
    command: click.Command = command_line
    found = {option for parameter in command.params for option in parameter.opts}
    for word in words[1:]:
        if not isinstance(command, click.Group) or word.startswith("-"):
            break
        inner = command.get_command(click.Context(command), word)
        assert inner is not None, words
        command = inner
        found |= {option for parameter in command.params for option in parameter.opts}
    return found | {"--help", "--verbose"}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_commands_in_the_pages_exist(page: Path) -> None:
    for words in commands(page):
        given = {word.split("=")[0] for word in words[1:] if word.startswith("--") and word != "--"}
        if words[0] == "python":
            script = (ROOT / words[1]).read_text(encoding="utf-8")
            assert all(f'"{option}"' in script or option[2:] in script for option in given), words
        elif words[1].islower():  # COMMAND stands for any
            assert given <= options_of(words), words


def test_commands_are_found() -> None:
    found = {" ".join(words[:2]) for page in WRITTEN for words in commands(page)}
    assert {"kvswap run", "kvswap tune", "kvswap sessions", "python benchmarks/scale.py"} <= found
    assert len(found) > 15


# ---- links and pages


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """The site's builder checks links between its own pages; these also lead out of it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http", "#")):
            file = (page.parent / target.split("#")[0]).resolve()
            assert file.exists(), f"{page.name}: {target}"
            assert page.parent != DOCS or DOCS in file.parents, f"{page.name}: {target} is not on the site"


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"^ +- .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES]


def test_pictures_need_nothing_from_elsewhere() -> None:
    pages = {
        "decode-step.svg": "how-it-works.md",
        "peers-qwen05.svg": "benchmarks.md",
        "peers-smollm2.svg": "benchmarks.md",
    }
    names_of_formats = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    pictures = sorted((DOCS / "images").glob("*.svg"))
    assert [picture.name for picture in pictures] == sorted(pages)
    for picture in pictures:
        content = picture.read_text(encoding="utf-8")
        assert f"images/{picture.name}" in text(pages[picture.name])
        assert set(re.findall(r"https?://[^\"\s]+", content)) <= names_of_formats


# ---- the API page


def test_api_page_follows_what_is_exported() -> None:
    assert "\n::: kvswap\n" in text("api.md")
    overview = {
        name for _, names in table("api.md", "| to do what | names |") for name in re.findall(r"`(\w+)`", names)
    }
    assert set(kvswap.__all__) <= overview
    for name in kvswap.__all__:
        assert inspect.getdoc(getattr(kvswap, name)), f"{name} has no docstring"


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_python_in_the_pages_is_valid(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        compile(block, page.name, "exec")


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_words_that_were_replaced_stay_away(page: Path) -> None:
    """Private words that the trade has a word for; the changelog and the paper's own titles have none of them."""
    content = page.read_text(encoding="utf-8")
    for word in ("begin_anew", "give_up", "brain", "keeper", "configuration.md", "evaluation.md", "baselines/"):
        assert word not in content.lower(), word
