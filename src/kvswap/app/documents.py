"""Read documents as text: plain text, Markdown and source code in UTF-8, and PDF with the extra ``pdf``.

Commands and the engine call ``read_document``. Any thread may call.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvswap.errors import InputError


@dataclass(frozen=True, slots=True)
class Document:
    """A text and its name; the model sees both."""

    name: str
    text: str


def read_document(path: str | Path) -> Document:
    """Read one document. Raises InputError when it cannot be read or has no text."""
    file = Path(path).expanduser()
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"document {path}: no such file", hint="check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"document {path}: a directory", hint="give the files in it one by one") from error
    except OSError as error:
        hint = "check its permissions and the disk"
        raise InputError(f"document {path}: cannot be read: {error.strerror}", hint=hint) from error
    text = _pdf_text(path, file) if data.startswith(b"%PDF-") else _plain_text(path, data)
    if not text.strip():
        raise InputError(f"document {path}: the file has no text in it", hint="give a document with text")
    return Document(file.name, text)


def _plain_text(path: str | Path, data: bytes) -> str:
    hint = "give a text file in UTF-8, or a PDF"
    if b"\0" in data:
        raise InputError(f"document {path}: a binary file, not text", hint=hint)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"document {path}: not UTF-8 text (byte {error.start:,})", hint=hint) from error


def _pdf_text(path: str | Path, file: Path) -> str:
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError as error:
        raise InputError(
            f"document {path}: reading PDF needs pypdf, which is not installed", hint="run: pip install 'kvswap[pdf]'"
        ) from error
    try:
        reader = PdfReader(file)
        pages = [page.extract_text() for page in reader.pages]
    except (PyPdfError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"document {path}: the PDF cannot be read: {error}", hint="convert it to text") from error
    text = "\n\n".join(page.strip() for page in pages)
    if not text.strip():
        raise InputError(
            f"document {path}: the PDF has pictures only and no text", hint="run text recognition (OCR) on it first"
        )
    return text
