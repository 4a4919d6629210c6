"""Read documents as text: plain text, Markdown and source code in UTF-8, and PDF with the extra ``pdf``.

Commands and the engine call ``read_document``. Whatever a file contains, it gives text that can be encoded in UTF-8, or
an InputError. Any thread may call.
"""

from __future__ import annotations

import io
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvswap.disk.folders import user_path
from kvswap.errors import InputError
from kvswap.units import MIB, format_bytes

LIMIT_BYTES = 256 * MIB
"""Longest file that is read. A million tokens of text have about 4 MiB."""
_PAGE_BREAK = "\n\n"
_HEAD_BYTES = 1024
"""A PDF may have other bytes before its header, as far as this."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text and its name; the model sees both. ``pages`` are the characters at which pages begin, if there are any."""

    name: str
    text: str
    pages: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Span:
    """Where a document is in the text of a message: characters ``[start, stop)``.

    ``pages`` are counted from ``start``; ``first_line`` is the line of the document that ``start`` is in, from 1.
    """

    name: str
    start: int
    stop: int
    pages: tuple[int, ...] = ()
    first_line: int = 1

    @classmethod
    def of(cls, document: Document, start: int) -> Span:
        """A document whose text, without blanks around it, begins at ``start``."""
        text = document.text.strip()
        skipped = document.text.index(text)
        pages = tuple(max(0, page - skipped) for page in document.pages)
        return cls(document.name, start, start + len(text), pages, 1 + document.text.count("\n", 0, skipped))


def read_document(path: str | Path) -> Document:
    """Read one document. Raises InputError when it cannot be read or has no text."""
    file = user_path(path)
    try:
        with file.open("rb") as stream:
            data = stream.read(LIMIT_BYTES + 1)
    except FileNotFoundError as error:
        raise InputError(f"document {path}: no such file", hint="check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"document {path}: a directory", hint="give the files in it one by one") from error
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = getattr(error, "strerror", None) or error
        hint = "check its path, its permissions and the disk"
        raise InputError(f"document {path}: cannot be read: {reason}", hint=hint) from error
    return decode_document(path, data)


def decode_document(path: str | Path, data: bytes) -> Document:
    """A document from the bytes of its file; ``path`` names it. Raises InputError as ``read_document`` does."""
    if len(data) > LIMIT_BYTES:
        hint = "split it, or convert it to plain text"
        raise InputError(f"document {path}: longer than {format_bytes(LIMIT_BYTES)}", hint=hint)
    text, pages = _pdf_text(path, data) if _is_pdf(data) else (_plain_text(path, data), ())
    if not text.strip():
        raise InputError(f"document {path}: the file has no text in it", hint="give a document with text")
    return Document(_encodable(Path(path).name), text, pages)


def _is_pdf(data: bytes) -> bool:
    """Whether a file is a PDF, also one with other bytes before its header. A text that mentions the header is none."""
    start = data.find(b"%PDF-", 0, _HEAD_BYTES)
    if start <= 0:
        return start == 0
    if b"%%EOF" in data[-_HEAD_BYTES:]:
        return True
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return b"\0" in data


def _plain_text(path: str | Path, data: bytes) -> str:
    hint = "give a text file in UTF-8, or a PDF"
    if b"\0" in data:
        raise InputError(f"document {path}: a binary file, not text", hint=hint)
    try:
        return _plain_line_ends(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"document {path}: not UTF-8 text (byte {error.start:,})", hint=hint) from error


def _pdf_text(path: str | Path, data: bytes) -> tuple[str, tuple[int, ...]]:
    """The text of a PDF, and the characters at which its pages begin."""
    try:
        from pypdf import PdfReader
        from pypdf.errors import DependencyError, FileNotDecryptedError
    except ImportError as error:
        raise InputError(
            f"document {path}: reading PDF needs pypdf, which is not installed", hint="run: pip install 'kvswap[pdf]'"
        ) from error
    data = data[data.index(b"%PDF-") :]
    try:
        with _quiet_pypdf():
            pages = [
                _encodable(_plain_line_ends(page.extract_text())).strip() for page in PdfReader(io.BytesIO(data)).pages
            ]
    except FileNotDecryptedError as error:
        hint = "remove the password, for example by printing it to a new PDF"
        raise InputError(f"document {path}: the PDF is locked with a password", hint=hint) from error
    except DependencyError as error:
        raise InputError(
            f"document {path}: the PDF is encrypted, and reading it needs cryptography, which is not installed",
            hint="run: pip install 'kvswap[pdf,encryption]'",
        ) from error
    except Exception as error:
        # A damaged or unusual PDF can raise anything in pypdf: it reads what strangers made.
        reason = str(error) or type(error).__name__
        raise InputError(f"document {path}: the PDF cannot be read: {reason}", hint="convert it to text") from error
    text = _PAGE_BREAK.join(pages)
    if not text.strip():
        raise InputError(
            f"document {path}: the PDF has pictures only and no text", hint="run text recognition (OCR) on it first"
        )
    starts = itertools.accumulate((len(page) + len(_PAGE_BREAK) for page in pages[:-1]), initial=0)
    return text, tuple(starts)


@contextmanager
def _quiet_pypdf() -> Iterator[None]:
    """Keep pypdf's remarks about faults that it got over from the terminal."""
    logger = logging.getLogger("pypdf")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _plain_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _encodable(text: str) -> str:
    """The text with whole characters: two surrogates that belong together are joined, a lone one becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
