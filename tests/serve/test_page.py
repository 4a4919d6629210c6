"""The page and what it needs: its files, documents as text, and stored conversations."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import kvswap.serve
from tests.serve.conftest import STORY, Running, assistant, user

PAGE = Path(kvswap.serve.__file__).parent / "page"


def chat(served: Running, *messages: dict[str, str]) -> str:
    return (
        served.openai.chat.completions.create(model="tiny", messages=messages, max_tokens=4).choices[0].message.content
    )


def test_the_page_is_whole_and_loads_nothing_from_elsewhere(served: Running) -> None:
    html = served.http.get("/")
    assert (
        html.headers["content-type"].startswith("text/html")
        and "script-src 'self'" in html.headers["content-security-policy"]
    )
    for name in re.findall(r'(?:src|href)="(page\.\w+)"', html.text):
        assert served.http.get(f"/{name}").status_code == 200
    texts = {path.name: path.read_text() for path in PAGE.iterdir()}
    assert sum(text.count("\n") for text in texts.values()) < 1000
    assert not re.search(r"https?://|//cdn|@import|innerHTML", "".join(texts.values()))
    used = set(re.findall(r'\$\("([\w-]+)"\)', texts["page.js"]))
    assert used and used <= set(re.findall(r'id="([\w-]+)"', texts["index.html"]))


def test_documents_become_text(served: Running) -> None:
    found = served.http.post("/documents?name=a%2Fb.md", content=b"# Title\r\ntext")
    assert found.json() == {"name": "a_b.md", "text": "# Title\ntext"}
    for data in (b"", b"\xff\xfe\x00", b"%PDF-1.4 nothing"):
        assert served.http.post("/documents?name=x", content=data).status_code == 400


def test_stored_conversations_are_listed_read_forked_and_removed(served: Running) -> None:
    question = user(STORY + "Who counts?")
    answer = chat(served, question)
    (found,) = served.http.get("/conversations").json()["conversations"]
    assert (
        found["own"] and found["tokens"] > 1000 and found["disk_bytes"] > 0 and found["title"].endswith("Who counts?")
    )
    name = found["name"]
    assert served.http.get(f"/conversations/{name}").json()["messages"] == [question, assistant(answer)]
    fork = served.http.post(f"/conversations/{name}/fork").json()["name"]
    assert served.sessions() == sorted([name, fork])
    assert served.http.delete(f"/conversations/{name}").json()["deleted"]
    assert served.sessions() == [fork]
    used = served.openai.chat.completions.create(
        model="tiny", messages=[question, assistant(answer), user("And?")], max_tokens=2
    ).usage
    assert used.prompt_tokens - used.prompt_tokens_details.cached_tokens < 40 and served.sessions() == [fork]


@pytest.mark.parametrize("name", ["absent", "chat-absent", "..%2F..%2Fetc", "%00"])
def test_conversations_that_are_not_there(served: Running, name: str) -> None:
    assert served.http.get(f"/conversations/{name}").status_code in (400, 404)
    assert served.http.delete(f"/conversations/{name}").status_code in (400, 404)
    assert served.http.post(f"/conversations/{name}/fork").status_code in (400, 404)


def test_sessions_of_others_are_not_removed(served: Running, loaded) -> None:
    from kvswap.sessions.catalog import create_store

    create_store(str(served.kv_dir), "mine").close()
    assert served.http.delete("/conversations/mine").status_code == 400
    assert served.sessions() == ["mine"]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_a_user_drops_a_document_asks_opens_forks_deletes_and_stops(start) -> None:
    """The page's script with a stub of a document; it says nothing about how the page looks."""
    served = start(max_new_tokens=300)
    script = Path(__file__).with_name("page_in_node.js")
    command = ["node", str(script), str(PAGE / "page.js"), served.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["model"] == "tiny, up to 8,192 tokens" and seen["document"].startswith("story.md (1,500 characters")
    assert seen["answer"] and seen["opened"] == seen["answer"] and seen["cleared"] == 0
    assert re.match(r"Reading the prompt: 1,\d{3} of 1,\d{3} tokens", seen["reading"])
    assert " in, 0 of them from disk" in seen["numbers"] and "first token after" in seen["numbers"]
    assert re.search(r" in, 1,\d{3} of them from disk", seen["second"])
    assert seen["problem"] == ""
