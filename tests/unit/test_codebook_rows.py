"""The parts of the codebook cache against formulas written out here: rows, codes, the line, scores, heads, settings."""

import itertools
import math
from dataclasses import fields

import pytest
import torch

import surgery.runtime.surgery_codebook_rows as rows_module
from surgery.runtime.surgery_codebook_layer import Head, StoredLayer, Turning, masked, placed, visible
from surgery.runtime.surgery_codebook_rows import (
    Coded,
    bytes_per_row,
    cover,
    directions,
    pack,
    share,
    share_by,
    small_float,
    small_int,
)
from surgery.runtime.surgery_codebook_settings import CacheSettings
from surgery.runtime.surgery_codebook_solver import Past, attention, line, paper, scores, solved, spread, whole
from tests import codebook_reference as reference

BITS = (2, 3, 4, 5, 6, 8)
WIDTHS = (1, 5, 8, 13)
SHRINKS = {2: (1.0, 0.85, 0.7, 0.55), 3: (1.0, 0.85, 0.7), 4: (1.0, 0.9, 0.8)}
THETAS = (0.3, 0.7, 0.9, 0.98)
both_searches = pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "at-once"])


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(count, width, clusters, noise, seed=0):
    """Vectors of many lengths around a few directions."""
    centres = normal(clusters, width, seed=seed)
    which = torch.randint(0, clusters, (count,), generator=torch.Generator().manual_seed(seed + 1))
    vectors = centres[which] + noise * normal(count, width, seed=seed + 2)
    return vectors * (0.2 + 5 * torch.rand(count, 1, generator=torch.Generator().manual_seed(seed + 3)))


# Rounding.


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", BITS)
def test_a_rounded_number_is_the_nearest_of_its_levels(bits, width):
    vectors = normal(9, width) * torch.arange(1, 10)[:, None] + 3
    rows = pack(vectors, bits)
    assert len(rows.codes) == 9
    assert rows.codes.nbytes + rows.scale.nbytes == 9 * reference.row_bytes(width, bits, 4)
    assert bytes_per_row(width, bits, 4) == reference.row_bytes(width, bits, 4)
    centre, spread, scale = (x.double() for x in (rows.centre, rows.spread, rows.scale))
    assert torch.allclose(centre, vectors.double().mean(0), rtol=2e-3, atol=1e-3)
    assert torch.allclose(spread, vectors.double().std(0, correction=0), rtol=2e-3, atol=1e-3)
    levels = torch.arange(2**bits).double() - 2 ** (bits - 1) + 0.5
    grid = centre[None, :, None] + spread[None, :, None] * scale[:, None, None] * levels
    nearest = (grid - vectors.double()[..., None]).abs().min(-1)
    expected = grid.gather(-1, nearest.indices[..., None])[..., 0]
    step = spread[None] * scale[:, None]
    error = (rows.dense().double() - vectors.double()).abs()
    assert (error <= nearest.values + 1e-5 * (1 + step)).all()
    assert torch.allclose(rows.dense().double(), expected, rtol=1e-4, atol=1e-4) or bits == 8
    inside = (vectors.double() - centre).abs() <= step * 2 ** (bits - 1)
    assert (error[inside] <= (step / 2)[inside] + 1e-5).all(), "half a step"


@pytest.mark.parametrize("bits", BITS)
def test_a_row_has_the_scale_with_the_least_error(bits):
    vectors = normal(40, 16, seed=4) ** 3
    rows = pack(vectors, bits)
    offset = ((vectors - rows.centre.float()) / rows.spread.float()).double()
    most = offset.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    errors = []
    for shrink in SHRINKS.get(bits, (1.0,)):
        scale = most * shrink
        level = (offset / scale).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5
        errors.append((level * scale - offset).pow(2).sum(-1))
    if bits == 2:
        assert len({int(at) for at in torch.stack(errors).argmin(0)}) > 2, "no one of them is always the best"
    got = (((rows.dense() - rows.centre.float()) / rows.spread.float()).double() - offset).pow(2).sum(-1)
    assert torch.allclose(got, torch.stack(errors).amin(0), rtol=0.02, atol=2e-4)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", [*BITS, 16])
def test_appended_rows_are_rounded_as_the_first_and_leave_them(bits, width):
    first, more = normal(20, width), normal(7, width, seed=1)
    rows = pack(first, bits)
    grown = rows.append(more)
    assert len(grown) == 27
    assert torch.equal(grown.dense()[:20], rows.dense())
    if bits == 16:
        assert torch.equal(grown.dense()[20:], more)
        return
    step = rows.spread.double() * grown.scale[20:].double()[:, None]
    levels = torch.arange(2**bits).double() - 2 ** (bits - 1) + 0.5
    grid = rows.centre.double()[None, :, None] + step[..., None] * levels
    nearest = (grid - more.double()[..., None]).abs().amin(-1)
    assert ((grown.dense()[20:].double() - more.double()).abs() <= nearest + 1e-4).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_rows(bits, count):
    vectors = normal(count, 6) * 100
    rows = pack(vectors, bits)
    assert rows.dense().shape == (count, 6)
    assert len(rows.append(vectors)) == 2 * count
    assert rows.mix(torch.ones(3, count)).shape == (3, 6)
    if count == 1:
        assert torch.allclose(rows.dense(), vectors, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3])
def test_rows_around_a_centre_take_in_what_lies_far_from_it(bits, noise):
    """A prompt of one repeated token gives such rows; what the answer adds may lie anywhere."""
    first = torch.ones(20, 16) + noise * normal(20, 16)
    more = 4 * normal(3, 16, seed=1)
    grown = pack(first, bits).append(more).dense()
    assert grown.isfinite().all()
    bound = 1.1 * (more - 1).abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    if noise == 0:
        assert ((grown[20:] - more).abs() <= bound).all()


@pytest.mark.parametrize("bits", BITS)
def test_numbers_beyond_half_precision_stay_finite(bits):
    vectors = normal(12, 8) * 1e6
    assert (pack(vectors, bits).dense() - vectors).norm() < vectors.norm()
    first = pack(normal(12, 8), bits)
    grown = first.append(vectors)
    assert torch.equal(grown.dense()[:12], first.dense()), "a wider type changes nothing of what was there"
    assert (grown.dense()[12:] - vectors).norm() < vectors.norm()


# Sums of rows.


@pytest.mark.parametrize("bits", [*BITS, 16])
@pytest.mark.parametrize("sharing", ["own", "theta", "ids"])
@pytest.mark.parametrize("width", [5, 16])
def test_mixing_is_gathering(bits, sharing, width):
    vectors, ids = clustered(60, width, 9, 0.05), torch.arange(60) % 9
    coded = {
        "own": lambda: Coded(pack(vectors, bits)),
        "theta": lambda: share(vectors, 0.9, bits),
        "ids": lambda: share_by(ids, vectors, bits),
    }[sharing]()
    assert (coded.ref is None) == (sharing == "own")
    for held in (coded, coded.append(normal(5, width, seed=9))):
        weights = normal(4, len(held)).softmax(-1)
        gathered = weights.double() @ held.dense().double()
        scale = gathered.abs().max()
        assert (held.mix(weights).double() - gathered).abs().max() <= 1e-5 * max(1.0, scale)


# Codes.


@both_searches
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("block", [4096, 7])
@pytest.mark.parametrize("kind", ["random", "clustered", "equal", "duplicates", "zeros"])
def test_every_vector_has_a_code_that_is_near(greedy, theta, block, kind, monkeypatch):
    monkeypatch.setattr(rows_module, "BLOCK", block)
    vectors = {
        "random": lambda: normal(50, 4),
        "clustered": lambda: clustered(50, 8, 6, 0.1),
        "equal": lambda: torch.ones(50, 8),
        "duplicates": lambda: normal(10, 8).repeat(5, 1),
        "zeros": lambda: torch.cat([normal(20, 8), torch.zeros(5, 8), normal(20, 8)]),
    }[kind]()
    unit, length = directions(vectors)
    members, ref = cover(unit, theta, greedy=greedy)
    assert len(set(members.tolist())) == len(members) <= len(vectors)
    assert (ref >= 0).all()
    assert (ref < len(members)).all()
    assert torch.equal(ref[members], torch.arange(len(members))), "a code is its own"
    codes = unit.double()[members]
    cosine = (unit.double() * codes[ref]).sum(-1)
    own = torch.zeros(len(vectors), dtype=torch.bool)
    own[members] = True
    assert ((cosine > theta - 1e-6) | own).all()
    between = codes @ codes.T
    between.fill_diagonal_(-1)
    assert (between <= theta + 1e-6).all()
    found = share(vectors, theta, 16, greedy=greedy).dense().double()
    error = (found - vectors.double()).norm(dim=-1)
    assert (error <= (math.sqrt(2 * (1 - theta)) + 1e-3) * length.double() + 1e-9).all()
    if kind == "equal":
        assert len(members) == 1
    if kind == "duplicates":
        assert len(members) <= 10
    if kind == "zeros":
        assert torch.equal(found[20:25], torch.zeros(5, 8).double())


@both_searches
@pytest.mark.parametrize("count", [0, 1, 2])
def test_codes_of_few_vectors(greedy, count):
    unit = directions(normal(count, 8))[0]
    members, ref = cover(unit, 0.9, greedy=greedy)
    assert members.dtype == ref.dtype == torch.long
    assert members.tolist() == ref.tolist() == list(range(count))
    assert share(normal(count, 8), 0.9, 16, greedy=greedy).dense().shape == (count, 8)


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("kind", ["random", "clustered", "duplicates"])
def test_the_greedy_search_is_algorithm_1(theta, kind):
    vectors = {
        "random": lambda: normal(70, 5),
        "clustered": lambda: clustered(70, 8, 9, 0.15),
        "duplicates": lambda: normal(14, 8).repeat(5, 1),
    }[kind]()
    unit = directions(vectors)[0]
    assert ((unit.double() @ unit.double().T) - theta).abs().min() > 1e-6, "no cosine may be decided by rounding"
    members, ref = cover(unit, theta, greedy=True)
    assert (members.tolist(), ref.tolist()) == reference.algorithm_1(unit, theta)


@both_searches
@pytest.mark.parametrize("block", [4096, 5])
def test_known_codes_are_used_where_near_and_counted_first(greedy, block, monkeypatch):
    monkeypatch.setattr(rows_module, "BLOCK", block)
    known = directions(normal(6, 16))[0]
    near = directions(known[[4, 1, 1]] + 0.01 * normal(3, 16, seed=1))[0]
    new = directions(normal(8, 16, seed=2))[0]
    assert (new @ torch.cat([known, near]).T).max() < 0.95
    assert (new @ new.T - 2 * torch.eye(8)).max() < 0.95
    members, ref = cover(torch.cat([near, new]), 0.95, known=known, greedy=greedy)
    assert ref[:3].tolist() == [4, 1, 1]
    assert sorted(ref[3:].tolist()) == list(range(6, 14))
    assert sorted(members.tolist()) == list(range(3, 11))
    assert all(members[ref[at] - 6] == at for at in range(3, 11))


@both_searches
def test_a_broken_vector_shares_with_nobody_and_the_search_ends(greedy):
    """What NaN is in a key makes attention NaN in the stock model too; it must not spread here by sharing."""
    vectors = clustered(40, 8, 3, 0.02)
    vectors[7, 2], vectors[9, 0] = float("nan"), float("inf")
    coded = share(vectors, 0.95, 16, greedy=greedy)
    rest = [at for at in range(40) if at not in (7, 9)]
    assert coded.dense()[rest].isfinite().all()
    assert len(coded.rows) < 20
    assert not {int(coded.ref[7]), int(coded.ref[9])} & set(coded.ref[rest].tolist())


@pytest.mark.parametrize("theta", [0.5, 0.8, 0.95])
@pytest.mark.parametrize(
    "kind", ["random-8", "random-16", "random-64", "clusters-0.05", "clusters-0.15", "clusters-0.3"]
)
def test_many_at_once_needs_hardly_more_codes_than_one_by_one(theta, kind):
    """Where vectors lie at random, neighbourhoods overlap in chains, and whoever chooses many at once sees them less."""
    name, number = kind.split("-")
    vectors = normal(400, int(number)) if name == "random" else clustered(400, 16, 40, float(number))
    unit = directions(vectors)[0]
    greedy, at_once = (len(cover(unit, theta, greedy=way)[0]) for way in (True, False))
    more = 1.05 if name == "random" else 1.02
    assert at_once <= more * greedy + 1, (at_once, greedy)


@both_searches
def test_more_codes_at_higher_thresholds(greedy):
    unit = directions(clustered(300, 16, 30, 0.2))[0]
    counts = [len(cover(unit, theta, greedy=greedy)[0]) for theta in (0.5, 0.7, 0.9, 0.97, 0.999)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_tokens_share_a_row_by_their_ids():
    ids = torch.tensor([9, 4, 9, 9, 1, 4])
    table = normal(10, 5)
    coded = share_by(ids, table[ids], 16)
    assert len(coded.rows) == 3
    assert torch.equal(coded.dense(), table[ids])
    grown = coded.append(normal(2, 5, seed=3))
    assert torch.equal(grown.dense(), torch.cat([table[ids], normal(2, 5, seed=3)]))


@both_searches
def test_appending_what_is_known_adds_no_code_and_what_is_new_adds_one(greedy):
    vectors = clustered(40, 16, 4, 0.02)
    coded = share(vectors, 0.9, 16, greedy=greedy)
    assert len(coded.rows) == 4
    known = coded.append(vectors[:3] * 7, greedy)
    assert len(known.rows) == 4
    assert torch.allclose(known.dense()[40:].norm(dim=-1), 7 * vectors[:3].norm(dim=-1), rtol=1e-3)
    assert torch.equal(known.ref[40:], coded.ref[:3])
    novel = directions(normal(1, 16, seed=8))[0]
    assert (novel @ directions(coded.rows.dense())[0].T).max() < 0.9
    grown = known.append(3 * novel, greedy)
    assert len(grown.rows) == 5
    assert torch.allclose(grown.dense()[-1:], 3 * novel, rtol=1e-3, atol=1e-4)
    assert torch.equal(grown.dense()[:43], known.dense()), "what was there stays"


@pytest.mark.parametrize("size", [1e-7, 1e-3, 1.0, 1e3, 1e6])
def test_lengths_are_kept_however_large(size):
    vectors = clustered(30, 8, 3, 0.05) * size
    coded = share(vectors, 0.9, 16)
    assert torch.allclose(coded.dense().norm(dim=-1), vectors.norm(dim=-1), rtol=1e-3, atol=0)
    assert not torch.allclose(coded.rows.dense()[coded.ref.long()], vectors, rtol=0.1)


@pytest.mark.parametrize("size", [1e-2, 1.0, 1e6])
def test_appended_lengths_are_kept_however_large(size):
    coded = share(clustered(30, 8, 3, 0.05), 0.9, 16)
    more = normal(4, 8, seed=5) * size
    grown = coded.append(more)
    assert torch.allclose(grown.dense()[30:].norm(dim=-1), more.norm(dim=-1), rtol=1e-3, atol=0)
    assert torch.equal(grown.dense()[:30], coded.dense())


@pytest.mark.parametrize("last", [0, 1, 2**15 - 1, 2**15, 2**20])
def test_whole_numbers_take_what_they_need(last):
    numbers = torch.tensor([-1, 0, last])
    small = small_int(numbers)
    assert torch.equal(small.long(), numbers)
    assert small.dtype == (torch.int16 if last < 2**15 else torch.int32)
    assert small_int(numbers[:0]).dtype == torch.int16


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-4, 1.0, 6e4, 1e5, 1e30])
def test_numbers_keep_their_size(size):
    assert torch.allclose(small_float(torch.tensor([size, 0.5])).float(), torch.tensor([size, 0.5]), rtol=1e-3, atol=0)


# Heads and positions.


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 16, 31])
def test_masks_are_bits_of_one_number(count):
    wanted = torch.rand(count, 50, generator=torch.Generator().manual_seed(0)) > 0.5
    mask = masked(wanted)
    assert mask.tolist() == [sum(1 << j for j in range(count) if wanted[j, at]) for at in range(50)]
    assert mask.element_size() == (1 if count <= 8 else 4)
    assert torch.equal(visible(mask, count), wanted)


@pytest.mark.parametrize("count", [2, 8, 9, 31])
def test_everyone_sees_what_is_appended(count):
    mask = masked(torch.zeros(count, 3, dtype=torch.bool))
    head = Head(small_int(torch.arange(3)), *(Coded(pack(normal(3, 4), 16)) for _ in "kv"), mask)
    grown = head.append(torch.tensor([7, 40000]), normal(2, 4), normal(2, 4), greedy=False)
    assert grown.position.tolist() == [0, 1, 2, 7, 40000]
    assert not visible(grown.mask, count)[:, :3].any()
    assert visible(grown.mask, count)[:, 3:].all()


@pytest.mark.parametrize("first", [0, 7, 40000])
def test_consecutive_places_take_no_memory(first):
    def head(places):
        states = normal(len(places), 4)
        return Head(placed(torch.tensor(places, dtype=torch.long)), *(Coded(pack(states, 16)) for _ in "kv"))

    run = head([first, first + 1, first + 2])
    longer = run.append(torch.tensor([first + 3]), normal(1, 4), normal(1, 4), greedy=False)
    gap = longer.append(torch.tensor([first + 5]), normal(1, 4), normal(1, 4), greedy=False)
    for held, count, size in (
        (run, 3, 0),
        (longer, 4, 0),
        (head([first]), 1, 0),
        (head([first, first + 2]), 2, 2),
        (gap, 5, 5),
    ):
        assert len(held) == count
        assert held.position.dtype == torch.int64
        expected = [first + at for at in range(count)]
        assert held.position.tolist() == expected if not size else held.position.tolist()[:1] == [first]
        assert sum(t.nbytes for t in held.tensors()["positions"]) == size * (2 if first < 30000 else 4)
    assert gap.position.tolist() == [first, first + 1, first + 2, first + 3, first + 5]
    assert head([]).position.tolist() == []
    assert head([3, 2]).position.tolist() == [3, 2], "backwards is no run"


def rotary_tables(width, places=32):
    angle = torch.arange(places).double()[:, None] * 10000 ** (-torch.arange(0, width, 2).double() / width)
    return angle, *(torch.cat([table, table], -1).float() for table in (angle.cos(), angle.sin()))


@pytest.mark.parametrize("columns", ["all", "same", "each"])
@pytest.mark.parametrize("place", [[5, 0, 31, 2], [7, 8, 9, 10], [3]], ids=["anywhere", "consecutive", "one"])
@pytest.mark.parametrize("still", [0, 3])
def test_turning_is_complex_multiplication(columns, place, still):
    width, kept, place = 12, 8, torch.tensor(place)
    angle, cos, sin = rotary_tables(width)
    pairs = {"all": None, "same": [[0, 2, 3, 5]] * 2, "each": [[0, 2, 3, 5], [5, 1, 0, 4]]}[columns]
    chosen = None if pairs is None else torch.tensor([[*of, *(p + width // 2 for p in of)] for of in pairs])
    turning = Turning(cos, sin, chosen[0] if columns == "same" else chosen)
    turns = width if pairs is None else kept
    states = normal(1, 2, len(place), turns + still)  # the last channels do not turn
    turned, query = turning.heads(states, place[None]), normal(3, turns + still, seed=1)
    position = small_int(place)
    for index in range(2):
        rotary = states[0, index, :, :turns].double()
        at = angle[place] if pairs is None else angle[place][:, pairs[index]]
        first, second = rotary.chunk(2, -1)
        expected = torch.complex(first, second) * torch.polar(torch.ones_like(at), at)
        expected = torch.cat([expected.real, expected.imag, states[0, index, :, turns:].double()], -1)
        assert torch.allclose(turned[0, index].double(), expected, atol=1e-5)
        coded = Coded(pack(states[0, index], 16))
        grown = Head(position[:0], Coded(pack(states[0, index, :0], 16)), coded).append(
            place, states[0, index], states[0, index], greedy=False
        )
        for head in (Head(position, coded, coded), Head(placed(place), coded, coded), grown):
            assert torch.allclose(turning.logits(query, head, index).double(), query.double() @ expected.T, atol=1e-4)


@pytest.mark.parametrize("bits", [*BITS, 16])
def test_pieces_of_rows_are_those_of_the_whole(bits):
    vectors = clustered(50, 12, 5, 0.05)
    for coded in (Coded(pack(vectors, bits)), share(vectors, 0.9, bits)):
        whole_of = coded.dense()
        for piece in (slice(0, 7), slice(7, 50), slice(49, 50), slice(3, 3)):
            assert torch.equal(coded.dense(piece), whole_of[piece])


# The line over layers.

RATIOS = (0.02, 0.05, 0.15, 0.4, 0.525, 0.6, 1.0)
WINDOW = 32
LENGTHS = (1, WINDOW, WINDOW + 1, 4096)


@pytest.mark.parametrize("layers", [1, 2, 7, 32])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_line_keeps_what_was_asked_in_the_mean(ratio, length, layers):
    context = length - min(WINDOW, length)
    share_of_context = (ratio * length - min(WINDOW, length)) / max(context, 1)
    shares = line(share_of_context, 0.05, layers)
    assert shares == pytest.approx(reference.line(share_of_context, 0.05, layers))
    assert len(shares) == layers
    assert all(0 <= of <= 1 for of in shares)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(shares))
    if 0 <= share_of_context <= 1:
        assert sum(shares) / layers == pytest.approx(share_of_context)
        total = sum(int(of * context + 1e-9) for of in shares) + layers * min(WINDOW, length)
        assert abs(total - ratio * length * layers) <= layers
    if layers > 1 and 0.05 < share_of_context < 1:
        assert shares[-1] == pytest.approx(0.05 if share_of_context <= 0.525 else 2 * share_of_context - 1)
        assert shares[0] == pytest.approx(1.0 if share_of_context > 0.525 else 2 * share_of_context - 0.05)


# Scores and what is kept.


def past_of(
    tokens=60, groups=2, per_group=3, width=8, values=6, window=5, sinks=2, seed=0, ids=None, sharp=1.5, newest=None
):
    """Random states of one layer, rotated by the reference; the `newest` tokens (or the window) stay as they are."""
    newest = window if newest is None else newest
    key, value = normal(groups, tokens, width, seed=seed), normal(groups, tokens, values, seed=seed + 1)
    place = torch.arange(tokens)
    query = sharp * normal(groups * per_group, tokens, width, seed=seed + 2)
    angle = place.double()[:, None] * 10000 ** (-torch.arange(0, width, 2).double() / width)
    cos, sin = (torch.cat([table, table], -1).float() for table in (angle.cos(), angle.sin()))
    asked = torch.tensor([*range(9, tokens - window, 10), *range(tokens - window, tokens)])
    context = torch.arange(sinks, tokens - newest)
    raw = torch.cat([torch.arange(sinks), torch.arange(tokens - newest, tokens)])
    return Past(
        key, reference.turned(key, place).float(), value, place, context, raw,
        reference.turned(query, place)[:, asked].float(), asked, window, width**-0.5, Turning(cos, sin), ids,
    )  # fmt: skip


def settings(**given):
    return CacheSettings.of({}, {"window": 5, "sinks": 2, "residual": 4, "min_prompt": 8, **given})


def exact(past, allowed=None):
    """Attention of the judging queries in float64, each head by itself: weights [H, P, T] and outputs [H, P, s]."""
    per_group = past.query.shape[0] // past.groups
    weights, outputs = [], []
    for head, query in enumerate(past.query.double()):
        key, value = past.turned[head // per_group].double(), past.value[head // per_group].double()
        logits = query @ key.T * past.scaling
        logits[past.position[None] > past.asked[:, None]] = -math.inf
        if allowed is not None:
            logits[:, [at for at in range(len(key)) if at not in allowed[head]]] = -math.inf
        weights.append(logits.softmax(-1))
        outputs.append(weights[-1] @ value)
    return torch.stack(weights), torch.stack(outputs)


@pytest.mark.parametrize("pool", [1, 3, 7])
@pytest.mark.parametrize("divisor", ["window", "paper"])
def test_scores_are_what_the_window_gives(pool, divisor):
    past = past_of()
    weights = exact(past)[0]
    assert torch.allclose(past.weights().double(), weights, atol=1e-6)
    found = scores(past, past.weights(), settings(pool=pool, divisor=divisor))
    tokens = past.key.shape[1]
    full = torch.zeros(len(weights), tokens, tokens)
    full[:, past.asked] = weights.float()
    expected = reference.window_scores(full, past.window, 2, pool, divisor)
    assert torch.allclose(found.double(), torch.tensor(expected).double(), atol=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 5])
@pytest.mark.parametrize("share_kept", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_best_of_all_heads_are_kept_and_each_head_gets_its_share(heads, share_kept):
    found = torch.rand(heads, 40, generator=torch.Generator().manual_seed(3)) * torch.arange(1, heads + 1)[:, None] ** 3
    count = int(share_kept * heads * 40)
    kept = spread(found, count)
    expected = reference.best_of_all(found.tolist(), count, 0.2)
    assert [set(mask.nonzero()[:, 0].tolist()) for mask in kept] == expected
    assert sum(int(mask.sum()) for mask in kept) == count


def chosen_by_hand(past, ratio, layer, layers, how, pool=1):
    """For each query head the context it keeps: top-k of its own scores, or of its group's mean."""
    tokens, per_group = past.key.shape[1], past.query.shape[0] // past.groups
    full = torch.zeros(len(past.query), tokens, tokens).double()
    full[:, past.asked] = exact(past)[0]
    found = torch.tensor(reference.window_scores(full, past.window, 2, pool)).double()
    if how == "mean":
        found = found.unflatten(0, (past.groups, per_group)).mean(1).repeat_interleave(per_group, 0)
    context = len(past.context)
    share_of_context = (ratio * tokens - len(past.raw)) / context
    keep = int(reference.line(share_of_context, 0.05, layers)[layer] * context)
    return [reference.best(of, keep, 2) for of in found.tolist()]


@pytest.mark.parametrize("how", ["mask", "union", "mean"])
@pytest.mark.parametrize(
    ("layer", "ratio", "per_group"), [(0, 0.3, 3), (3, 0.3, 1), (1, 0.7, 9), (3, 0.9, 3), (2, 0.05, 3)]
)
def test_heads_choose_as_if_they_were_unfolded(how, layer, ratio, per_group):
    past = past_of(per_group=per_group)
    given = settings(method="paper", reserve_ratio=ratio, heads=how, theta_k=1.0, theta_v=1.0)
    heads = paper(past, given, layer, 4)
    chosen = chosen_by_hand(past, ratio, layer, 4, how)
    raw = set(past.raw.tolist())
    for group, head in enumerate(heads):
        places = head.position.tolist()
        assert places == sorted(set(places)), "strictly increasing"
        assert not set(places) & raw
        of_group = chosen[group * per_group : (group + 1) * per_group]
        assert set(places) == set().union(*of_group)
        if how == "mask":
            sees = visible(head.mask, per_group)
            assert [{p for p, s in zip(places, row, strict=True) if s} for row in sees.tolist()] == of_group
        else:
            assert head.mask is None
        columns = head.position.long()
        assert torch.equal(head.key.dense(), past.key[group, columns])
        assert torch.equal(head.value.dense(), past.value[group, columns])
    if how == "union":
        chosen = [set(heads[index // per_group].position.tolist()) for index in range(len(chosen))]
    expected = exact(past, [of | raw for of in chosen])[1]
    late = past.asked >= max(past.raw.tolist()[:2])  # all queries see at least the sinks
    got = attention(past, heads).view(len(chosen), len(past.asked), -1)
    assert torch.allclose(got[:, late].double(), expected[:, late], atol=1e-5)


@pytest.mark.parametrize("how", ["mask", "union", "mean"])
def test_a_layer_attends_as_the_unfolded_reference(how):
    """The same through `StoredLayer`, for queries that come after the prompt, in a chunk."""
    past = past_of(per_group=3)
    heads = paper(past, settings(method="paper", reserve_ratio=0.4, heads=how, theta_k=1.0, theta_v=1.0), 1, 4)
    layer = StoredLayer(4, greedy=False)
    layer.append(past.key[None, :, past.raw], past.value[None, :, past.raw], past.raw[None])
    layer.heads, asked = [heads], torch.tensor([58, 59])
    query = reference.turned(normal(1, 6, 2, 8, seed=9), asked).float()
    got = layer.attend(query, asked[None], past.turning, past.scaling)[0].transpose(0, 1)
    for head in range(6):
        coded, count = heads[head // 3], head % 3
        places = coded.position.tolist()
        if coded.mask is not None:
            places = [p for p, bits in zip(places, coded.mask.tolist(), strict=True) if bits >> count & 1]
        for row, place in enumerate(asked.tolist()):
            left = torch.tensor(sorted(p for p in {*places, *past.raw.tolist()} if p <= place))
            logits = past.turned[head // 3, left].double() @ query[0, head, row].double() * past.scaling
            expected = logits.softmax(0) @ past.value[head // 3, left].double()
            assert torch.allclose(got[head, row].double(), expected, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_what_the_paper_shares_is_what_algorithm_1_shares(ratio):
    past = past_of()
    given = settings(method="paper", reserve_ratio=ratio, theta_k=0.6, theta_v=0.6)
    for group, head in enumerate(paper(past, given, 0, 2)):
        for side, states in ((head.key, past.key), (head.value, past.value)):
            vectors = states[group, head.position.long()]
            unit, length = directions(vectors)
            members, ref = reference.algorithm_1(unit, 0.6)
            if side.ref is None:  # smaller so
                assert torch.equal(side.dense(), vectors)
                continue
            assert side.ref.tolist() == ref
            assert torch.allclose(side.rows.dense(), unit[members], atol=1e-6)
            assert torch.allclose(side.length.float(), length, rtol=1e-3)


@pytest.mark.parametrize(
    ("share_of_bytes", "given"),
    [
        *itertools.product((0.05, 0.3, 0.6), ({}, {"bits": 3})),
        *itertools.product((0.3,), ({"bits": 16}, {"theta_k": 0.8, "theta_v": 0.7}, {"heads": "mean"})),
    ],
)
def test_what_is_solved_fits_into_its_budget(share_of_bytes, given):
    past = past_of(tokens=120, ids=torch.arange(120) % 11, newest=2)
    budget = share_of_bytes * past.groups * 120 * (8 + 6) * 4
    heads = solved(past, settings(**given), budget)
    taken = reference.memory(reference.reachable(heads))
    fixed = 2 * 14 * 2 * 2 + 2 * 64  # what two heads take before they hold a token
    assert taken <= max(budget, fixed)
    for head in heads:
        places = head.position.tolist()
        assert places == sorted(set(places))
        assert set(places) <= set(past.context.tolist())
        assert len(head.key) == len(head.value) == len(places)
        if share_of_bytes > 0.05:
            assert {115, 116, 117} <= set(places), "tokens whose queries judge are coded, and not evicted"


def test_what_is_solved_is_nearer_than_the_tokens_alone():
    past = past_of(tokens=200)
    budget = 0.3 * past.groups * 200 * (8 + 6) * 4
    truth = exact(past)[1]

    def error(**given):
        got = attention(past, solved(past, settings(**given), budget))
        return float((got.reshape(truth.shape).double() - truth).pow(2).sum())

    assert error() <= error(bits=16, theta_k=1.0, theta_v=1.0)
    assert error() <= error(bits=4, theta_k=1.0, theta_v=1.0) * (1 + 1e-6)


def test_solved_tokens_are_the_best_of_all_heads():
    past = past_of(tokens=120)
    budget = 0.3 * past.groups * 120 * (8 + 6) * 4
    heads = solved(past, settings(bits=16, theta_k=1.0, theta_v=1.0, pool=1), budget)
    full = torch.zeros(6, 120, 120)
    full[:, past.asked] = exact(past)[0].float()
    found = torch.tensor(reference.window_scores(full, past.window, 2)).unflatten(0, (2, 3)).amax(1)
    count = sum(len(head.position) for head in heads)
    assert 0 < count < 2 * len(past.context)
    expected = reference.best_of_all(found.tolist(), count, 0.2)
    assert [{p - 2 for p in head.position.tolist()} for head in heads] == expected


@pytest.mark.parametrize("share_of_bytes", [0.1, 0.16, 0.2, 0.25, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("given", [{}, {"bits": 5}])
def test_an_answer_is_kept_whole_as_finely_as_bytes_allow(share_of_bytes, given):
    past = past_of(tokens=120, newest=2)
    number, context = 4, 120 - 4
    budget = share_of_bytes * 2 * 120 * (8 + 6) * number

    def size(keys, values):
        means = 2 * sum(4 * width for width, bits in ((8, keys), (6, values)) if bits < 16)  # float16, and spreads
        return 2 * context * (reference.row_bytes(8, keys, number) + reference.row_bytes(6, values, number)) + means

    fine = [(16, 16), (8, 8), (8, 6), (6, 6), (6, 5), (5, 5), (5, 4), (4, 4), (4, 3), (3, 3), (3, 2), (2, 2)]
    fine = [(5, 5)] if given else fine
    expected = next((pair for pair in fine if size(*pair) <= budget), fine[-1])
    for head in whole(past, settings(**given), budget):
        assert (head.key.rows.bits, head.value.rows.bits) == expected
        assert torch.equal(head.position, past.context)


@pytest.mark.parametrize("budget", [0.0, -100.0, 1.0])
def test_without_any_budget_there_is_still_a_cache(budget):
    past = past_of()
    heads = solved(past, settings(), budget)
    assert len(heads) == past.groups
    assert attention(past, heads).isfinite().all()


def test_everything_is_kept_as_it_is_where_bytes_allow():
    past = past_of()
    for group, head in enumerate(whole(past, settings(reserve_ratio=1.0), math.inf)):
        assert torch.equal(head.position.long(), past.context)
        assert torch.equal(head.key.dense(), past.key[group, past.context])
        assert torch.equal(head.value.dense(), past.value[group, past.context])
    truth = exact(past)[1]
    got = attention(past, whole(past, settings(reserve_ratio=1.0), math.inf))
    assert torch.allclose(got.reshape(truth.shape).double(), truth, atol=1e-5)


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("context", [0, 1, 2])
@pytest.mark.parametrize("method", ["paper", "solved"])
def test_next_to_no_context(sinks, context, method):
    past = past_of(tokens=5 + sinks + context, sinks=sinks)
    given = settings(method=method, reserve_ratio=0.3)
    heads = paper(past, given, 0, 2) if method == "paper" else solved(past, given, 50.0)
    assert all(set(head.position.tolist()) <= set(past.context.tolist()) for head in heads)
    assert attention(past, heads).isfinite().all()


# Settings.

NAN = float("nan")
BAD = [
    *itertools.product(("reserve_ratio", "theta_k", "theta_v", "beta"), (0, 0.0, -0.1, 1.0001, NAN, math.inf, True, "1")),
    *itertools.product(("window", "residual", "pool"), (0, -1, 1.5, True, None, "3", NAN)),
    *itertools.product(("sinks", "min_prompt"), (-1, 1.5, True, None, "3")),
    *itertools.product(("bits",), (0, 1, 7, 9, 12, 32, "4", [4], True, 2.5, NAN)),
    *itertools.product(("method", "heads", "divisor"), ("", "Paper", None, 1, ["paper"])),
    ("pool", 2), ("reserve_ratio", None), ("beta", None), ("greedy", "yes"), ("greedy", 1), ("greedy", None),
]  # fmt: skip


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in BAD))
def test_a_bad_setting_is_refused_by_its_name(name):
    for value in (value for named, value in BAD if named == name):
        with pytest.raises(ValueError, match=name):
            CacheSettings.of({}, {name: value})
        with pytest.raises(ValueError, match=name):
            CacheSettings.of({name: value})


@pytest.mark.parametrize("given", [0.3, "paper", [], [("bits", 4)], True, {1, 2}], ids=str)
def test_what_is_no_dictionary_is_refused(given):
    with pytest.raises(ValueError, match="dictionary"):
        CacheSettings.of({}, given)


@pytest.mark.parametrize("name", ["reserve", "theta", "window_size", 3])
def test_an_unknown_setting_is_refused_by_its_name(name):
    with pytest.raises(ValueError, match=str(name)):
        CacheSettings.of({}, {name: 1})


@pytest.mark.parametrize("name", ["window", "sinks", "residual", "min_prompt", "bits", "theta_k", "reserve_ratio"])
def test_good_settings_are_taken_over_those_of_the_config(name):
    value = {"bits": 4, "theta_k": 0.9, "reserve_ratio": 1}.get(name, 17)
    assert getattr(CacheSettings.of({name: value}), name) == value
    other = {"bits": 2, "theta_k": 0.8, "reserve_ratio": 0.5}.get(name, 18)
    assert getattr(CacheSettings.of({name: value}, {name: other}), name) == other
    assert CacheSettings.of({name: value}, None) == CacheSettings.of({name: value}, {})


def test_the_paper_s_settings_come_with_its_method():
    for settings_of in (CacheSettings.of({}, {"method": "paper"}), CacheSettings.of({"bits": 8}, {"method": "paper"})):
        assert (settings_of.theta_k, settings_of.theta_v, settings_of.beta, settings_of.bits) == (0.98, 0.95, 0.05, 16)
        assert (settings_of.heads, settings_of.pool, settings_of.greedy) == ("mask", 1, True)
    assert CacheSettings.of({}, {"method": "paper", "theta_k": 0.9}).theta_k == 0.9
    with pytest.raises(ValueError, match="beta"):
        CacheSettings.of({}, {"method": "paper", "beta": 0.4})
    with pytest.raises(ValueError, match="theta_k"):
        CacheSettings.of({}, {"method": "paper", "theta_k": None})


def test_the_operation_and_the_cache_know_the_same_settings_and_defaults():
    from surgery.operations.codebook_kv import CodebookKVSettings

    assert {field.name for field in fields(CacheSettings)} == set(CodebookKVSettings.model_fields)
    for given in ({}, {"method": "paper"}, {"method": "paper", "theta_v": 0.9, "reserve_ratio": 0.5}):
        written = CodebookKVSettings(**given).model_dump(mode="json")
        assert CacheSettings.of(written) == CacheSettings.of({}, given)
