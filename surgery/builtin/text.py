"""Text that every CPython carries: what the built-in models learned, are calibrated and are judged on.

The documents are the reference topics behind ``help()`` (``pydoc_data.topics``) and, for each module of a fixed list,
its docstrings. Docstrings are read from the source through :mod:`ast`, so nothing is imported and no deprecated
module gets to warn. A document belongs to the held-out part by its name alone, so a document that was held out when
the weights were trained is held out under any other Python too. The wording itself follows the running Python:
the text is deterministic for one Python release, and differs a little between releases.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
import zlib
from functools import lru_cache
from pathlib import Path

__all__ = ["heldout_documents", "heldout_text", "training_documents", "training_text"]

# Pure-Python modules with at least a thousand characters of docstrings in every CPython from 3.10 to 3.13, without
# those that were removed in some version and without tkinter and turtle, which some distributions package apart.
MODULE_NAMES = """
__future__ _collections_abc _py_abc _pydecimal _pyio _strptime _threading_local abc argparse ast asyncio.base_events
asyncio.events asyncio.futures asyncio.locks asyncio.protocols asyncio.queues asyncio.runners asyncio.selector_events
asyncio.sslproto asyncio.staggered asyncio.streams asyncio.tasks asyncio.transports asyncio.unix_events base64 bdb
bisect bz2 calendar cmd code codecs codeop collections compileall concurrent.futures._base concurrent.futures.process
configparser contextlib copy csv ctypes curses.textpad dataclasses datetime dbm dbm.dumb difflib dis doctest
email._encoded_words email._header_value_parser email._parseaddr email._policybase email.base64mime email.charset
email.errors email.feedparser email.generator email.header email.headerregistry email.message email.mime.image
email.parser email.policy email.quoprimime email.utils enum filecmp fileinput fnmatch fractions ftplib functools
genericpath getopt getpass graphlib gzip heapq hmac html.parser http.client http.cookiejar http.cookies http.server
imaplib importlib._bootstrap importlib._bootstrap_external importlib.abc importlib.metadata
importlib.metadata._functools importlib.metadata._itertools importlib.metadata._text importlib.util inspect io
ipaddress json json.decoder json.encoder linecache locale logging logging.config logging.handlers lzma mailbox
mimetypes multiprocessing.connection multiprocessing.context multiprocessing.managers multiprocessing.pool
multiprocessing.process multiprocessing.shared_memory ntpath numbers operator optparse os pathlib pdb pickle
pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats py_compile pyclbr pydoc queue random re
rlcompleter runpy sched selectors shelve shutil site smtplib socket socketserver ssl statistics string subprocess
symtable sysconfig tarfile tempfile textwrap threading timeit tokenize trace traceback tracemalloc types typing
unittest unittest.case unittest.loader unittest.mock unittest.result urllib.parse urllib.request urllib.robotparser
uuid venv warnings wave weakref webbrowser wsgiref.handlers wsgiref.headers wsgiref.util wsgiref.validate
xml.dom.domreg xml.dom.expatbuilder xml.dom.minidom xml.etree.ElementTree xml.sax xml.sax._exceptions xml.sax.handler
xml.sax.saxutils xml.sax.xmlreader xmlrpc.client xmlrpc.server zipapp zipfile zipimport
"""

HELDOUT_ONE_IN = 10
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
SHORTEST_REPEAT = 40  # a shorter paragraph ("Example:") may come back as often as it likes


def training_text() -> str:
    """Return everything the built-in models were trained on, as one string; also what ``builtin`` calibrates on."""
    return "\n\n".join(training_documents())


def heldout_text() -> str:
    """Return the text that no built-in model has seen: what an honest perplexity is measured on."""
    return "\n\n".join(heldout_documents())


def training_documents() -> tuple[str, ...]:
    """Return the documents of :func:`training_text`, in their fixed order."""
    return tuple(text for name, text in _documents() if not _is_heldout(name))


def heldout_documents() -> tuple[str, ...]:
    """Return the documents of :func:`heldout_text`, in their fixed order."""
    return tuple(text for name, text in _documents() if _is_heldout(name))


def _is_heldout(name: str) -> bool:
    """Say whether the document called ``name`` is held out; a checksum decides, so other documents never matter."""
    return zlib.crc32(name.encode()) % HELDOUT_ONE_IN == 0


@lru_cache(maxsize=1)
def _documents() -> tuple[tuple[str, str], ...]:
    """Return (name, text) of every document: topics, then modules, both sorted, no long paragraph twice."""
    from pydoc_data.topics import topics  # half a megabyte, only worth loading when the text is asked for

    raw = [(f"topic {topic}", topics[topic]) for topic in sorted(topics)]
    raw += [(f"module {module}", _module_docstrings(module)) for module in sorted(MODULE_NAMES.split())]
    # Training documents claim their paragraphs first, so that a copy is lost to the held-out part, never leaked by it.
    raw.sort(key=lambda document: _is_heldout(document[0]))
    seen: set[str] = set()
    documents = [(name, _without_repeats(_clean(text), seen)) for name, text in raw]
    return tuple((name, text) for name, text in documents if text)


def _module_docstrings(module: str) -> str:
    """Return all docstrings of a standard module in source order; empty where this Python lacks its source."""
    stem = Path(sysconfig.get_path("stdlib"), *module.split("."))
    sources = [path for path in (stem.with_name(stem.name + ".py"), stem / "__init__.py") if path.is_file()]
    if not sources:
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a newer parser thinks of the library is no concern of our caller
        tree = ast.parse(sources[0].read_bytes())
    documented = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    documented.sort(key=lambda node: getattr(node, "lineno", 0))  # only a module has no line: it comes first
    return "\n\n".join(filter(None, map(ast.get_docstring, documented)))


def _clean(text: str) -> str:
    """Make every white space a space or a single blank line, and drop control characters."""
    spaced = re.sub(r"[^\S\n]", " ", text.expandtabs(4))
    printable = re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "", spaced)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +$", "", printable, flags=re.MULTILINE)).strip("\n")


def _without_repeats(text: str, seen: set[str]) -> str:
    """Drop the long paragraphs already in ``seen`` and add the others to it."""
    kept = []
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split())
        if len(key) < SHORTEST_REPEAT or key not in seen:
            kept.append(paragraph)
            seen.add(key)
    # A document left with nothing but short paragraphs is the shell of a repeated one.
    return "\n\n".join(kept) if any(len(paragraph) >= SHORTEST_REPEAT for paragraph in kept) else ""
