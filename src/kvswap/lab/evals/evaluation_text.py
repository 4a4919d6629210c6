"""The text that evaluations and benchmarks run on: the user's documents, or Python's own documentation.

The latter is the language reference and the docstrings of the standard library. Every installation of Python has them,
so no download is needed. No text here was calibrated on: docstrings with more than 5 % of their lines in the
calibration half of ``core.corpus`` are left out, and such documents are refused.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from kvswap.app.documents import Document
from kvswap.core.corpus import LARGEST_OVERLAP, calibration_topics, evaluation_topics, lines, overlap
from kvswap.errors import InputError

# Modules of the standard library with long docstrings.
# fmt: off
MODULES = (
    "argparse", "abc", "ast", "asyncio/base_events", "asyncio/events", "bdb", "calendar", "cmd", "code", "codecs",
    "collections/__init__", "concurrent/futures/_base", "configparser", "contextlib", "copy", "csv", "ctypes/util",
    "datetime", "decimal", "difflib", "dis", "doctest", "email/message", "email/header", "enum", "filecmp",
    "fileinput", "fractions", "ftplib", "functools", "getpass", "gettext", "glob", "gzip", "heapq", "hmac",
    "html/parser", "http/client", "http/cookiejar", "http/server", "imaplib", "inspect", "ipaddress",
    "json/__init__", "linecache", "locale", "logging/__init__", "logging/config", "mailbox", "mimetypes",
    "multiprocessing/managers", "nntplib", "ntpath", "numbers", "optparse", "os", "pathlib", "pdb", "pickle",
    "pickletools", "pkgutil", "platform", "plistlib", "poplib", "posixpath", "pprint", "profile", "pstats", "pydoc",
    "queue", "random", "re", "sched", "selectors", "shelve", "shlex", "shutil", "smtplib", "socket", "socketserver",
    "ssl", "statistics", "string", "subprocess", "tarfile", "telnetlib", "tempfile", "textwrap", "threading",
    "timeit", "tokenize", "traceback", "turtle", "types", "typing", "unittest/case", "unittest/mock",
    "urllib/parse", "urllib/request", "uuid", "warnings", "wave", "weakref", "webbrowser", "xml/dom/minidom",
    "xml/etree/ElementTree", "xmlrpc/client", "zipfile", "zipfile/__init__",
)
# fmt: on
SHORTEST_DOCSTRING = 200
"""Characters; shorter docstrings are left out."""


def evaluation_text(documents: Sequence[Document] = (), seed: int = 0) -> list[tuple[str, str]]:
    """Return names and texts: the documents in their order; without any, topics and docstrings shuffled by ``seed``.

    The two are never mixed, so that a result is of one kind of text. Raises InputError for a document that overlaps
    the calibration text.
    """
    seen = _calibrated()
    for document in documents:
        share = overlap(document.text, seen)
        if share > LARGEST_OVERLAP:
            raise InputError(
                f"document {document.name}: {share:.0%} of its lines are in the calibration text",
                hint="give a document that is not part of the calibration text",
            )
    if documents:
        return [(document.name, document.text) for document in documents]
    found = evaluation_topics() + docstrings()
    random.Random(seed).shuffle(found)
    return found


@cache
def docstrings() -> list[tuple[str, str]]:
    """Return names and docstrings of the standard library's modules, without text that was calibrated on."""
    library, seen = Path(sysconfig.get_path("stdlib")), _calibrated()
    found = []
    for name in MODULES:
        path = library / f"{name}.py"
        if path.is_file():
            text = "\n\n".join(module_docstrings(path.read_text(encoding="utf-8")))
            if text and overlap(text, seen) <= LARGEST_OVERLAP:
                found.append((name.replace("/", "."), text))
    return found


def module_docstrings(source: str) -> list[str]:
    """Return the longer docstrings of a module, its classes and functions, outer ones first, without duplicates."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    texts = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return list(dict.fromkeys(text for text in texts if len(text) >= SHORTEST_DOCSTRING))


@cache
def _calibrated() -> set[str]:
    """Lines of the calibration text."""
    return {line for _, text in calibration_topics() for line in lines(text)}
