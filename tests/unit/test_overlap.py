"""What of an evaluation text was trained on."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.builtin.text import heldout_text, training_documents
from surgery.errors import UsageError
from surgery.training import overlap as module
from surgery.training.overlap import overlap, refuse_overlap

ROOT = Path(__file__).resolve().parents[2]


def story(words: int, seed: int) -> str:
    """Sentences of invented words, none shared with another seed's but by chance."""
    chosen = random.Random(seed)
    return " ".join(f"{chosen.choice('bdklmt')}{chosen.choice('aeiou')}{chosen.randrange(500)}" for _ in range(words))


def by_brute_force(training: list[str], evaluation: str) -> float:
    """The definition: all runs of 24 words that begin with an anchor, as tuples."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        starts = [at for at in range(len(words) - 23) if zlib.crc32(words[at].encode()) % 4 == 0]
        return {tuple(words[at : at + 24]) for at in starts}

    wanted = runs(evaluation)
    return len(wanted & set().union(*map(runs, training))) / len(wanted)


@pytest.mark.parametrize("piece", [1, 23, 24, 25, 1 << 16])
def test_the_share_is_that_of_runs_from_anchors(piece, monkeypatch):
    monkeypatch.setattr(module, "PIECE", piece)
    evaluation = story(600, 1)
    copied = evaluation[1000:2500]
    training = [story(300, 2), story(200, 3) + " " + copied + " " + story(100, 4)]
    expected = by_brute_force(training, evaluation)
    assert 0.3 < expected < 0.6
    assert overlap(training, evaluation) == pytest.approx(expected)


def test_texts_that_share_nothing_do_not_overlap():
    assert overlap([story(5000, 1)], story(5000, 2)) == 0
    assert overlap([], story(100, 1)) == 0


@given(st.integers(0, 1000), st.integers(24, 400))
def test_a_whole_copy_is_found_whatever_surrounds_it(seed, words):
    evaluation = story(words, seed)
    around = f"{story(50, seed + 1)}\n{evaluation}\n{story(50, seed + 2)}"
    assert overlap([around], evaluation) == 1


def test_case_punctuation_and_line_breaks_do_not_count():
    plain = story(200, 1)
    dressed = "“" + plain.upper().replace(" ", ",\n ") + "!”"
    assert overlap([dressed], plain) == 1


def test_a_text_too_short_for_a_run_counts_as_a_whole():
    assert overlap(["He said: the quick, brown fox!"], "The quick brown fox.") == 1
    assert overlap(["He said: the quick brown foxes"], "The quick brown fox.") == 0
    assert overlap(["the quick red fox"], "The quick brown fox.") == 0
    assert overlap(["anything"], "") == overlap(["anything"], " ... ") == 0


def test_any_text_can_be_compared():
    assert overlap(["\ud800 " * 100], "\ud800x " * 100) == 0


def test_two_parts_of_a_corpus_pass_and_a_copied_fiftieth_does_not():
    evaluation = story(20_000, 1)
    honest = [story(20_000, 2), story(20_000, 3)]
    refuse_overlap(honest, evaluation, what="verify.text and data.text")
    at = len(evaluation) // 3
    copied = evaluation[at : at + len(evaluation) // 50]
    with pytest.raises(
        UsageError, match=r"^verify\.text and data\.text overlap: [12]\.\d* % of the evaluation"
    ) as caught:
        refuse_overlap([*honest, copied], evaluation, what="verify.text and data.text")
    assert caught.value.exit_code == 2
    refuse_overlap([*honest, copied], evaluation, what="verify.text and data.text", limit=0.05)


def test_the_parts_of_the_builtin_text_pass():
    refuse_overlap(training_documents(), heldout_text(), what="verify.text and data.text")


def test_comparing_does_not_wait_for_torch():
    code = "import sys, surgery.training.overlap; print(*sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == ""
