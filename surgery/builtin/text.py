"""Text that every CPython carries: what the built-in models learned, are calibrated and are judged on.

The documents are the reference topics behind ``help()`` (``pydoc_data.topics``) and, for each module of a fixed list,
its docstrings. Docstrings are read from the source through :mod:`ast`, so nothing is imported and no deprecated
module gets to warn. A document belongs to the held-out part by its name alone, so a document that was held out when
the weights were trained is held out under any other Python too. The wording itself follows the running Python:
the text is deterministic for one Python release, and differs a little between releases.

That prose is the domain ``docs``, and what every function means unless it is told another. Two more let a model learn
to tell kinds of text apart: ``code`` is the source of the same modules without docstrings and comments, held out with
them, and ``records`` is invented by a seeded generator: JSON objects, tables, logs, sums and sequences.
"""

from __future__ import annotations

import ast
import json
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from random import Random

__all__ = ["DOMAINS", "heldout_documents", "heldout_text", "training_documents", "training_text"]

DOMAINS = ("docs", "code", "records")

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
RECORD_DOCUMENTS, BLOCKS, BLOCK_LINES = 400, 6, 12
FIRST_NAMES = "Ada Boris Carmen Dieter Elif Farid Greta Hugo Ines Jonas Keiko Lars Mara Nils Olga Pavel Rosa Tariq"
LAST_NAMES = "Abara Berg Costa Duarte Eklund Fischer Garcia Haddad Ito Jansen Kovacs Lopez Moreau Novak Okafor Petrov"
CITIES = """Oslo:Norway Bergen:Norway Lyon:France Paris:France Kyoto:Japan Osaka:Japan Lima:Peru Cusco:Peru Accra:Ghana
Porto:Portugal Lisbon:Portugal Cairo:Egypt Turin:Italy Milan:Italy Quito:Ecuador Hanoi:Vietnam"""
PRICES = "apple:2 bread:3 candle:5 desk:90 engine:700 fork:4 guitar:250 hammer:18 jacket:60 lamp:35 mirror:45 radio:80"
WORKERS = "alpha beta gamma delta epsilon"
SHORTEST_REPEAT = 40  # a shorter paragraph ("Example:") may come back as often as it likes


def training_text(domain: str = "docs") -> str:
    """Return all of a domain that built-in models learned from, as one string; ``builtin`` calibrates on ``docs``."""
    return "\n\n".join(training_documents(domain))


def heldout_text(domain: str = "docs") -> str:
    """Return the text of a domain that no built-in model has seen: what an honest perplexity is measured on."""
    return "\n\n".join(heldout_documents(domain))


def training_documents(domain: str = "docs") -> tuple[str, ...]:
    """Return the documents of :func:`training_text`, in their fixed order."""
    return tuple(text for name, text in _documents(domain) if not _is_heldout(name))


def heldout_documents(domain: str = "docs") -> tuple[str, ...]:
    """Return the documents of :func:`heldout_text`, in their fixed order."""
    return tuple(text for name, text in _documents(domain) if _is_heldout(name))


def _is_heldout(name: str) -> bool:
    """Say whether the document called ``name`` is held out; a checksum decides, so other documents never matter."""
    return zlib.crc32(name.encode()) % HELDOUT_ONE_IN == 0


@lru_cache(maxsize=len(DOMAINS))
def _documents(domain: str) -> tuple[tuple[str, str], ...]:
    """Return (name, text) of every document of a domain in its order, with no long paragraph twice."""
    raw = {"docs": _docs, "code": _code, "records": _records}[domain]()
    # Training documents claim their paragraphs first, so that a copy is lost to the held-out part, never leaked by it.
    raw.sort(key=lambda document: _is_heldout(document[0]))
    seen: set[str] = set()
    documents = [(name, _without_repeats(_clean(text), seen)) for name, text in raw]
    return tuple((name, text) for name, text in documents if text)


def _docs() -> list[tuple[str, str]]:
    """Return the reference topics, then the docstrings of the modules, both sorted."""
    from pydoc_data.topics import topics  # half a megabyte, only worth loading when the text is asked for

    raw = [(f"topic {topic}", topics[topic]) for topic in sorted(topics)]
    return raw + [(f"module {module}", _module_docstrings(module)) for module in sorted(MODULE_NAMES.split())]


def _code() -> list[tuple[str, str]]:
    """Return the bare code of the modules, sorted."""
    return [(f"module {module}", _module_code(module)) for module in sorted(MODULE_NAMES.split())]


def _module_docstrings(module: str) -> str:
    """Return all docstrings of a standard module in source order; empty where this Python lacks its source."""
    documented = [node for node in _statements(_module_tree(module)) if isinstance(node, DOCUMENTED)]
    documented.sort(key=lambda node: getattr(node, "lineno", 0))  # only a module has no line: it comes first
    return "\n\n".join(filter(None, map(ast.get_docstring, documented)))


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Every statement and block of a module, in no order; its expressions too would take twice as long as parsing."""
    blocks: list[ast.AST] = [tree]
    while blocks:
        yield (node := blocks.pop())
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            blocks += getattr(node, part, ())


def _module_code(module: str) -> str:
    """Return the source of a standard module as Python itself writes it: no comments, and no docstrings."""
    tree = _module_tree(module)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body[0] = ast.Pass()
            node.body = node.body[1:] or node.body
    return ast.unparse(tree)


def _module_tree(module: str) -> ast.Module:
    """Return the parsed source of a standard module; an empty one where this Python lacks its source."""
    stem = Path(sysconfig.get_path("stdlib"), *module.split("."))
    sources = [path for path in (stem.with_name(stem.name + ".py"), stem / "__init__.py") if path.is_file()]
    if not sources:
        return ast.Module([], [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a newer parser thinks of the library is no concern of our caller
        return ast.parse(sources[0].read_bytes())


def _records() -> list[tuple[str, str]]:
    """Return the invented documents; each is a few blocks of lines of one kind, and depends on its number alone."""
    kinds = (_people, _orders, _log, _sums, _sequences)
    documents = []
    for number in range(RECORD_DOCUMENTS):
        draw = Random(number)  # noqa: S311 - no secret
        blocks = [kinds[_between(draw, 0, len(kinds) - 1)](draw) for _ in range(BLOCKS)]
        documents.append((f"records {number}", "\n\n".join("\n".join(lines) for lines in blocks)))
    return documents


def _between(draw: Random, low: int, high: int) -> int:
    """Draw a whole number, both ends included; only ``random()`` promises the same results in every Python."""
    return low + int(draw.random() * (high - low + 1))


def _pick(draw: Random, words: str) -> str:
    """Draw one of the words."""
    choices = words.split()
    return choices[_between(draw, 0, len(choices) - 1)]


def _people(draw: Random) -> list[str]:
    """Invent JSON objects with numbers that count up, a country that follows the city and an age the birth."""
    start = _between(draw, 1000, 9000)
    lines = []
    for number in range(start, start + BLOCK_LINES):
        city, country = _pick(draw, CITIES).split(":")
        born = _between(draw, 1940, 2009)
        person = {"id": number, "name": f"{_pick(draw, FIRST_NAMES)} {_pick(draw, LAST_NAMES)}", "city": city}
        person |= {"country": country, "born": born, "age": 2025 - born, "member": born % 2 == 0}
        lines.append(json.dumps(person))
    return lines


def _orders(draw: Random) -> list[str]:
    """Invent a table whose dates rise, whose prices belong to their items and whose totals are right."""
    year, day = _between(draw, 1990, 2024), _between(draw, 0, 300)
    lines = ["date,item,quantity,price,total"]
    for _ in range(BLOCK_LINES):
        day += _between(draw, 0, 2)
        (item, price), quantity = _pick(draw, PRICES).split(":"), _between(draw, 1, 9)
        lines.append(f"{year}-{day // 28 + 1:02}-{day % 28 + 1:02},{item},{quantity},{price},{quantity * int(price)}")
    return lines


def _log(draw: Random) -> list[str]:
    """Invent the log of workers: its clock rises, and a job ends with the worker that started it."""
    clock, job = _between(draw, 0, 80000), _between(draw, 100, 900)
    running: list[tuple[str, int]] = []
    lines = []
    for _ in range(BLOCK_LINES):
        clock += _between(draw, 1, 9)
        stamp = f"[{clock // 3600:02}:{clock // 60 % 60:02}:{clock % 60:02}]"
        if len(running) == 3 or (running and draw.random() < 0.4):
            worker, started = running.pop(0)
            lines.append(f"{stamp} INFO {worker}: finished job {started} ({_pick(draw, 'ok ok ok failed')})")
        else:
            job += 1
            running.append((_pick(draw, WORKERS), job))
            lines.append(f"{stamp} INFO {running[-1][0]}: started job {job}")
    return lines


def _sums(draw: Random) -> list[str]:
    """Invent sums, differences and products of small numbers, all of them right."""
    lines = []
    for _ in range(BLOCK_LINES):
        sign, first, second = _pick(draw, "+ - *"), _between(draw, 2, 60), _between(draw, 2, 12)
        result = {"+": first + second, "-": first - second, "*": first * second}[sign]
        lines.append(f"{first} {sign} {second} = {result}")
    return lines


def _sequences(draw: Random) -> list[str]:
    """Invent sequences with a constant step, which their lines begin with."""
    lines = []
    for _ in range(BLOCK_LINES):
        start, step = _between(draw, 0, 40), _between(draw, 1, 12)
        lines.append(f"step {step}: " + " ".join(str(start + step * at) for at in range(10)))
    return lines


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
