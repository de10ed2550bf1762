"""A result with a codebook cache against its base: exact where nothing is lost, and by masks of the base where it is."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import codebook_reference as reference
from tests.codebook_reference import LOSSLESS, SMALL, convert, kept, load, tokens
from tests.tiny import write_tiny

EXACT = {"theta_k": 1.0, "theta_v": 1.0, "bits": 16}
PROMPT, STEPS = 60, 64
HEADS, GROUPS, WIDTH, LAYERS = 4, 2, 16, 3
SHARE = HEADS // GROUPS
WAYS = {
    "solved": {},
    "evicted": EXACT,
    "rounded": {"theta_k": 1.0, "theta_v": 1.0, "bits": 4},
    "shared": {"theta_k": 0.7, "theta_v": 0.6, "bits": 8},
    "paper": {"method": "paper"},
    "paper-union": {"method": "paper", "heads": "union", "theta_k": 0.7, "theta_v": 0.6},
}
QUICK = {"solved", "paper"}
every_way = pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[] if way in QUICK else [pytest.mark.slow]) for way in WAYS]
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codebook")
    write_tiny(folder / "base", "llama", num_hidden_layers=LAYERS, max_position_embeddings=512)
    convert(folder / "base", folder / "result")
    return folder


@pytest.fixture(scope="module")
def base(place):
    return load(place / "base")


@pytest.fixture(scope="module")
def eager(place):
    return load(place / "base", "eager")


@pytest.fixture(scope="module")
def result(place):
    return load(place / "result")


def fed(model, ids, prompt=PROMPT, chunk=1, mask=None, **settings):
    """A cache that has seen `ids`, the prompt at once and the rest in chunks, and the logits of the rest."""
    cache = model.surgery_cache(**SMALL | settings)
    given = {} if mask is None else {"attention_mask": mask[:, :prompt], "position_ids": places(mask)[:, :prompt]}
    out = [model(ids[:, :prompt], past_key_values=cache, **given).logits[:, -1:]]
    for start in range(prompt, ids.shape[1], chunk):
        stop = min(start + chunk, ids.shape[1])
        if mask is not None:
            given = {"attention_mask": mask[:, :stop], "position_ids": places(mask)[:, start:stop]}
        out.append(model(ids[:, start:stop], past_key_values=cache, **given).logits)
    return cache, torch.cat(out[1:], 1) if len(out) > 1 else out[0]


def places(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def padded(rows, lengths, total):
    """Left-padded ids and mask: the last `lengths` tokens of each row."""
    mask = torch.stack([torch.arange(total) >= total - length for length in lengths]).long()
    return rows * mask, mask


def written(model, ids, count=STEPS, **options):
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)


def state(cache):
    """Everything a cache holds of the past, row by row."""
    found = {}
    for index, layer in cache.stored.items():
        for row in range(len(layer.key)):
            found[index, row, "raw"] = (layer.key[row], layer.value[row], layer.position[row].long())
            for group, head in enumerate(layer.heads[row] if layer.heads else []):
                found[index, row, group] = (head.key.dense(), head.value.dense(), head.position.long(), head.mask)
    return found


def assert_same(one, other, atol=0.0, flips=0.0):
    """`flips` is the share of numbers that may be off: noise may put a code, or the scale of a row, on its next level."""
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        for a, b in zip(tensors, other[name], strict=True):
            if a is None or b is None:
                assert a is b is None, name
                continue
            assert a.shape == b.shape, (name, a.shape, b.shape)
            off = ((a - b).abs() > atol).float().mean() if a.numel() else 0
            assert off <= (flips if a.is_floating_point() else 0), (name, off, (a - b).abs().max())


# What is not changed.


def test_weights_are_those_of_the_base(place):
    assert (place / "base/model.safetensors").read_bytes() == (place / "result/model.safetensors").read_bytes()


def test_without_a_cache_it_is_the_base(base, result):
    ids = tokens(90, rows=2)
    assert torch.equal(result(ids, use_cache=False).logits, base(ids, use_cache=False).logits)
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    options = {"attention_mask": mask, "use_cache": False}
    assert torch.equal(result(ids, **options).logits, base(ids, **options).logits)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "uncached"])
def test_with_the_stock_cache_it_is_the_base(base, result, options):
    ids = tokens(50, rows=2)
    scored = {"output_scores": True, "return_dict_in_generate": True, **options}
    got, expected = (
        written(model, ids, 20, **scored, **more) for model, more in ((result, {"surgery_cache": None}), (base, {}))
    )
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.scores, expected.scores, strict=True))
    assert type(got.past_key_values) is type(expected.past_key_values)


def test_a_prompt_is_attended_exactly_however_it_is_coded(base, result):
    ids = tokens(PROMPT, rows=2)
    for way in WAYS.values():
        got = result(ids, past_key_values=result.surgery_cache(**SMALL, **way)).logits
        assert (got - base(ids).logits).abs().max() <= 1e-5


# Where nothing is lost.


@pytest.mark.parametrize("chunk", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "exact", [{}, EXACT, {"method": "paper", **EXACT, "heads": "mask"}], ids=["own", "given", "paper"]
)
def test_what_holds_everything_decodes_as_the_base(base, result, chunk, exact):
    ids = tokens(PROMPT + STEPS, rows=2)
    cache, logits = fed(result, ids, chunk=chunk, **{"reserve_ratio": 1.0, **exact})
    assert all(layer.heads is not None for layer in cache.stored.values()), "the coded path is what is tested"
    assert (logits - base(ids).logits[:, PROMPT:]).abs().max() <= 1e-4
    assert all(len(head.position) > PROMPT - 8 for layer in cache.stored.values() for head in layer.heads[0])


def test_what_holds_everything_writes_as_the_base(base, result):
    ids = tokens(PROMPT, rows=2)
    assert torch.equal(written(result, ids, surgery_cache=LOSSLESS), written(base, ids))


def test_short_prompts_stay_as_they_are(base, result):
    ids = tokens(40)
    cache, logits = fed(result, tokens(60), prompt=40, min_prompt=128)
    assert all(layer.heads is None for layer in cache.stored.values())
    assert (logits - base(tokens(60)).logits[:, 40:]).abs().max() <= 1e-4
    assert torch.equal(written(result, ids), written(base, ids)), "and so do the defaults"


def test_a_long_answer_to_a_short_prompt_is_coded(base, result):
    ids = tokens(120)
    cache, logits = fed(result, ids, prompt=5, chunk=3, min_prompt=40, reserve_ratio=1.0)
    assert all(layer.heads is not None for layer in cache.stored.values())
    assert (logits - base(ids).logits[:, 5:]).abs().max() <= 1e-4
    cache, logits = fed(result, ids, prompt=5, chunk=3, min_prompt=40, reserve_ratio=0.3)
    assert all(len(head.position) > 90 for layer in cache.stored.values() for head in layer.heads[0]), "nothing evicted"
    assert logits.isfinite().all()


def test_many_queries_attend_in_pieces(base, result, monkeypatch):
    module = sys.modules[type(result.surgery_cache()).__module__.replace("_cache", "_layer")]
    monkeypatch.setattr(module, "QUERIES", 3)
    ids = tokens(PROMPT + 20, rows=2)
    _, logits = fed(result, ids, chunk=10, reserve_ratio=1.0)
    assert (logits - base(ids).logits[:, PROMPT:]).abs().max() <= 1e-4


# What is evicted, against the base with masks.


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "paper", "reserve_ratio": 0.4, "heads": "mask"},
        {"method": "paper", "reserve_ratio": 0.7, "heads": "union", "pool": 5},
        {"method": "paper", "reserve_ratio": 0.3, "heads": "mean", "divisor": "paper"},
        {"reserve_ratio": 0.4},
        {"reserve_ratio": 0.5, "heads": "mean", "sinks": 0},
    ],
    ids=["mask", "union", "mean", "solved", "solved-mean"],
)
@pytest.mark.parametrize("chunk", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_answers_are_those_of_the_base_with_the_evicted_masked(eager, result, settings, chunk):
    ids = tokens(PROMPT + 30)
    prompt, _ = fed(result, ids[:, :PROMPT], **EXACT, **settings)
    visible = {(layer, head): kept(prompt, layer, 0, head, SHARE) for layer in range(LAYERS) for head in range(HEADS)}
    assert any(len(of) < PROMPT - 10 for of in visible.values()), "something must be gone"
    expected = reference.masked(eager, ids, PROMPT, visible)
    assert (expected - eager(ids).logits[:, PROMPT:]).abs().max() > 1e-2, "and must be missed"
    cache, logits = fed(result, ids, chunk=chunk, **EXACT, **settings)
    assert (logits - expected).abs().max() <= 1e-4
    for layer in range(LAYERS):
        for head in range(HEADS):
            now = kept(cache, layer, 0, head, SHARE)
            assert now == visible[layer, head] | set(range(PROMPT, PROMPT + 30)), "answers are not evicted"


@pytest.mark.parametrize("how", ["mask", "union", "mean"])
@pytest.mark.parametrize(("ratio", "pool", "divisor"), [(0.3, 1, "window"), (0.6, 5, "paper"), (0.8, 1, "paper")])
def test_the_paper_keeps_the_top_of_the_base_s_own_attention(eager, result, how, ratio, pool, divisor):
    ids, window, sinks = tokens(PROMPT, rows=2, seed=5), SMALL["window"], SMALL["sinks"]
    weights = eager(ids, output_attentions=True).attentions
    settings = {"method": "paper", "reserve_ratio": ratio, "heads": how, "pool": pool, "divisor": divisor}
    cache, _ = fed(result, ids, theta_k=1.0, theta_v=1.0, **settings)
    context = PROMPT - window - sinks
    shares = reference.line((ratio * PROMPT - window - sinks) / context, 0.05, LAYERS)
    for layer in range(LAYERS):
        keep = math.floor(shares[layer] * context)
        for row in range(2):
            found = torch.tensor(reference.window_scores(weights[layer][row], window, sinks, pool, divisor))
            if how == "mean":
                found = found.unflatten(0, (GROUPS, SHARE)).mean(1).repeat_interleave(SHARE, 0)
            raw = {*range(sinks), *range(PROMPT - window, PROMPT)}
            if pool > 1:  # equal scores leave a choice
                for head in range(HEADS):
                    places = kept(cache, layer, row, head, SHARE) - raw
                    if how != "union":
                        got = sorted(float(found[head, place - sinks]) for place in places)
                        assert got == pytest.approx(sorted(found[head].tolist())[len(found[head]) - keep :], abs=1e-5)
                    else:
                        assert keep <= len(places) <= SHARE * keep
                continue
            chosen = [reference.best(of, keep, sinks) for of in found.tolist()]
            for head in range(HEADS):
                group = head // SHARE * SHARE
                expected = chosen[head] if how != "union" else set().union(*chosen[group : group + SHARE])
                assert kept(cache, layer, row, head, SHARE) == expected | raw
                position = cache.stored[layer].heads[row][head // SHARE].position
                assert (position[1:] > position[:-1]).all()


def test_what_is_solved_keeps_the_top_of_the_base_s_own_attention(eager, result):
    ids, window, sinks = tokens(PROMPT, seed=6), SMALL["window"], SMALL["sinks"]
    weights = eager(ids, output_attentions=True).attentions
    cache, _ = fed(result, ids, **EXACT, reserve_ratio=0.4, pool=1)
    for layer in range(LAYERS):
        found = torch.tensor(reference.window_scores(weights[layer][0], window, sinks))
        found = found.unflatten(0, (GROUPS, SHARE)).amax(1)
        newest = {*range(PROMPT - window, PROMPT)}
        for group in range(GROUPS):
            places = kept(cache, layer, 0, group * SHARE, SHARE)
            assert newest <= places, "whose queries judge is not evicted"
            places -= newest | set(range(sinks))
            assert 0 < len(places) < PROMPT - window - sinks
            assert places == reference.best(found[group].tolist(), len(places), sinks)


# Codes.


@pytest.mark.parametrize("search", [False, True], ids=["at-once", "greedy"])
def test_codes_are_near_what_they_stand_for(base, result, search):
    ids = tokens(120, low=3, high=20)
    stock = base(ids, use_cache=True).past_key_values
    exact, _ = fed(result, ids, prompt=120, reserve_ratio=1.0)
    cache, _ = fed(result, ids, prompt=120, method="paper", reserve_ratio=0.9, theta_k=0.9, theta_v=0.8, greedy=search)
    some = 0
    for layer in range(LAYERS):
        for group in range(GROUPS):
            head, all_of = cache.stored[layer].heads[0][group], exact.stored[layer].heads[0][group]
            which = torch.tensor([all_of.position.tolist().index(p) for p in head.position.tolist()])
            for coded, whole, theta in ((head.key, all_of.key, 0.9), (head.value, all_of.value, 0.8)):
                true, got = whole.dense()[which], coded.dense()
                error = (got - true).norm(dim=-1) / true.norm(dim=-1)
                assert (error <= math.sqrt(2 * (1 - theta)) + 1e-3).all()
                assert torch.allclose(got.norm(dim=-1), true.norm(dim=-1), rtol=1e-3)
                some += len(coded) - len(coded.rows)
            assert torch.allclose(all_of.value.dense(), stock_of(stock, layer)[1][0, group, all_of.position.long()])
    assert some > 20, "codes must be shared"


def stock_of(cache, layer):
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys, cache.layers[layer].values
    return cache.key_cache[layer], cache.value_cache[layer]


@pytest.mark.parametrize("repeated", [2, 7, 40])
def test_the_first_layer_has_a_row_for_each_different_token(result, repeated):
    ids = tokens(150, low=3, high=3 + repeated)
    cache, _ = fed(result, ids, prompt=150, bits=16, reserve_ratio=0.5)
    exact, _ = fed(result, ids, prompt=150, reserve_ratio=1.0)
    for head, all_of in zip(cache.stored[0].heads[0], exact.stored[0].heads[0], strict=True):
        seen = set(ids[0, head.position.long()].tolist())
        assert len(head.position) == 150 - SMALL["residual"] - SMALL["sinks"], "sharing leaves room for all"
        assert len(head.key.rows) == len(head.value.rows) == len(seen)
        assert torch.allclose(head.key.dense(), all_of.key.dense(), atol=1e-5)
        assert torch.allclose(head.value.dense(), all_of.value.dense(), atol=1e-5)


@pytest.mark.parametrize("repeated", [1, 2, 17])
def test_the_paper_s_codebook_of_the_first_layer_has_one_code_for_each_token(result, repeated):
    ids = tokens(150, low=3, high=3 + repeated)
    cache, _ = fed(result, ids, prompt=150, method="paper", reserve_ratio=0.9, theta_k=0.9999, theta_v=0.9999)
    for head in cache.stored[0].heads[0]:
        seen = set(ids[0, head.position.long()].tolist())
        assert len(head.key.rows) == len(head.value.rows) == len(seen)


def test_embeddings_have_no_ids_to_share_by(result):
    ids = tokens(150, low=3, high=10)
    cache = result.surgery_cache(**SMALL, bits=16, reserve_ratio=0.5)
    result(inputs_embeds=result.model.embed_tokens(ids), past_key_values=cache)
    assert cache.stored[0].heads[0][0].position.numel() > 0
    for head in cache.stored[0].heads[0]:
        assert head.key.ref is None or head.key.length is not None
    mixed = result.surgery_cache(**SMALL, bits=16, reserve_ratio=0.5, prompt_length=150)
    result(ids[:, :50], past_key_values=mixed)
    result(inputs_embeds=result.model.embed_tokens(ids[:, 50:]), past_key_values=mixed)
    for head in mixed.stored[0].heads[0]:
        assert head.key.ref is None or head.key.length is not None


@pytest.mark.parametrize(
    "settings",
    [{"reserve_ratio": 0.15}, pytest.param({"bits": 3}, marks=pytest.mark.slow), {"method": "paper"}],
    ids=str,
)
def test_a_prompt_of_one_token_again_and_again(result, settings):
    ids = torch.cat([torch.full((1, PROMPT), 7), tokens(30)], 1)
    _, logits = fed(result, ids, **settings)
    assert logits.isfinite().all()


def test_lengths_matter(result, base):
    ids = tokens(PROMPT + 8, low=3, high=20)
    settings = {"method": "paper", "reserve_ratio": 0.9, "theta_k": 0.95, "theta_v": 0.95}
    _, logits = fed(result, ids, **settings)
    cache, _ = fed(result, ids[:, :PROMPT], **settings)
    some = 0
    for layer in cache.stored.values():
        for head in layer.heads[0]:
            for side in (head.key, head.value):
                if side.length is not None:
                    some += 1
                    side.length.fill_(1.0)
    assert some
    without = torch.cat([result(one, past_key_values=cache).logits for one in ids[:, PROMPT:].split(1, 1)], 1)
    true = base(ids).logits[:, PROMPT:]
    assert (without - true).norm() > 2 * (logits - true).norm()


# Positions.


@pytest.mark.parametrize("rope", ["default", "linear", "llama3", "yarn"])
def test_stored_keys_turn_into_those_of_the_stock_cache(tmp_path, rope):
    write_tiny(tmp_path / "base", "llama", rope)
    convert(tmp_path / "base", tmp_path / "out")
    base, result = load(tmp_path / "base"), load(tmp_path / "out")
    ids = tokens(255)  # the last place of the model
    stock = base(ids, use_cache=True).past_key_values
    cache, logits = fed(result, ids, prompt=200, chunk=11, reserve_ratio=1.0)
    assert (logits - base(ids).logits[:, 200:]).abs().max() <= 1e-4
    for layer in cache.stored:
        key = stock_of(stock, layer)[0][0]
        stored = cache.stored[layer]
        for group, head in enumerate(stored.heads[0]):
            states = torch.cat([head.key.dense(), stored.key[0, group]])[None, None]
            position = torch.cat([head.position, stored.position[0]]).long()
            cos, sin = base.model.rotary_emb(states, position[None])
            turned = apply_rotary_pos_emb(states, states, cos, sin)[1][0, 0]
            assert sorted(position.tolist()) == list(range(255))
            assert torch.allclose(turned, key[group, position], atol=1e-4)


@every_way
def test_the_length_is_what_was_seen(result, way):
    ids = tokens(PROMPT + 20, rows=2)
    cache = result.surgery_cache(**SMALL, **WAYS[way])
    for start, stop in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + 13)), (PROMPT + 13, PROMPT + 20)]:
        result(ids[:, start:stop], past_key_values=cache)
        assert cache.get_seq_length() == stop
        assert all(cache.get_seq_length(layer) == stop for layer in range(LAYERS))
        assert cache.get_mask_sizes(3, 0) == (stop + 3, 0)
        assert all(layer.position[:, -1].tolist() == [stop - 1] * 2 for layer in cache.stored.values())
    assert len(cache) == LAYERS


def test_left_padding_counts_neither_for_places_nor_for_what_is_kept(result):
    lengths = [50, 35, 28]
    ids, mask = padded(tokens(PROMPT, rows=3), lengths, PROMPT)
    cache, _ = fed(result, ids, mask=mask, method="paper", reserve_ratio=0.5)
    assert cache.get_seq_length() == PROMPT
    for layer in cache.stored.values():
        for row, length in enumerate(lengths):
            raw = [p for p in layer.position[row].tolist() if p >= 0]
            assert raw == [0, 1, *range(length - SMALL["window"], length)]
            for head in layer.heads[row]:
                assert set(head.position.tolist()) <= set(range(2, length - SMALL["window"]))


# Bytes.


def bytes_by_formula(cache):
    """Section 4 of the specification from counts, and two bytes for each place."""
    total, shared = 8 * len(cache.tokens), set()
    for layer in cache.stored.values():
        number, widths = layer.key.element_size(), (layer.key.shape[-1], layer.value.shape[-1])
        batch, groups, raw = layer.key.shape[:3]
        total += batch * raw * (groups * sum(widths) * number + 2)
        for head in (head for row in layer.heads or [] for head in row):
            count = len(head)
            places = head.position
            if (places.diff() != 1).any() and id(head.place) not in shared:  # of a run the first is a number
                shared.add(id(head.place))  # heads that keep the same tokens say once where these stood
                total += 2 * count
            if head.mask is not None:
                total += count * math.ceil(SHARE / 8)
            for side, width in zip((head.key, head.value), widths, strict=True):
                codes, bits = len(side.rows), side.rows.bits
                total += codes * reference.row_bytes(width, bits, number)
                if bits < 16:
                    total += width * (side.rows.centre.element_size() + side.rows.spread.element_size())
                if side.ref is not None and (side is head.key or side.ref is not head.key.ref):
                    total += 2 * count
                if side.length is not None:
                    total += 2 * count
    return total


@every_way
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("ratio", [0.3, pytest.param(0.15, marks=pytest.mark.slow)])
def test_reported_bytes_are_those_that_are_held(result, way, ratio, dtype):
    model = result if dtype == torch.float32 else bfloat(result)
    ids = tokens(320, rows=2, high=60)
    for prompt, total in ((320, 320), (300, 320)):
        cache, _ = fed(model, ids[:, :total], prompt=prompt, reserve_ratio=ratio, **WAYS[way])
        report = model.surgery_cache_report(cache)
        held = list(reference.reachable(cache))
        assert report["bytes"] == sum(t.nbytes for t in held)
        assert report["bytes"] == reference.memory(held), "and no view keeps more alive"
        assert report["bytes"] == bytes_by_formula(cache)
        kinds = ("raw", "codes", "indices", "lengths", "positions", "masks")
        assert all(sum(of[kind] for kind in kinds) == of["bytes"] for of in report["layers"])
        assert report["bytes"] == sum(of["bytes"] for of in report["layers"]) + cache.tokens.nbytes
        stock = 2 * LAYERS * GROUPS * total * 2 * WIDTH * (4 if dtype == torch.float32 else 2)
        assert report["stock_bytes"] == stock
        assert report["ratio"] == report["bytes"] / stock
        if prompt == total and "paper" not in way:
            assert report["ratio"] <= ratio + 0.02


_bfloat = []


def bfloat(model):
    if not _bfloat:
        _bfloat.append(copy.deepcopy(model).bfloat16())
    return _bfloat[0]


@every_way
def test_bfloat_16_decodes(result, way):
    _, logits = fed(bfloat(result), tokens(PROMPT + 20, rows=2), **WAYS[way])
    assert logits.isfinite().all()
    assert logits.dtype == torch.bfloat16


def test_bfloat_16_is_near_the_stock_cache_where_nothing_is_lost(result):
    ids = tokens(PROMPT + 20, rows=2)
    stock = bfloat(result)(ids, use_cache=False).logits[:, PROMPT:]
    _, logits = fed(bfloat(result), ids, reserve_ratio=1.0)
    truth = result(ids, use_cache=False).logits[:, PROMPT:]
    assert (logits - truth).norm() <= 1.5 * (stock - truth).norm()


def test_the_report_of_the_last_call(place):
    model = load(place / "result")
    with pytest.raises(ValueError, match="nothing was generated"):
        model.surgery_cache_report()
    written(model, tokens(PROMPT), 5, surgery_cache={**SMALL, "reserve_ratio": 0.4})
    report = model.surgery_cache_report()
    assert [layer["layer"] for layer in report["layers"]] == list(range(LAYERS))
    assert report["stock_bytes"] == LAYERS * GROUPS * (PROMPT + 4) * 2 * WIDTH * 4
    assert 0 < report["ratio"] < 0.7
    empty = model.surgery_cache().report()
    assert (empty["bytes"], empty["ratio"]) == (0, 1.0)


# Sequences beside each other.


@every_way
def test_a_padded_row_is_the_row_alone(result, way):
    lengths = [60, 45, 31]
    ids, mask = padded(tokens(PROMPT + 12, rows=3), [length + 12 for length in lengths], PROMPT + 12)
    cache, logits = fed(result, ids, mask=mask, reserve_ratio=0.3, **WAYS[way])
    together = state(cache)
    for row, length in enumerate(lengths):
        alone, expected = fed(
            result, ids[row : row + 1, PROMPT - length :], prompt=length, reserve_ratio=0.3, **WAYS[way]
        )
        rounds = way in ("solved", "rounded", "shared")
        assert (logits[row] - expected[0]).abs().max() <= (1e-2 if rounds else 1e-4)
        mine = {(layer, 0, name): held for (layer, at, name), held in together.items() if at == row}
        assert_same(mine, state(alone), atol=1e-5, flips=0.15 if rounds else 0.0)


@pytest.mark.parametrize("length", [1, *(pytest.param(length, marks=pytest.mark.slow) for length in (8, 29)), 30])
@pytest.mark.parametrize("method", ["paper", "solved"])
def test_a_row_may_be_shorter_than_what_stays_as_it_is(base, result, length, method):
    """Sinks and window are eight tokens here, so that nothing of some of these rows is there to be coded."""
    ids, mask = padded(tokens(PROMPT + 10, rows=2), [PROMPT + 10, length + 10], PROMPT + 10)
    cache, logits = fed(result, ids, mask=mask, reserve_ratio=0.3, method=method, min_prompt=30)
    assert logits.isfinite().all()
    if length >= 30:
        return
    expected = base(ids[1:, PROMPT - length :]).logits[:, length:]
    assert (logits[1] - expected[0]).abs().max() <= 1e-4, "a prompt that would stay as it is alone loses nothing here"
    for layer in cache.stored.values():
        for head in layer.heads[1]:
            assert head.key.rows.bits == head.value.rows.bits == 16
            held = [*head.position.tolist(), *(at for at in layer.position[1].tolist() if at >= 0)]
            assert sorted(held) == list(range(length + 10))


def test_a_short_row_beside_a_long_one_with_the_defaults(base, result):
    ids, mask = padded(tokens(200, rows=2), [200, 20], 200)
    out = written(result, ids, 12, attention_mask=mask)
    assert torch.equal(out[1, 180:], written(base, ids[1:, 180:], 12)[0])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["paper", "solved"])
def test_what_is_broken_stays_whole_and_by_itself(result, broken, method):
    """The stock model answers NaN from there on; so does this, without an error and not in the row beside it."""
    ids, settings = tokens(PROMPT + 12, rows=2), {"reserve_ratio": 0.3, "method": method}
    embedded = result.model.embed_tokens(ids)
    embedded[0, 20, 3] = broken
    cache = result.surgery_cache(**SMALL, **settings)
    logits = torch.cat(
        [result(inputs_embeds=of, past_key_values=cache).logits for of in embedded.split([PROMPT, *[1] * 12], 1)], 1
    )
    assert logits[0, 20:].isnan().all()
    if method == "solved":
        for head in (head for layer in cache.stored.values() for head in layer.heads[0]):
            assert (head.key.rows.bits, head.key.ref, head.value.ref) == (16, None, None)
            assert len(head) >= PROMPT - SMALL["residual"] - SMALL["sinks"], "nothing is evicted by scores that are NaN"
    alone = result.surgery_cache(**SMALL, **settings)
    expected = [
        result(inputs_embeds=of, past_key_values=alone).logits for of in embedded[1:].split([PROMPT, *[1] * 12], 1)
    ]
    assert (logits[1] - torch.cat(expected, 1)[0]).abs().max() <= 1e-4


def test_padded_rows_are_the_base_s_where_nothing_is_lost(base, result):
    ids, mask = padded(tokens(PROMPT, rows=3), [60, 41, 15], PROMPT)
    got, expected = (
        written(model, ids, attention_mask=mask, **more)
        for model, more in ((result, {"surgery_cache": LOSSLESS}), (base, {}))
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("padding", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize(
    "options",
    [pytest.param({"num_beams": 4}, marks=pytest.mark.slow), {"num_beams": 3, "num_return_sequences": 2}],
    ids=["4", "3-of-which-2"],
)
def test_beams_are_the_base_s_where_nothing_is_lost(base, result, padding, options):
    ids, mask = padded(tokens(PROMPT, rows=2), [60, 35 if padding else 60], PROMPT)
    got, expected = (
        written(model, ids, 24, attention_mask=mask, **options, **more)
        for model, more in ((result, {"surgery_cache": LOSSLESS}), (base, {}))
    )
    assert torch.equal(got, expected)


@every_way
def test_beams_follow_what_is_coded(result, way):
    """Reordered beams must score as their tokens do when they are read anew."""
    ids = tokens(PROMPT)
    settings = {**SMALL, "reserve_ratio": 0.4, **WAYS[way]}
    scored = {"output_scores": True, "return_dict_in_generate": True}
    out = written(result, ids, 10, num_beams=3, num_return_sequences=3, surgery_cache=settings, **scored)
    first = result(ids, use_cache=False).logits[:, -1:]
    for row, score in zip(out.sequences, out.sequences_scores, strict=True):
        _, logits = fed(result, row[None], **settings)
        every = torch.cat([first, logits[:, :-1]], 1).log_softmax(-1)
        assert abs(float(every.gather(-1, row[None, PROMPT:, None]).mean() - score)) <= 1e-3


@every_way
def test_rows_are_permuted_repeated_and_chosen(result, way):
    ids = tokens(PROMPT + 12, rows=3)
    more = tokens(3, rows=3, seed=8)
    made, _ = fed(result, ids, reserve_ratio=0.4, **WAYS[way])
    before = state(made)
    expected_logits = result(more, past_key_values=copy.deepcopy(made)).logits
    for name, arguments, rows in (
        ("reorder_cache", (torch.tensor([2, 0, 0]),), [2, 0, 0]),
        ("batch_repeat_interleave", (2,), [0, 0, 1, 1, 2, 2]),
        ("batch_select_indices", (torch.tensor([1]),), [1]),
    ):
        cache = copy.deepcopy(made)
        getattr(cache, name)(*arguments)
        expected = {
            (layer, new, kind): held
            for new, old in enumerate(rows)
            for (layer, row, kind), held in before.items()
            if row == old
        }
        assert_same(state(cache), expected)
        got = result(more[rows], past_key_values=cache).logits
        assert (got - expected_logits[rows]).abs().max() <= 1e-4
        assert cache.report()["stock_bytes"] == len(rows) * LAYERS * GROUPS * (PROMPT + 15) * 2 * WIDTH * 4


@pytest.mark.parametrize("raw", [False, True], ids=["coded", "raw"])
def test_sampling_several_sequences(result, base, raw):
    ids = tokens(PROMPT, rows=2)
    found = []
    for model, more in ((result, {"surgery_cache": {**LOSSLESS, "min_prompt": 500 if raw else 8}}), (base, {})):
        torch.manual_seed(3)
        found.append(written(model, ids, 20, do_sample=True, num_return_sequences=3, **more))
    assert torch.equal(*found)


# Taking tokens back.


@every_way
@pytest.mark.parametrize("answered", [*(pytest.param(count, marks=pytest.mark.slow) for count in (0, 3)), 9])
def test_tokens_within_the_residual_are_taken_back(result, way, answered):
    ids = tokens(PROMPT + answered, rows=2)
    once, _ = fed(result, ids, reserve_ratio=0.4, **WAYS[way])
    back, _ = fed(result, ids, reserve_ratio=0.4, **WAYS[way])
    result(tokens(3, rows=2, seed=7), past_key_values=back)
    if all(
        a.key.shape[2] + 3 == b.key.shape[2] for a, b in zip(once.stored.values(), back.stored.values(), strict=True)
    ):
        back.crop(-3)
        assert_same(state(back), state(once))
    else:  # coded meanwhile; they are still there to be taken back
        back.crop(-3)
    assert back.get_seq_length() == once.get_seq_length()
    assert back.report()["stock_bytes"] == once.report()["stock_bytes"]
    more = tokens(1, rows=2, seed=9)
    if answered < 9:
        assert torch.equal(result(more, past_key_values=back).logits, result(more, past_key_values=once).logits)


@pytest.mark.parametrize("length", [True, False], ids=["to", "by"])
@pytest.mark.parametrize("coded", [True, False])
def test_what_is_coded_is_not_taken_back(result, length, coded):
    ids = tokens(PROMPT + 9, rows=2)
    cache, _ = fed(result, ids, reserve_ratio=0.4, **({} if coded else {"min_prompt": 500}))
    before, tokens_before = state(cache), cache.tokens.clone()
    count = 30
    if coded:
        with pytest.raises(ValueError, match=r"30 tokens are to be taken back"):
            cache.crop(cache.get_seq_length() - count if length else -count)
        assert_same(state(cache), before)
        assert torch.equal(cache.tokens, tokens_before)
        assert cache.get_seq_length() == PROMPT + 9
        return
    cache.crop(cache.get_seq_length() - count if length else -count)
    fresh, _ = fed(result, ids[:, :-count], prompt=PROMPT + 9 - count, min_prompt=500)
    assert cache.get_seq_length() == PROMPT + 9 - count
    assert_same(state(cache), state(fresh), atol=1e-5)


def test_a_part_of_a_prompt_is_taken_back_with_its_ids_and_queries(result):
    """Tokens that were there for a while must leave no trace in what the complete prompt becomes."""
    ids = tokens(120, low=3, high=20)
    plain, cropped = (result.surgery_cache(prompt_length=120, **SMALL, bits=16, reserve_ratio=0.5) for _ in range(2))
    result(ids[:, :57], past_key_values=plain)
    result(ids[:, :57], past_key_values=cropped)
    result(tokens(9, seed=8), past_key_values=cropped)
    cropped.crop(-9)
    for cache in (plain, cropped):
        result(ids[:, 57:60], past_key_values=cache)
        result(ids[:, 60:118], past_key_values=cache)
        result(ids[:, 118:], past_key_values=cache)
    assert all(layer.heads is not None for layer in cropped.stored.values())
    assert_same(state(cropped), state(plain), atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}], ids=["lookup", "assisted"]
)
@pytest.mark.parametrize(
    "configured", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["called", "configured"]
)
def test_guessed_tokens_are_taken_back(base, result, options, configured, monkeypatch):
    """However small the residual is set: while there are guesses, enough tokens stay as they are."""
    ids, made = tokens(35).repeat(1, 4), []
    module = sys.modules[next(of.__module__ for of in type(result).__mro__ if of.__name__ == "CodebookGeneration")]
    new = module.new_cache
    monkeypatch.setattr(module, "new_cache", lambda *given: made.append(new(*given)) or made[-1])
    if "assistant_model" in options:
        options = {"assistant_model": base}
    elif configured:
        config = copy.deepcopy(result.generation_config)
        config.prompt_lookup_num_tokens = 3
        options = {"generation_config": config}
    got = written(result, ids, 90, surgery_cache=LOSSLESS, **options)
    assert torch.equal(got, written(base, ids, 90))
    (cache,) = made
    assert cache.settings.residual == 64
    assert all(layer.heads is not None and len(layer.heads[0][0]) > 60 for layer in cache.stored.values())
    made.clear()
    written(result, ids, 2, surgery_cache={**LOSSLESS, "residual": 80}, **options)
    written(result, ids, 2, surgery_cache=LOSSLESS)
    assert [cache.settings.residual for cache in made] == [80, SMALL["residual"]]


# How it is told, and what it refuses.


def test_a_generation_config_may_say_it(result):
    ids = tokens(PROMPT)

    def ratio(**options):
        written(result, ids, 4, **options)
        return result.surgery_cache_report()["ratio"]

    config = copy.deepcopy(result.generation_config)
    assert isinstance(config, GenerationConfig)
    config.surgery_cache = {**SMALL, "reserve_ratio": 1.0}
    given = {"generation_config": config}
    assert ratio(**given) > 0.9
    assert ratio(**given, surgery_cache={**SMALL, "reserve_ratio": 0.3}) < 0.6
    old = result.generation_config
    try:
        result.generation_config = config
        assert ratio() > 0.9
    finally:
        result.generation_config = old


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ratio": 0.3}, "ratio"),
        ({"reserve_ratio": 0}, "reserve_ratio"),
        ({"bits": 7}, "bits"),
        (0.3, "dictionary"),
        ({"window": True}, "window"),
    ],
    ids=str,
)
def test_generate_refuses_bad_settings_by_name(result, settings, named):
    with pytest.raises(ValueError, match=named):
        written(result, tokens(10), 2, surgery_cache=settings)
    config = copy.deepcopy(result.generation_config)
    config.surgery_cache = settings
    with pytest.raises(ValueError, match=named):
        written(result, tokens(10), 2, generation_config=config)


def test_static_caches_are_refused_by_name_and_allowed_without_ours(base, result):
    ids = tokens(20)
    with pytest.raises(ValueError, match=r"static.*surgery_cache=None"):
        written(result, ids, 4, cache_implementation="static")
    got = written(result, ids, 8, cache_implementation="static", surgery_cache=None, disable_compile=True)
    assert torch.equal(got, written(base, ids, 8))


def test_masks_that_are_not_by_token_are_refused(result):
    ids = tokens(20)
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"\[batch, tokens\]"):
        result(ids, attention_mask=mask)
    assert result(ids, attention_mask=mask, use_cache=False).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler, about what it leaves alone
def test_what_is_compiled_gives_the_same(result):
    """The compiler leaves the cache alone, whose sizes depend on the text, and runs it as it stands."""
    compiled = torch.compile(copy.deepcopy(result), backend="eager")
    try:
        ids = tokens(PROMPT + 3)
        cache = result.surgery_cache(**SMALL, reserve_ratio=0.4)
        got = [compiled(part, past_key_values=cache).logits for part in ids.split([PROMPT, 1, 1, 1], 1)]
    finally:
        torch._dynamo.reset()
    _, logits = fed(result, ids, reserve_ratio=0.4)
    assert torch.allclose(torch.cat(got[1:], 1), logits, atol=1e-4)


def test_a_layer_is_not_written_from_outside(result):
    cache = result.surgery_cache()
    with pytest.raises(TypeError, match="layer 0"):
        cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0)


def test_neither_ids_nor_embeddings(result):
    with pytest.raises(ValueError, match="inputs_embeds"):
        result(past_key_values=result.surgery_cache())


def test_training_has_no_cache_and_gradients(place):
    model = load(place / "result").train()
    with torch.enable_grad():
        out = model(tokens(20), labels=tokens(20))
        out.loss.backward()
    assert type(out.past_key_values).__name__ != "CodebookCache"
    assert model.model.embed_tokens.weight.grad.isfinite().all()


# Turns and parts of prompts.


@pytest.mark.parametrize("options", [LOSSLESS, {**SMALL, "reserve_ratio": 0.4}], ids=["lossless", "coded"])
def test_a_second_turn_goes_on(base, result, options):
    ids, cache = tokens(PROMPT), result.surgery_cache(**options)
    first = written(result, ids, 12, past_key_values=cache)
    assert cache.get_seq_length() == PROMPT + 11
    second = written(result, torch.cat([first, tokens(17, seed=4)], 1), 12, past_key_values=cache)
    assert cache.get_seq_length() == PROMPT + 12 + 17 + 11
    assert second.shape[1] == PROMPT + 41
    if options is LOSSLESS:
        turn = written(base, ids, 12)
        assert torch.equal(second, written(base, torch.cat([turn, tokens(17, seed=4)], 1), 12))


@every_way
@pytest.mark.parametrize("parts", [[7, 50, 3], [57, 1, 1, 1]], ids=str)
def test_a_prompt_in_parts_is_the_prompt(result, way, parts):
    ids, mask = padded(tokens(PROMPT, rows=2), [60, 41], PROMPT)
    settings = {**SMALL, "reserve_ratio": 0.4, **WAYS[way]}
    whole, cache = result.surgery_cache(**settings), result.surgery_cache(prompt_length=PROMPT, **settings)
    given = {"attention_mask": mask, "position_ids": places(mask)}
    result(ids, past_key_values=whole, **given)
    at = 0
    for part in parts:
        stop = at + part
        given = {"attention_mask": mask[:, :stop], "position_ids": places(mask)[:, at:stop]}
        result(ids[:, at:stop], past_key_values=cache, **given)
        at = stop
        assert (cache.stored[0].heads is not None) == (at == PROMPT)
    positions = [{name: (held[2],) for name, held in state(one).items()} for one in (cache, whole)]
    if way in ("paper", "paper-union"):  # its judges are the window alone, which the parts remember
        assert_same(*positions)
        assert_same(state(cache), state(whole), atol=1e-5)
    assert cache.report()["ratio"] <= whole.report()["ratio"] + 0.05


def test_a_long_prompt_in_parts_by_generate(base, result):
    ids = tokens(PROMPT)
    got = written(result, ids, 20, prefill_chunk_size=16, surgery_cache=LOSSLESS)
    assert torch.equal(got, written(base, ids, 20))


def test_a_cache_that_was_reset_is_new(result):
    ids = tokens(PROMPT + 10)
    cache, _ = fed(result, tokens(PROMPT + 9, rows=2, seed=4), reserve_ratio=0.4)
    cache.reset()
    assert (cache.get_seq_length(), cache.report()["bytes"]) == (0, 0)
    fresh = result.surgery_cache(**SMALL, reserve_ratio=0.4)
    for one in (cache, fresh):
        result(ids, past_key_values=one)
    assert_same(state(cache), state(fresh))


def test_saving_and_loading_keeps_the_cache(result, base, tmp_path):
    result.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    ids = tokens(PROMPT)
    assert torch.equal(written(again, ids, 20, surgery_cache=LOSSLESS), written(base, ids, 20))
