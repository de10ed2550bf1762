"""How much of an evaluation text was trained on, found by sampled runs of words. Imports no torch.

A run is 24 words from an anchor on; a word is an anchor by its own checksum alone, one word in four on average. So a
copied passage brings its anchors along, and is found whatever surrounds it. Memory follows the evaluation text and the
longest document.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from hashlib import blake2b
from itertools import islice

from surgery.errors import UsageError

RUN = 24
ONE_IN = 4
# Above what chance and quotations give (0 between parts of a corpus of stories, 0.6 % between the parts of `builtin`),
# below what is found where 2 % was copied (at least 1.2 % in 300 draws).
LIMIT = 0.01
# Words looked at together.
PIECE = 1 << 16

_WORD = re.compile(r"\w+")


def overlap(training: Iterable[str], evaluation: str) -> float:
    """The share of the evaluation text, from 0 to 1, that stands in the training text too.

    Case, punctuation and line breaks do not count. A text too short for a run counts only as a whole.
    """
    wanted = set(_runs(evaluation))
    if not wanted:
        whole = _normalized(evaluation)
        return float(bool(whole.strip()) and any(whole in _normalized(document) for document in training))
    missing = set(wanted)
    for document in training:
        missing.difference_update(_runs(document))
    return 1 - len(missing) / len(wanted)


def refuse_overlap(training: Iterable[str], evaluation: str, *, what: str, limit: float = LIMIT) -> None:
    """Raise UsageError where more than `limit` of the evaluation text is trained on; `what` names the two settings."""
    share = overlap(training, evaluation)
    if share > limit:
        raise UsageError(
            f"{what} overlap: {100 * share:.3g} % of the evaluation text is in the training text",
            cause="a model that has seen a text is no longer measured by it",
            remedy="name another file, or split this one so that the two parts share nothing",
        )


def _runs(text: str) -> Iterator[bytes]:
    """Hashes of the runs of a text."""
    found = _WORD.finditer(text.lower())
    words: list[str] = []
    while piece := [match[0] for match in islice(found, PIECE)]:
        words += piece
        for at in [at for at, word in enumerate(words[: 1 - RUN]) if _is_anchor(word)]:
            yield blake2b(" ".join(words[at : at + RUN]).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        words = words[1 - RUN :]


@lru_cache(maxsize=1 << 17)
def _is_anchor(word: str) -> bool:
    return zlib.crc32(word.encode("utf-8", "surrogatepass")) % ONE_IN == 0


def _normalized(text: str) -> str:
    """The words with a space on either side of each."""
    return f" {' '.join(_WORD.findall(text.lower()))} "
