"""Documents become text, or an error that says what to do. Mistakes are tested through the command line."""

from __future__ import annotations

import io
import os
import re
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvswap.app import documents
from kvswap.app.documents import Document, read_document
from kvswap.errors import InputError


def pdf(text: str) -> bytes:
    """The smallest PDF of one page; empty ``text`` makes a page without any."""
    stream = f"BT /F1 24 Tf 72 700 Td ({text}) Tj ET" if text else ""
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        " /Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
    ]
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    tail = f"xref\n0 5\n0000000000 65535 f \n{table}trailer\n<< /Size 5 /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n"
    return data + tail.encode()


def test_text_keeps_its_characters_and_gets_plain_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "né.md"
    file.write_bytes("\ufeff# Título\r\n\r\n…\n".encode())
    assert read_document(str(file)) == Document("né.md", "# Título\n\n…\n")


def test_pdf_gives_its_text(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    file = tmp_path / "a.pdf"
    file.write_bytes(pdf("It is decided."))
    assert read_document(file).text.strip() == "It is decided."


def test_pdf_without_text_and_damaged_pdf(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    file = tmp_path / "a.pdf"
    file.write_bytes(pdf(""))
    with pytest.raises(InputError, match="pictures only and no text"):
        read_document(file)
    file.write_bytes(pdf("x")[:60])
    with pytest.raises(InputError, match=r"the PDF cannot be read"):
        read_document(file)


# ---- PDFs that are not as they should be


def locked_pdf(algorithm: str, password: str = "") -> bytes:
    """A PDF that pypdf encrypted; with an empty password every reader opens it."""
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf("It is decided.")))
    writer.encrypt(password, "owner", algorithm=algorithm)
    target = io.BytesIO()
    writer.write(target)
    return target.getvalue()


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], str]:
    """The text of a document with this content. Also sees to it that pypdf's logger says nothing."""

    def call(data: bytes, name: str = "a.pdf") -> str:
        file = tmp_path / name
        file.write_bytes(data)
        return read_document(file).text

    return call


@pytest.mark.parametrize("algorithm", ["RC4-40", "RC4-128", "AES-128", "AES-256"])
def test_encrypted_pdf_opens_where_it_needs_no_password(algorithm: str, read) -> None:
    pytest.importorskip("cryptography")
    assert read(locked_pdf(algorithm)).strip() == "It is decided."
    with pytest.raises(InputError, match="locked with a password; remove"):
        read(locked_pdf(algorithm, "secret"))


def test_encrypted_pdf_without_cryptography_says_what_to_install(read, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography")
    data = locked_pdf("AES-128")
    encryption = pytest.importorskip("pypdf._encryption")
    from pypdf._crypt_providers import _fallback

    for name in ("CryptAES", "CryptRC4", "aes_cbc_decrypt", "aes_cbc_encrypt", "aes_ecb_decrypt", "rc4_decrypt"):
        if hasattr(encryption, name) and hasattr(_fallback, name):
            monkeypatch.setattr(encryption, name, getattr(_fallback, name))
    with pytest.raises(InputError, match=r"needs cryptography.*pip install 'kvswap\[pdf,encryption\]'"):
        read(data)


def test_pdf_with_an_unknown_encryption_is_an_error_that_says_so(read) -> None:
    pytest.importorskip("cryptography")
    data = re.sub(rb"/V \d", b"/V 9", locked_pdf("AES-128"))
    assert b"/V 9" in data
    with pytest.raises(InputError, match=r"the PDF cannot be read: .*; convert it to text"):
        read(data)


@pytest.mark.parametrize("before", [b"\n", b"\xef\xbb\xbf", b"HTTP/1.1 200 OK\r\n\r\n", b"\0" * 500, b"\xff" * 1000])
def test_bytes_before_a_pdf_are_passed_over(before: bytes, read) -> None:
    pytest.importorskip("pypdf")
    assert read(before + pdf("It is decided.")).strip() == "It is decided."


def test_text_about_pdfs_is_text(read) -> None:
    text = "A PDF begins with %PDF-1.7.\n"
    assert read(text.encode(), "a.md") == text


def test_pdf_gives_whole_characters_and_plain_line_ends(read, monkeypatch: pytest.MonkeyPatch) -> None:
    pypdf = pytest.importorskip("pypdf")
    odd = "a\ud800b \ud83d\ude00\r\nc\rd"
    monkeypatch.setattr(pypdf.PageObject, "extract_text", lambda self: odd)
    assert read(pdf("x")) == "a\ufffdb \U0001f600\nc\nd"


# ---- other files


def test_line_ends_of_every_system_become_plain(read) -> None:
    assert read(b"one\r\ntwo\rthree\nfour\r\r\n", "a.txt") == "one\ntwo\nthree\nfour\n\n"


def test_names_that_are_not_utf8_become_whole_characters(tmp_path: Path) -> None:
    file = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    with open(file, "w") as stream:
        stream.write("x")
    assert read_document(os.fsdecode(file)).name == "caf\ufffd.txt"


@pytest.mark.parametrize("path", ["~no-such-user-of-ours/a.txt", "a\0b", "\ud800", "x" * 5000])
def test_paths_that_no_file_can_have(path: str) -> None:
    with pytest.raises(InputError):
        read_document(path)


def test_files_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LIMIT_BYTES", 1 << 20)
    with pytest.raises(InputError, match=r"/dev/zero: longer than 1\.0 MiB; split it"):
        read_document("/dev/zero")


def test_pipes_are_read_once(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(pdf("It is decided."),))
    writer.start()
    assert read_document(tmp_path / "pipe").text.strip() == "It is decided."
    writer.join()


# ---- whatever a file contains


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """Bytes, texts in some encoding, and PDFs with changes."""
    kind = draw(st.sampled_from(["bytes", "text", "pdf", "rc4", "aes"]))
    if kind == "bytes":
        return draw(st.binary(max_size=200))
    if kind == "text":
        text = draw(st.text(st.characters(), max_size=100))
        return text.encode(draw(st.sampled_from(["utf-8", "utf-16", "utf-8-sig", "utf-32"])), "surrogatepass")
    data = bytearray(SAMPLES[kind])
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data) - 1))
        size = draw(st.sampled_from([0, 1, 4, 40]))
        data[start : start + size] = draw(
            st.binary(max_size=6) | st.sampled_from([b"/V 9", b"99999999", b"-1", b"/Kids [2 0 R]", b"<</Type", b"\r"])
        )
        if not data:
            break
    return draw(st.sampled_from([b"", b"", b"\n", b"\xff\0junk"])) + bytes(data)


SAMPLES: dict[str, bytes] = {}


def fuzz(cases: int) -> None:
    pytest.importorskip("pypdf")
    pytest.importorskip("cryptography")
    SAMPLES.update(pdf=pdf("It is decided."), rc4=locked_pdf("RC4-128"), aes=locked_pdf("AES-256"))

    @settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck))
    @given(contents())
    def any_content(data: bytes) -> None:
        with tempfile.NamedTemporaryFile(suffix=".txt") as file:
            file.write(data)
            file.flush()
            try:
                document = read_document(file.name)
            except InputError as error:
                assert error.hint and str(error).startswith(f"document {file.name}: ")
            else:
                assert document.text.strip() and "\r" not in document.text
                document.text.encode()

    any_content()


def test_any_content_is_text_or_a_clear_error(capfd: pytest.CaptureFixture[str]) -> None:
    fuzz(150)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_any_content_is_text_or_a_clear_error_2000_times() -> None:
    fuzz(2_000)
