"""Documents become text, or an error that says what to do. Mistakes are tested through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    with pytest.raises(InputError, match="the PDF cannot be read"):
        read_document(file)
