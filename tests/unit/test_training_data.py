"""Token windows on disk, and the order in which training takes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import surgery
from surgery.calibration import text as calibration_text
from surgery.calibration.text import sampled_windows
from surgery.errors import CorruptCheckpoint, UsageError
from surgery.manifest import Calibration
from surgery.progress import silent
from surgery.training import data
from surgery.training.data import open_corpus, pack_corpus, rows_of, shuffled, write_self

WORDS = [f"w{number}" for number in range(60)]
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %} {{ m.role }} {{ m.content }}{% endfor %}"


def small_tokenizer(*, bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """A word is a token: <unk> 0, <s> 1, </s> 2, user 3, assistant 4, then w0, w1, ..."""
    words = ["<unk>", "<s>", "</s>", "user", "assistant", *WORDS]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>"} | ({"eos_token": "</s>"} if eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=CHAT_TEMPLATE, **names)


def corpus_of(folder: Path, documents, tokenizer=None, **changed):
    settings = {"length": 8, "tokens": None, "heldout": 0.25, "seed": 0, **changed}
    return pack_corpus(iter(documents), tokenizer or small_tokenizer(), folder=folder, **settings)


def texts(count: int, seed: int = 0) -> list[str]:
    """Documents of 1 to 12 words."""
    chosen = np.random.default_rng(seed)
    return [" ".join(chosen.choice(WORDS, chosen.integers(1, 13))) for _ in range(count)]


def is_held_out(document: str, share: float, seed: int) -> bool:
    digest = hashlib.blake2b(f"{seed}:{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < share


def packed(documents: list[str], length: int, *, bos: bool = True, eos: bool = True) -> list[list[int]]:
    """Windows by the definition: everything in one row, cut."""
    row: list[int] = []
    for document in documents:
        row += [1] * bos + [5 + WORDS.index(word) for word in document.split()] + [2] * eos
    return [row[at : at + length] for at in range(0, len(row) - length + 1, length)]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_documents_are_joined_and_cut(bos, eos, tmp_path):
    documents = texts(500)
    corpus = corpus_of(tmp_path, documents, small_tokenizer(bos=bos, eos=eos), seed=3)
    kept = [document for document in documents if not is_held_out(document, 0.25, 3)]
    held = [document for document in documents if is_held_out(document, 0.25, 3)]
    assert corpus.train.tolist() == packed(kept, 8, bos=bos, eos=eos)
    assert corpus.heldout.tolist() == packed(held, 8, bos=bos, eos=eos)
    assert corpus.train.dtype == corpus.heldout.dtype == torch.int32
    assert 0.2 < len(held) / len(documents) < 0.3
    assert corpus.provenance["train"]["documents"] == len(kept)
    assert corpus.provenance["heldout"]["documents"] == len(held)


@settings(max_examples=25)
@given(st.integers(0, 100), st.integers(1, 30), st.integers(1, 3000), st.sampled_from([0.1, 0.25, 0.5]))
def test_reading_stops_when_there_is_enough(tmp_path_factory, seed, length, tokens, share):
    documents = texts(600, seed)
    asked = []
    settings = {"length": length, "tokens": tokens, "heldout": share, "seed": seed}
    stream = (asked.append(document) or document for document in documents)
    corpus = pack_corpus(stream, small_tokenizer(), folder=tmp_path_factory.mktemp("corpus"), **settings)
    kept = packed([document for document in documents if not is_held_out(document, share, seed)], length)
    held = packed([document for document in documents if is_held_out(document, share, seed)], length)
    wanted = -(-tokens // length)
    assert corpus.train.tolist() == kept[:wanted]
    # Held out is what was met on the way, up to the share.
    assert corpus.heldout.tolist() == held[: len(corpus.heldout)]
    assert 1 <= len(corpus.heldout) <= max(1, round(wanted * share / (1 - share)))
    if wanted <= len(kept) // 4:
        assert len(asked) < len(documents)


def test_equal_documents_lie_on_one_side_and_the_seed_chooses_it(tmp_path):
    documents = texts(300)
    corpora = [corpus_of(tmp_path / str(seed), documents, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(corpora[0].train, corpora[1].train)
    assert not torch.equal(corpora[0].train[:20], corpora[2].train[:20])
    twice = corpus_of(tmp_path / "twice", [*documents, *documents], seed=0)
    assert twice.provenance["heldout"]["documents"] == 2 * corpora[0].provenance["heldout"]["documents"]


@pytest.mark.parametrize(("mark", "expected"), [("\n\n", 81), ("\n", 81), (" ", 75)])
def test_the_end_of_a_lone_text_is_held_out_from_a_break_on(mark, expected, tmp_path):
    """Of 100 words 25 are held out, or those from the first break behind that place on."""
    words = ["w1"] * 100
    text = " ".join(words[:81]) + mark + " ".join(words[81:])
    corpus = corpus_of(tmp_path, [text], length=1)
    assert [len(corpus.train), len(corpus.heldout)] == [expected + 2, 100 - expected + 2]
    assert corpus.provenance["split"] == "parts of documents"


def test_a_text_without_breaks_is_cut_all_the_same(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(Path(surgery.__file__).parent / "builtin" / "llama")
    corpus = corpus_of(tmp_path, ["ab" * 400], tokenizer, length=4)
    ids = [1, *tokenizer("ab" * 300, add_special_tokens=False)["input_ids"], 2]
    assert corpus.train.flatten().tolist() == ids[: len(corpus.train) * 4]
    assert len(corpus.heldout)


def test_few_texts_are_each_divided(tmp_path):
    documents = [" ".join([word] * 80) for word in WORDS[:3]]
    corpus = corpus_of(tmp_path, [*documents, documents[0], ""], length=4)
    for side in (corpus.train, corpus.heldout):
        assert {5, 6, 7} <= set(side.flatten().tolist())
    assert corpus.provenance["train"]["documents"] == corpus.provenance["heldout"]["documents"] == 4


def test_very_long_texts_are_divided_before_all_were_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LOOKAHEAD", 1000)
    corpus = corpus_of(tmp_path, [" ".join([word] * 80) for word in WORDS])
    assert corpus.provenance["split"] == "parts of documents"
    assert corpus.provenance["train"]["documents"] == 60


def test_a_long_text_is_tokenized_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_text, "PIECE", 12)  # four words of three characters
    sizes = []

    class Watched(PreTrainedTokenizerFast):
        def __call__(self, text, **options):
            sizes.append(len(text))
            return super().__call__(text, **options)

    watched = Watched(tokenizer_object=small_tokenizer().backend_tokenizer, bos_token="<s>", eos_token="</s>")
    document = "w1 w2 w3 " * 40
    corpus = corpus_of(tmp_path, [document], watched, length=10)
    assert max(sizes) == 12
    assert corpus.train.tolist() == packed([document[: 9 * 30]], 10)


def test_chats_are_rendered_and_get_nothing_more(tmp_path):
    chats = [({"role": "user", "content": text}, {"role": "assistant", "content": "w0"}) for text in texts(200)]
    corpus = corpus_of(tmp_path, chats)
    row = []
    for chat in chats:
        if not is_held_out(json.dumps(chat, sort_keys=True), 0.25, 0):
            row += [1, 3, *(5 + WORDS.index(word) for word in chat[0]["content"].split()), 4, 5]
    assert corpus.train.flatten().tolist() == row[: len(row) // 8 * 8]


@pytest.mark.parametrize(
    ("documents", "length", "message", "remedy"),
    [
        (["w1 w2"], 8, "no window of 8 tokens to train on", "give more text, or set a smaller length"),
        ([], 8, "no window of 8 tokens to train on", "give more text"),
        ([" ".join(["w1"] * 20)], 8, "no window of 8 tokens to hold out", "hold out more of it"),
        ([" ".join(["w1"] * 200)], 100, "no window of 100 tokens to hold out", "smaller length"),
    ],
)
def test_too_little_text_is_refused(documents, length, message, remedy, tmp_path):
    with pytest.raises(UsageError, match=message) as caught:
        corpus_of(tmp_path, documents, length=length)
    assert remedy in caught.value.remedy
    assert open_corpus(tmp_path) is None


def test_a_corpus_opens_again_and_says_where_it_came_from(tmp_path):
    made = corpus_of(tmp_path / "new", texts(300), source={"files": [{"name": "a.txt", "sha256": "0"}]})
    found = open_corpus(tmp_path / "new")
    assert torch.equal(found.train, made.train)
    assert torch.equal(found.heldout, made.heldout)
    assert found.provenance == made.provenance
    assert found.provenance["files"][0]["name"] == "a.txt"
    assert {found.provenance[key] for key in ("length", "seed", "share", "split")} == {8, 0, 0.25, "documents"}
    for name, windows in (("train", found.train), ("heldout", found.heldout)):
        raw = (tmp_path / "new" / f"{name}.tokens").read_bytes()
        assert np.frombuffer(raw, "<i4").reshape(-1, 8).tolist() == windows.tolist()
        side = found.provenance[name]
        assert side["sha256"] == hashlib.sha256(raw).hexdigest()
        assert (side["windows"], side["tokens"]) == (len(windows), windows.numel())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "corpus.json",
        "heldout.tokens",
        "train.tokens",
    ]


def test_what_is_done_to_the_tensors_does_not_reach_the_files(tmp_path):
    corpus = corpus_of(tmp_path, texts(300))
    before = (tmp_path / "train.tokens").read_bytes()
    corpus.train.zero_()
    assert (tmp_path / "train.tokens").read_bytes() == before


def damage_record(folder: Path, **changed: object) -> None:
    record = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps(record | changed))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "corpus.json").unlink(),
        lambda folder: (folder / "corpus.json").write_text("{"),
        lambda folder: (folder / "corpus.json").write_text("[]"),
        lambda folder: damage_record(folder, corpus=2),
        lambda folder: damage_record(folder, provenance={"length": 8}),
        lambda folder: (folder / "heldout.tokens").unlink(),
        lambda folder: (folder / "train.tokens").write_bytes((folder / "train.tokens").read_bytes() + b"0000"),
        lambda folder: (folder / "train.tokens").write_bytes((folder / "train.tokens").read_bytes()[:-4]),
    ],
)
def test_a_folder_that_contradicts_itself_is_no_corpus(damage, tmp_path):
    corpus_of(tmp_path, texts(300))
    damage(tmp_path)
    assert open_corpus(tmp_path) is None


def test_a_corpus_that_is_made_anew_is_not_there_meanwhile(tmp_path):
    corpus_of(tmp_path, texts(300))

    def broken():
        yield from texts(300)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corpus_of(tmp_path, broken())
    assert open_corpus(tmp_path) is None


@given(st.integers(1, 200), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_an_epoch_is_a_permutation(count, seed, epoch):
    order = shuffled(count, seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == list(range(count))
    assert torch.equal(order, shuffled(count, seed=seed, epoch=epoch))


def test_orders_differ_between_epochs_and_seeds_and_nowhere_else():
    assert shuffled(8, seed=1, epoch=2).tolist() == [1, 3, 0, 6, 5, 7, 2, 4]
    # Seeds that agree in their lowest 32 bits too, which are all that torch's generator looks at.
    pairs = [(seed, epoch) for seed in (0, 1, 1 << 32, 1 << 62) for epoch in range(4)]
    assert len({tuple(shuffled(50, seed=seed, epoch=epoch).tolist()) for seed, epoch in pairs}) == len(pairs)


@given(st.integers(1, 40), st.integers(1, 90), st.integers(0, 5), st.integers(0, 30))
def test_every_step_is_a_slice_of_the_endless_stream(count, batch_size, seed, step):
    """From any step on: batches straddle epochs, hold more than one, and need nothing that came before."""
    epochs = (step + 1) * batch_size // count + 1
    stream = [row for epoch in range(epochs) for row in shuffled(count, seed=seed, epoch=epoch).tolist()]
    expected = stream[step * batch_size : (step + 1) * batch_size]
    windows = torch.arange(count * 3, dtype=torch.int32).view(count, 3)
    batch = windows[rows_of(len(windows), step=step, batch_size=batch_size, seed=seed)]
    assert rows_of(count, step=step, batch_size=batch_size, seed=seed).tolist() == expected
    assert batch.tolist() == windows[expected].tolist()


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=64, **sizes)).eval()


def written(folder: Path, model, report=silent, **changed):
    settings = {"length": 6, "tokens": 500, "heldout": 0.3, "seed": 5, "start": 1, **changed}
    return write_self(model, folder=folder, report=report, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_writes_a_corpus(tmp_path):
    told = []
    corpus = written(tmp_path, tiny_model(), told.append)
    assert corpus.train.shape == (84, 6)  # 500 tokens fill 83 windows and a part
    assert corpus.heldout.shape == (36, 6)  # 0.3 of all: 84 * 0.3 / 0.7
    everything = torch.cat([corpus.train, corpus.heldout])
    assert (everything[:, 0] == 1).all()
    assert len(everything.unique(dim=0)) == len(everything)
    assert corpus.provenance["text"] == "self"
    assert [(progress.done, progress.total) for progress in told] == [
        (rows * 6, 120 * 6) for rows in (32, 64, 84, 116, 120)
    ]


def test_a_batch_is_written_by_its_number_alone(tmp_path):
    """Batch 1 by hand: 32 rows, each next token drawn from the full distribution, without a cache."""
    model = tiny_model()
    corpus = written(tmp_path, model)
    digest = hashlib.blake2b(b"self:5:1", digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    tokens = torch.full((32, 1), 1)
    with torch.no_grad():
        while tokens.shape[1] < 6:
            chances = model(input_ids=tokens, use_cache=False).logits[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], 1)
    assert torch.equal(corpus.train[32:64].long(), tokens)


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("batches", [1, 2, 3, 4])
@pytest.mark.parametrize("torn", [b"", b"torn", bytes(6 * 4 * 3)])
def test_a_killed_run_goes_on_to_the_same_bytes(batches, torn, tmp_path, monkeypatch):
    model = tiny_model()
    written(tmp_path / "whole", model)
    counted = []

    def sampled(*arguments, **named):
        if len(counted) == batches:
            raise Killed
        counted.append(0)
        return calibration_text.sampled_rows(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(data, "sampled_rows", sampled)
        with pytest.raises(Killed):
            written(tmp_path / "killed", model)
        assert open_corpus(tmp_path / "killed") is None
        name = "train.tokens" if batches < 3 else "heldout.tokens"
        with (tmp_path / "killed" / name).open("ab") as file:
            file.write(torn)
        counted.clear()
        patch.setattr(data, "sampled_rows", lambda *a, **n: counted.append(0) or calibration_text.sampled_rows(*a, **n))
        written(tmp_path / "killed", model)
    assert len(counted) == 5 - batches
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_finished_corpus_is_not_written_again(tmp_path, monkeypatch):
    written(tmp_path, tiny_model())
    before = contents(tmp_path)
    monkeypatch.setattr(data, "sampled_rows", None)
    written(tmp_path, None)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("changed", [{"seed": 6}, {"length": 7}, {"tokens": 300}, {"heldout": 0.2}, {"start": 2}])
def test_other_settings_begin_again(changed, tmp_path):
    model = tiny_model()
    written(tmp_path / "used", model)
    written(tmp_path / "used", model, **changed)
    written(tmp_path / "fresh", model, **changed)
    assert contents(tmp_path / "used") == contents(tmp_path / "fresh")


def test_a_text_corpus_leaves_nothing_for_a_written_one_to_go_on_with(tmp_path):
    model = tiny_model()
    written(tmp_path / "used", model)
    corpus_of(tmp_path / "used", texts(300), length=6)
    written(tmp_path / "used", model)
    written(tmp_path / "fresh", model)
    assert contents(tmp_path / "used") == contents(tmp_path / "fresh")


def test_a_model_that_gives_no_probabilities_is_refused(tmp_path):
    model = tiny_model()
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(CorruptCheckpoint):
        written(tmp_path, model)


def test_what_calibration_samples_is_what_it_always_was():
    """One generator over all batches of 32 rows."""
    model = tiny_model()
    found = sampled_windows(model, Calibration(text="self", samples=40, length=5, seed=9), None, 1).tokens
    generator = torch.Generator().manual_seed(9)
    rows = []
    with torch.no_grad():
        for count in (32, 8):
            tokens = torch.full((count, 1), 1)
            while tokens.shape[1] < 5:
                chances = model(input_ids=tokens, use_cache=False).logits[:, -1].softmax(-1)
                tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], 1)
            rows.append(tokens)
    assert torch.equal(found, torch.cat(rows))
