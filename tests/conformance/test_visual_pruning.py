"""Results of visual_pruning against stock models that see everything under a mask, and against brute force."""

import copy
import inspect
import json
import pickle
import sys
import threading
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import cross_entropy

from surgery.operations.visual_pruning import Scorer, scorer_shapes
from surgery.runtime import surgery_visual_scorer as scorer_file
from surgery.runtime.surgery_visual_pruning import PRUNED, checked_reserve

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.tiny_vision import FAMILIES, VIDEOS, clip_of, inputs_of, write_tiny_vision
from tests.visual_reference import (
    PER_TOKEN,
    SCORER,
    UNWANTED,
    convert,
    entering,
    greedy_dpp,
    kept_mask,
    load,
    longer,
    masked,
    padded,
    placeholders,
    prefix,
    quota,
    recomputed,
    runs,
    sorted_best,
    with_scorer,
)

CLOSE = {"rtol": 0, "atol": 2e-5}
QUICK = ("llava", "qwen3_vl")  # where what a test looks at is the same in all families
MIXED = (1, 2, 0)
GREEDY = {"do_sample": False, "max_new_tokens": 8, "suppress_tokens": UNWANTED}
families = pytest.mark.parametrize("family", FAMILIES)
quick_families = pytest.mark.parametrize("family", QUICK)
ruled = pytest.mark.parametrize("kind", ["plain", "trained"])


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("visual")

    @cache
    def made(family, kind):
        """base; plain, which keeps half by the rule; trained, which keeps 0.3 by a scorer of random weights."""
        if kind == "base":
            return write_tiny_vision(place / family / kind, family)
        if kind == "plain":
            return convert(made(family, "base"), place / family / kind, reserve=0.5)
        return with_scorer(convert(made(family, "base"), place / family / "more", reserve=0.3), place / family / kind)

    return made


@pytest.fixture(scope="module")
def model(folder):
    return cache(lambda family, kind, attention="sdpa": load(folder(family, kind), attention))


def prompt(batch):
    """Without what is seen in it."""
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def written(model, batch, count=8, **options):
    return model.generate(**batch, **GREEDY | {"max_new_tokens": count} | options)


def answer(model, batch, **options):
    return written(model, batch, **options)[:, batch["input_ids"].shape[1] :]


def widths(past):
    return {layer.keys.shape[-2] for layer in past.layers} | {layer.values.shape[-2] for layer in past.layers}


# All of them: the base.


@families
@pytest.mark.parametrize("images", [(1,), MIXED])
def test_all_of_them_is_the_base_bit_for_bit(model, family, images):
    base, result = model(family, "base"), model(family, "trained")
    batch = inputs_of(family, images)
    expected, got = base(**batch), result(**batch, visual_reserve=1.0)
    assert torch.equal(got.logits, expected.logits)
    assert not hasattr(got, "kept_indices")
    for mine, theirs in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
    for options in ({}, {"num_beams": 2}):
        assert torch.equal(written(result, batch, visual_reserve=1, **options), written(base, batch, **options))


@families
def test_text_alone_is_the_base_bit_for_bit(model, family):
    base, result = model(family, "base"), model(family, "plain")
    batch = prompt(inputs_of(family, (0, 0)))
    assert torch.equal(result(**batch).logits, base(**batch).logits)
    assert torch.equal(written(result, batch), written(base, batch))
    labels = batch["input_ids"]
    assert torch.equal(result(**batch, labels=labels).loss, base(**batch, labels=labels).loss)


# Fewer: the base under a mask.


@families
@ruled
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_is_the_base_with_the_dropped_ones_masked(model, family, kind, attention):
    if attention == "eager" and kind == "plain":
        pytest.skip("attention is not concerned with what chose")
    base, result = model(family, "base", attention), model(family, kind, attention)
    batch = padded(inputs_of(family, MIXED), 2)
    output = result(**batch)
    length = batch["input_ids"].shape[1]
    keep = kept_mask(output.kept_indices, length)
    assert int(keep.sum()) < int(batch["attention_mask"].sum())
    expected = masked(base, batch, keep)
    torch.testing.assert_close(output.logits[output.kept_indices >= 0], expected[keep], **CLOSE)


@pytest.mark.parametrize("family", VIDEOS)
@ruled
def test_clips_too(model, family, kind):
    base, result = model(family, "base"), model(family, kind)
    batch = clip_of(family)
    assert torch.equal(result(**batch, visual_reserve=1.0).logits, base(**batch).logits)
    output = result(**batch)
    keep = kept_mask(output.kept_indices, batch["input_ids"].shape[1])
    torch.testing.assert_close(output.logits, masked(base, batch, keep)[:, keep[0]], **CLOSE)
    assert torch.equal(answer(result, batch), recomputed(base, batch, keep, 8))


@families
def test_an_image_may_come_first(model, family):
    """The column that padding is taken from is one of an image, too."""
    base, result, batch = model(family, "base"), model(family, "trained"), inputs_of(family, (1, 0))
    first = int(placeholders(batch["input_ids"])[0].nonzero()[0])
    batch |= {name: batch[name][:, first:].clone() for name in PER_TOKEN if name in batch}
    batch["input_ids"][1] = torch.arange(10, 10 + batch["input_ids"].shape[1])
    batch["attention_mask"][:] = 1
    output = result(**batch)
    assert output.kept_indices.min() == -1
    keep = kept_mask(output.kept_indices, batch["input_ids"].shape[1])
    torch.testing.assert_close(output.logits[output.kept_indices >= 0], masked(base, batch, keep)[keep], **CLOSE)


@families
def test_an_image_may_come_last(model, family):
    """The largest position is then one of its heights or widths."""
    base, result, batch = model(family, "base"), model(family, "trained"), inputs_of(family, (1, 1))
    last = int(placeholders(batch["input_ids"])[0].nonzero()[-1]) + 1
    batch |= {name: batch[name][:, :last] for name in PER_TOKEN if name in batch}
    output, new = result(**batch), torch.tensor([9, 11])
    keep = kept_mask(output.kept_indices, last)
    following = result(input_ids=new[:, None], past_key_values=output.past_key_values).logits[:, -1]
    keep = torch.cat([keep, torch.ones(2, 1, dtype=torch.bool)], 1)
    torch.testing.assert_close(following, masked(base, longer(batch, new), keep)[:, -1], **CLOSE)


@families
@ruled
def test_it_writes_what_a_masked_base_writes(model, family, kind):
    base, result = model(family, "base"), model(family, kind)
    batch = inputs_of(family, MIXED)
    keep = kept_mask(result(**batch).kept_indices, batch["input_ids"].shape[1])
    assert torch.equal(answer(result, batch), recomputed(base, batch, keep, 8))


@families
@pytest.mark.parametrize("masks", ["whole", "none"])
def test_a_loop_of_ones_own_writes_the_same(model, family, masks):
    result, batch = model(family, "trained"), inputs_of(family, MIXED)
    expected = answer(result, batch, count=6)
    output, grown, found = result(**batch), batch, []
    for step in range(6):
        logits = output.logits[:, -1]
        logits[:, UNWANTED] = float("-inf")
        found.append(logits.argmax(-1))
        if step == 5:
            break
        grown = longer(grown, found[-1])
        mask = {"attention_mask": grown["attention_mask"]} if masks == "whole" else {}
        output = result(input_ids=found[-1][:, None], past_key_values=output.past_key_values, **mask)
    assert torch.equal(torch.stack(found, 1), expected)


@quick_families
def test_several_tokens_at_once_after_a_prompt(model, family):
    base, result, batch = model(family, "base"), model(family, "trained"), inputs_of(family, MIXED)
    first = result(**batch)
    more = torch.tensor([[40, 41, 42], [43, 44, 45], [46, 47, 48]])
    output = result(input_ids=more, past_key_values=first.past_key_values)
    grown, keep = batch, kept_mask(first.kept_indices, batch["input_ids"].shape[1])
    for column in more.T:
        grown = longer(grown, column)
    keep = torch.cat([keep, torch.ones(3, 3, dtype=torch.bool)], 1)
    torch.testing.assert_close(output.logits, masked(base, grown, keep)[:, -3:], **CLOSE)


@quick_families
def test_beams_and_samples(model, family):
    base, result, batch = model(family, "base"), model(family, "trained"), inputs_of(family, MIXED)
    width = result(**batch).kept_indices.shape[1]
    beams = {"num_beams": 2, "return_dict_in_generate": True}
    output = written(result, batch, **beams, num_return_sequences=2)
    assert output.sequences.shape == (6, batch["input_ids"].shape[1] + 8)
    assert widths(output.past_key_values) == {width + 7}
    alone = inputs_of(family, (1,))
    keep = kept_mask(result(**alone).kept_indices, alone["input_ids"].shape[1])
    assert answer(result, alone, num_beams=2).tolist() == [beamed(base, alone, keep)]

    sampled = {"do_sample": True, "num_return_sequences": 2, "return_dict_in_generate": True}
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(written(result, batch, **sampled))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert widths(found[0].past_key_values) == {width + 7}


def beamed(base, batch, keep, count=8):
    """The best of two beams, by full recompute."""
    beams = [(0.0, [])]
    for _ in range(count):
        found = []
        for score, tokens in beams:
            grown = batch
            for token in tokens:
                grown = longer(grown, torch.tensor([token]))
            here = torch.cat([keep, torch.ones(1, len(tokens), dtype=torch.bool)], 1)
            logits = masked(base, grown, here)[0, -1].log_softmax(-1)
            logits[UNWANTED] = float("-inf")
            found += [(score + float(value), [*tokens, token]) for token, value in enumerate(logits)]
        beams = sorted(found, key=lambda beam: -beam[0])[:2]
    return beams[0][1]


# What stays.


@families
@pytest.mark.parametrize("reserve", [0.01, 0.1, 0.3, 0.5, 0.75, 0.999])
def test_text_and_a_share_of_each_image_stay_in_their_order(model, family, reserve):
    result, batch = model(family, "trained"), padded(inputs_of(family, MIXED), 3)
    ids, valid = batch["input_ids"], batch["attention_mask"].bool()
    output = result(**batch, visual_reserve=reserve)
    kept = [[at for at in row if at >= 0] for row in output.kept_indices.tolist()]
    width = max(map(len, kept))
    for row, columns in enumerate(kept):
        assert output.kept_indices[row].tolist() == [-1] * (width - len(columns)) + columns
        assert columns == sorted(set(columns))
        visual = placeholders(ids[row])
        assert set(columns) >= set((valid[row] & ~visual).nonzero()[:, 0].tolist())
        assert valid[row, columns].all()
        for image in runs(visual.tolist()):
            assert len(set(image) & set(columns)) == quota(len(image), reserve)
    assert output.logits.shape[1] == width
    assert widths(output.past_key_values) == {width}
    written_too = written(result, batch, visual_reserve=reserve, return_dict_in_generate=True)
    assert widths(written_too.past_key_values) == {width + 7}


@quick_families
def test_the_cache_holds_what_stays_and_nothing_else(model, family):
    """Keys of the first layer depend on a token and its place alone: they are those of the base, at kept columns."""
    base, result, batch = model(family, "base"), model(family, "trained"), inputs_of(family, MIXED)
    expected, got = base(**batch), result(**batch)
    for row, columns in enumerate(got.kept_indices):
        theirs = expected.past_key_values.layers[0].keys[row][:, columns[columns >= 0]]
        torch.testing.assert_close(got.past_key_values.layers[0].keys[row][:, columns >= 0], theirs, **CLOSE)


@families
@ruled
def test_what_stays_is_what_the_rule_says(model, family, kind):
    base, result, batch = model(family, "base"), model(family, kind), inputs_of(family, MIXED)
    reserve = result.config.surgery["visual_pruning"]["reserve"]
    embeds = entering(base, batch)
    got = kept_mask(result(**batch).kept_indices, batch["input_ids"].shape[1])
    valid, visual = batch["attention_mask"].bool(), placeholders(batch["input_ids"])
    for row in range(len(embeds)):
        text = embeds[row, valid[row] & ~visual[row]]
        for image in runs(visual[row].tolist()):
            count = quota(len(image), reserve)
            if kind == "plain":
                chosen = greedy_dpp(embeds[row, image], count)
            else:
                scores = result.model.visual_scorer(embeds[row, image], text)
                chosen = sorted_best(scores.tolist(), count)
            assert [at for at in image if got[row, at]] == [image[at] for at in chosen]


@families
def test_more_is_what_there_was_and_more(model, family):
    result, batch = model(family, "trained"), inputs_of(family, MIXED)
    before = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for reserve in (0.1, 0.3, 0.35, 0.6, 0.9):
        now = kept_mask(result(**batch, visual_reserve=reserve).kept_indices, before.shape[1])
        assert bool((now | before == now).all())
        assert int(now.sum()) > int(before.sum())
        before = now


@quick_families
def test_an_image_keeps_a_least_number(folder, family, tmp_path):
    result = load(convert(folder(family, "base"), tmp_path / "out", reserve=0.01, min_keep=5))
    batch = inputs_of(family)
    keep = kept_mask(result(**batch).kept_indices, batch["input_ids"].shape[1])
    assert int((keep & placeholders(batch["input_ids"])).sum()) == 5
    many = load(convert(folder(family, "base"), tmp_path / "all", reserve=0.01, min_keep=500))
    torch.testing.assert_close(many(**batch).logits, many(**batch, visual_reserve=1.0).logits, **CLOSE)


@families
@ruled
def test_a_batch_is_its_rows_and_padding_is_nothing(model, family, kind):
    result, batch = model(family, kind), inputs_of(family, MIXED)
    together, wider = result(**batch), result(**padded(batch, 5))
    assert torch.equal(together.kept_indices + 5 * (together.kept_indices >= 0), wider.kept_indices)
    texts = answer(result, batch)
    assert torch.equal(answer(result, padded(batch, 5)), texts)
    visible = together.kept_indices >= 0
    torch.testing.assert_close(wider.logits[visible], together.logits[visible], **CLOSE)
    patches = len(batch["pixel_values"]) // sum(MIXED)
    for row, count in enumerate(MIXED):
        here, first = batch["attention_mask"][row].bool(), sum(MIXED[:row])
        single = {}
        for name, value in batch.items():
            size = patches if name == "pixel_values" else 1
            if name in PER_TOKEN:
                single[name] = value[row : row + 1, here]
            elif count:
                single[name] = value[first * size : (first + count) * size]
        output = result(**single)
        theirs = together.logits[row, visible[row]]
        torch.testing.assert_close(output.logits[0], theirs, **CLOSE)
        assert torch.equal(answer(result, single)[0], texts[row])


def test_other_questions_keep_other_tokens(model):
    result, kept = model("llava", "trained"), []
    for seed in range(3):
        batch = inputs_of("llava")
        batch["input_ids"][:, -6:] = torch.randint(10, 128, (1, 6), generator=torch.Generator().manual_seed(seed))
        kept.append(tuple(result(**batch, visual_reserve=0.5).kept_indices[0].tolist()))
    assert len(set(kept)) > 1


# What chooses.


def test_best_takes_the_first_of_equal_ones():
    draw = torch.Generator().manual_seed(0)
    for count in (1, 3, 10, 29, 30):
        scores = torch.randint(0, 4, (30,), generator=draw).float()
        assert scorer_file.best(scores, count).tolist() == sorted_best(scores.tolist(), count)


@pytest.mark.parametrize("seed", range(6))
def test_diverse_is_a_greedy_search_for_the_largest_determinant(seed):
    draw = torch.Generator().manual_seed(seed)
    visual = torch.randn(18, 24, generator=draw) + torch.randn(24, generator=draw)
    for count in (1, 2, 9, 17, 18):
        assert scorer_file.diverse(visual, count).tolist() == greedy_dpp(visual, count)


def test_diverse_takes_copies_last_and_the_first_ones_of_what_adds_nothing():
    draw = torch.Generator().manual_seed(1)
    visual = torch.randn(4, 8, generator=draw).repeat(3, 1)  # 4 directions, each three times
    assert scorer_file.diverse(visual, 4).tolist() == [0, 1, 2, 3]
    assert scorer_file.diverse(visual, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert scorer_file.diverse(torch.ones(9, 8), 4).tolist() == [0, 1, 2, 3]
    assert scorer_file.diverse(torch.zeros(9, 8), 4).tolist() == [0, 1, 2, 3]
    assert scorer_file.diverse(torch.randn(8, generator=draw).repeat(9, 1), 4).tolist() == [0, 1, 2, 3]
    assert scorer_file.diverse(torch.randn(40, 8, generator=draw), 30).unique().numel() == 30
    mirrored = torch.zeros(12, 8)
    mirrored[3, 0], mirrored[7, 0] = 1, -1 - 1e-6  # equal but for rounding
    assert scorer_file.diverse(mirrored, 1).tolist() == [3]


def test_diverse_begins_with_what_stands_out_and_is_blind_to_scale():
    draw = torch.Generator().manual_seed(2)
    visual = torch.randn(20, 8, generator=draw) + 3
    visual[7] = visual.mean(0) + 5 * (visual[7] - visual.mean(0))
    assert scorer_file.diverse(visual, 1).tolist() == [7]
    for scale in (1e-12, 1e-3, 1e3, 1e12):
        assert scorer_file.diverse(visual * scale, 5).tolist() == scorer_file.diverse(visual, 5).tolist()


@pytest.mark.parametrize("reserve", [0.07, 0.1, 0.25, 0.28, 0.3, 1 / 3, 0.55, 0.7, 1e-9, 1.0])
def test_shares_are_rounded_up_and_exact(reserve):
    for count in (1, 3, 10, 30, 100, 576, 2880):
        for least in (1, 4):
            expected = quota(count, reserve, least) if reserve != 1 / 3 else min(count, max(least, -(-count // 3)))
            assert scorer_file.reserved(count, reserve, least) == expected
    assert scorer_file.reserved(30, 0.1, 1) == 3


@pytest.mark.parametrize("layers", [1, 2])
def test_the_scorer_has_the_tensors_that_are_written(layers):
    size = SCORER | {"layers": layers}
    module = scorer_file.VisualScorer(64, **size)
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == scorer_shapes(
        64, Scorer(**size)
    )


def test_scores_follow_the_tokens_and_stack():
    torch.manual_seed(0)
    module = scorer_file.VisualScorer(64, **SCORER)
    visual, text = torch.randn(2, 9, 64), torch.randn(2, 5, 64)
    order = torch.randperm(9)
    scores = module(visual[0], text[0])
    assert scores.shape == (9,)
    torch.testing.assert_close(module(visual[0, order], text[0]), scores[order])
    torch.testing.assert_close(module(visual[0], text[0].flip(0)), scores)
    torch.testing.assert_close(module(visual, text)[0], scores)
    assert module(visual[0], text[0, :0]).isfinite().all()
    assert module.bfloat16()(visual[0], text[0]).dtype == torch.float32


# Losses.


@quick_families
@pytest.mark.parametrize("return_dict", [True, False])
def test_the_loss_is_that_of_the_columns_that_stay(model, family, return_dict):
    result, batch = model(family, "trained"), inputs_of(family, MIXED)
    ids = batch["input_ids"]
    labels = ids.masked_fill((batch["attention_mask"] == 0) | placeholders(ids), -100)
    labels[:, -6:-4] = -100
    output = result(**batch, labels=labels)
    logits, kept = output.logits, output.kept_indices
    targets = torch.tensor([[int(labels[row, at]) if at >= 0 else -100 for at in kept[row]] for row in range(3)])
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    got = output if return_dict else result(**batch, labels=labels, return_dict=False)
    torch.testing.assert_close(got[0], expected)
    assert torch.equal(got[1], logits)
    if return_dict:
        assert torch.equal(output.loss, output[0])
        summed = result(**batch, labels=labels, num_items_in_batch=torch.tensor(7)).loss
        torch.testing.assert_close(summed, expected * (targets[:, 1:] >= 0).sum() / 7)


@quick_families
@ruled
def test_answers_do_not_choose(model, family, kind):
    result, kept, asked = model(family, kind), [], set()
    for seed in range(3):
        batch = inputs_of(family, (1, 2))
        words = torch.randint(10, 128, (2, 4), generator=torch.Generator().manual_seed(seed))
        batch["input_ids"][:, -4:] = words
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -4:] = words
        labels[1] = batch["input_ids"][1]  # a row that learns everything has no question, and is as it is alone
        kept.append(result(**batch, labels=labels).kept_indices)
        plainly = result(**batch).kept_indices
        asked.add(tuple(plainly[0].tolist()))
        assert torch.equal(plainly[1], kept[-1][1])
    assert len(asked) > 1 or kind == "plain"
    assert torch.equal(kept[0][0], kept[1][0])
    assert torch.equal(kept[0][0], kept[2][0])


@quick_families
def test_gradients_flow_with_and_without_checkpointing(folder, family):
    result = load(folder(family, "trained"))
    batch = inputs_of(family, MIXED)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    result.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            result.activation_checkpointing_enable()
        result.zero_grad()
        with torch.enable_grad():
            result(**batch, labels=labels, use_cache=False).loss.backward()
        found.append({name: p.grad.clone() for name, p in result.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert not any("visual_scorer" in name for name in found[0])
    names = {name.split(".")[1] for name in found[0] if name.startswith("model.")}
    assert names >= ({"language_model", "visual"} if family == "qwen3_vl" else {"language_model", "vision_tower"})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


# Ways to call.


def test_positional_arguments_prune_too(model):
    result, batch = model("llava", "trained"), inputs_of("llava", MIXED)
    ids, pixels, mask = (batch[name] for name in ("input_ids", "pixel_values", "attention_mask"))
    expected = result(**batch, labels=ids)
    got = result(ids, pixels, mask, labels=ids)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.loss, expected.loss)
    inside = result.model(ids, pixels, mask)
    assert torch.equal(inside.kept_indices, expected.kept_indices)
    with pytest.raises(TypeError, match="input_ids"):
        result(ids, input_ids=ids)


@quick_families
def test_ways_to_give_a_prompt(model, family):
    result, batch = model(family, "trained"), inputs_of(family, (1, 2))
    expected = written(result, batch)
    others = {name: value for name, value in batch.items() if name != "input_ids"}
    assert torch.equal(written(result, others, inputs=batch["input_ids"]), expected)
    assert torch.equal(result.generate(batch["input_ids"], **others, **GREEDY), expected)
    if family == "llava":
        embeds = result.get_input_embeddings()(batch["input_ids"])
        assert torch.equal(result(inputs_embeds=embeds, **others).logits, result(**batch).logits)
        new = result.generate(inputs_embeds=embeds, **others, **GREEDY)
        assert torch.equal(new, expected[:, -8:])


@quick_families
def test_a_mask_may_be_left_out(model, family):
    result, batch = model(family, "trained"), inputs_of(family)
    bare = {name: value for name, value in batch.items() if name != "attention_mask"}
    torch.testing.assert_close(result(**bare).logits, result(**batch).logits, **CLOSE)
    assert torch.equal(written(result, bare), written(result, batch))


@quick_families
def test_other_outputs(model, family):
    result, batch = model(family, "trained", "eager"), inputs_of(family, MIXED)
    output = result(**batch, output_hidden_states=True, output_attentions=True)
    width = output.kept_indices.shape[1]
    assert {states.shape[1] for states in output.hidden_states} == {width}
    assert {tuple(weights.shape[-2:]) for weights in output.attentions} == {(width, width)}
    found = result(**batch, return_dict=False)
    assert torch.equal(found[0], output.logits)
    past = next(value for value in found if hasattr(value, "get_seq_length"))
    following = result(input_ids=torch.full((3, 1), 9), past_key_values=past).logits
    again = result(input_ids=torch.full((3, 1), 9), past_key_values=output.past_key_values).logits
    assert torch.equal(following, again)
    torch.testing.assert_close(result(**batch, logits_to_keep=1).logits, output.logits[:, -1:], **CLOSE)


@quick_families
def test_names_that_are_looked_up(model, family):
    base, result = model(family, "base"), model(family, "plain")
    native, own = (inspect.signature(one.forward).parameters for one in (base, result))
    assert [name for name in own if name != "visual_reserve"] == list(native)
    assert own["visual_reserve"].kind is inspect.Parameter.KEYWORD_ONLY
    assert list(own)[-1] == "kwargs"
    assert result.forward.__doc__


@families
def test_the_model_without_a_head(folder, model, family):
    from transformers import AutoModel

    whole, batch = model(family, "trained"), inputs_of(family, MIXED)
    alone = AutoModel.from_pretrained(folder(family, "trained"), trust_remote_code=True).eval()
    output, expected = alone(**batch), whole(**batch)
    assert torch.equal(output.kept_indices, expected.kept_indices)
    assert torch.equal(whole.lm_head(output.last_hidden_state), expected.logits)
    assert torch.equal(alone(**batch, visual_reserve=1.0).last_hidden_state, model(family, "base").model(**batch)[0])


@families
@ruled
def test_half_precision(folder, family, kind):
    result = load(folder(family, kind), dtype=torch.bfloat16)
    batch = inputs_of(family, MIXED)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    assert result(**batch).logits.dtype == torch.bfloat16
    assert written(result, batch).shape[1] == batch["input_ids"].shape[1] + 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo tells of what it cannot compile
def test_compiled(folder):
    result, batch = load(folder("llava", "trained")), inputs_of("llava", MIXED)
    torch._dynamo.reset()
    expected, texts = result(**batch).logits, written(result, batch)
    compiled = torch.compile(result, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).logits, expected, **CLOSE)
    assert torch.equal(written(compiled, batch), texts)
    torch._dynamo.reset()


def test_threads_do_not_mix(model):
    """Both are inside the model, with other shares, before either prunes."""
    result = model("llava", "trained")
    work = [(inputs_of("llava", (1, 2), seed=1), 0.2), (inputs_of("llava", (2, 0, 1), seed=2), 0.6)]
    expected = [result(**batch, visual_reserve=reserve) for batch, reserve in work]
    both = threading.Barrier(2, timeout=30)

    def wait(*_):
        both.wait()

    handle = result.model.vision_tower.register_forward_pre_hook(wait)
    got, failed = [None, None], []

    def run(number):
        batch, reserve = work[number]
        try:
            with torch.no_grad():
                for _ in range(3):
                    got[number] = result(**batch, visual_reserve=reserve)
        except Exception as error:  # noqa: BLE001  (told of below)
            failed.append(error)
            both.abort()

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    assert not failed
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine.kept_indices, theirs.kept_indices)
        torch.testing.assert_close(mine.logits, theirs.logits, **CLOSE)


# Files and copies.


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name).flatten().view(torch.uint8) for name in opened.keys()}  # noqa: SIM118
    return {name.replace("vision_tower.vision_model.", "vision_tower."): value for name, value in found.items()}


@families
def test_saved_and_loaded_again(folder, model, family, tmp_path):
    result, batch = model(family, "trained"), inputs_of(family, MIXED)
    result.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(again(**batch).logits, result(**batch).logits)
    assert again.config.surgery == result.config.surgery
    before, converted = (tensors(folder(family, kind)) for kind in ("base", "trained"))
    assert {name for name in converted if name not in before} == {
        prefix(json.loads((folder(family, "trained") / "config.json").read_text())) + name
        for name in scorer_shapes(64, Scorer(**SCORER))
    }
    assert all(torch.equal(converted[name], value) for name, value in before.items())
    assert tensors(folder(family, "plain")).keys() == before.keys()


@quick_families
def test_nothing_loads_without_trust(folder, family):
    from transformers import AutoConfig, AutoModelForImageTextToText

    for loads in (AutoConfig, AutoModelForImageTextToText):
        with pytest.raises(ValueError, match="trust_remote_code"):
            loads.from_pretrained(folder(family, "plain"), trust_remote_code=False)


@quick_families
def test_tied_embeddings(family, tmp_path):
    import transformers

    write_tiny_vision(tmp_path / "base", family, tie_word_embeddings=True)
    base = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "base").eval()
    result = load(convert(tmp_path / "base", tmp_path / "out", reserve=0.5))
    assert result.lm_head.weight is result.get_input_embeddings().weight
    batch = inputs_of(family, MIXED)
    assert torch.equal(result(**batch, visual_reserve=1.0).logits, base(**batch).logits)
    assert result(**batch).logits.shape[1] < batch["input_ids"].shape[1]


@quick_families
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_prune_by_their_own_scorer(folder, family, how):
    """They are made before the first call, after which transformers' own hooks forbid pickling."""
    result, batch = load(folder(family, "trained")), inputs_of(family)
    other = copy.deepcopy(result) if how == "deepcopy" else pickle.loads(pickle.dumps(result))
    before = result(**batch).kept_indices
    assert torch.equal(other(**batch).kept_indices, before)
    other.model.visual_scorer.score.weight.neg_()
    changed = other(**batch).kept_indices
    assert not torch.equal(changed, before)
    assert torch.equal(result(**batch).kept_indices, before)
    del result
    assert torch.equal(other(**batch).kept_indices, changed)


@pytest.mark.parametrize("missing", ["score.weight", "blocks.0.norm1", "visual_scorer"])
def test_a_scorer_without_its_weights_does_not_load(folder, missing, tmp_path):
    from transformers import AutoModel

    out = with_scorer(folder("llava", "plain"), tmp_path / "out", leave_out=missing)
    with pytest.raises(ValueError, match=r"lacks .* weights of its scorer.*model\.visual_scorer\."):
        load(out)
    with pytest.raises(ValueError, match=r"lacks .* weights of its scorer"):
        AutoModel.from_pretrained(out, trust_remote_code=True)


# What is refused.


@pytest.mark.parametrize("reserve", [0, 0.0, -0.1, 1.0001, float("nan"), float("inf"), True, False, "x", "0.5", [0.5]])
def test_shares_that_are_none(model, reserve):
    result, batch = model("llava", "plain"), inputs_of("llava")
    for call in (result, result.generate, result.model):
        with pytest.raises(ValueError, match=r"visual_reserve is .*above 0 and at most 1"):
            call(**batch, visual_reserve=reserve)
    with pytest.raises(ValueError, match="leave the image out"):
        checked_reserve(reserve, {"reserve": 0.5})


@quick_families
def test_a_pruned_cache_goes_on_with_text_alone(model, family):
    result, batch = model(family, "trained"), inputs_of(family)
    past = result(**batch).past_key_values
    grown = longer(batch, torch.tensor([9]))
    with pytest.raises(NotImplementedError, match="whole conversation without past_key_values"):
        result(**batch, past_key_values=past)
    with pytest.raises(NotImplementedError, match="whole conversation without past_key_values"):
        result.generate(**grown, past_key_values=past, max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="whole conversation without past_key_values"):
        result.generate(**prompt(grown), past_key_values=past, max_new_tokens=2)
    for mask in (torch.ones(1, 3), torch.ones(1, 1, 1, 20)):
        with pytest.raises(ValueError, match="attention mask is"):
            result(input_ids=torch.tensor([[9]]), past_key_values=past, attention_mask=mask)
    past.crop(-3)
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        result(input_ids=torch.tensor([[9]]), past_key_values=past)


@quick_families
def test_an_image_after_a_cache_wants_all_of_it(model, family):
    base, result = model(family, "base"), model(family, "trained")
    batch = inputs_of(family)
    past = result(input_ids=torch.tensor([[1, 9, 10, 11]])).past_key_values
    with pytest.raises(NotImplementedError, match=r"visual_reserve=1\.0, or the whole prompt"):
        result(**batch, past_key_values=past)
    parts = {"position_ids": torch.arange(4, 4 + batch["input_ids"].shape[1])[None]} if family == "llava" else {}
    batch["attention_mask"] = torch.ones(1, 4 + batch["input_ids"].shape[1], dtype=torch.long)
    expected = base(input_ids=torch.tensor([[1, 9, 10, 11]])).past_key_values
    if family == "llava":
        got = result(**batch, past_key_values=past, visual_reserve=1.0, **parts).logits
        assert torch.equal(got, base(**batch, past_key_values=expected, **parts).logits)


def test_an_emptied_cache_is_as_new(model):
    from transformers import DynamicCache

    base, result, batch = model("llava", "base"), model("llava", "trained"), inputs_of("llava")
    past = DynamicCache(config=result.config.get_text_config())
    result(**batch, past_key_values=past)
    assert getattr(past, PRUNED) is not None
    past.crop(-past.get_seq_length())
    ids = torch.tensor([[1, 9, 10, 11]])
    first, following = (result(input_ids=part, past_key_values=past).logits for part in (ids, ids[:, 1:2]))
    expected = base(input_ids=torch.cat([ids, ids[:, 1:2]], 1)).logits
    torch.testing.assert_close(torch.cat([first, following], 1), expected, **CLOSE)


@quick_families
def test_padding_on_the_right(model, family):
    """A plain call may have it, as in training; writing may not."""
    result, batch = model(family, "trained"), inputs_of(family, (1,))
    right = {
        name: torch.cat([value, value.new_zeros(1, 3)], 1) if name in PER_TOKEN else value
        for name, value in batch.items()
    }
    torch.testing.assert_close(result(**right).logits, result(**batch).logits, **CLOSE)
    with pytest.raises(ValueError, match="padding_side"):
        written(result, right)
    written(result, right, visual_reserve=1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"}, {"cache_implementation": "offloaded_static"},
        {"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 4}, {"use_cache": False},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_ways_to_write_that_need_every_token(model, options):
    from transformers import GenerationConfig

    result, batch = model("llava", "trained"), inputs_of("llava")
    with pytest.raises(NotImplementedError, match=r"visual_reserve=1\.0"):
        result.generate(**batch, **options, max_new_tokens=3)
    with pytest.raises(NotImplementedError, match=r"visual_reserve=1\.0"):
        result.generate(**batch, generation_config=GenerationConfig(**options, max_new_tokens=3))
    if "offloaded" not in str(options):
        expected = written(model("llava", "base"), batch)
        assert torch.equal(written(result, batch, **options, visual_reserve=1.0), expected)


def test_an_assistant_wants_another_config(folder, model):
    result, base, batch = load(folder("llava", "trained")), model("llava", "base"), inputs_of("llava")
    with pytest.raises(NotImplementedError, match="reserve") as told:
        written(result, batch, assistant_model=base)
    exec(str(told.value).partition("set ")[2], {"config": result.config})
    assert torch.equal(written(result, batch, assistant_model=base), written(base, batch))


def test_a_static_cache(model):
    from transformers import StaticCache

    result, batch = model("llava", "trained"), inputs_of("llava")
    past = StaticCache(config=result.config.get_text_config(), max_cache_len=64)
    with pytest.raises(NotImplementedError, match="static cache"):
        result(**batch, past_key_values=past)


def test_other_masks_and_columns(model):
    result, batch = model("llava", "trained"), inputs_of("llava")
    length = batch["input_ids"].shape[1]
    with pytest.raises(NotImplementedError, match=r"mask of \[batch, tokens\]"):
        result(**batch | {"attention_mask": torch.ones(1, 1, length, length)})
    with pytest.raises(NotImplementedError, match="logits_to_keep"):
        result(**batch, logits_to_keep=torch.tensor([3]))


@ruled
def test_what_is_broken_does_not_choose(model, kind):
    result, batch = model("llava", kind), inputs_of("llava")
    batch["pixel_values"] = batch["pixel_values"] * float("nan")
    with pytest.raises(RuntimeError, match="has no score"):
        result(**batch)


@families
def test_images_that_do_not_fit_their_places_are_told_of_as_ever(model, family):
    result, batch = model(family, "trained"), inputs_of(family)
    at = int(placeholders(batch["input_ids"])[0].nonzero()[0])
    batch = {
        name: torch.cat([value[:, :at], value[:, at + 1 :]], 1) if name in PER_TOKEN else value
        for name, value in batch.items()
    }
    with pytest.raises(ValueError):
        result(**batch)
    assert result(**inputs_of(family)).kept_indices is not None  # nothing of that call is left


def test_no_prompt_is_told_of_as_ever(model):
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model("llava", "plain")(pixel_values=inputs_of("llava")["pixel_values"])


@pytest.mark.parametrize("family", VIDEOS)
def test_a_clip_and_an_image_have_their_own_shares(model, family):
    result, clip, image = model(family, "trained"), clip_of(family), inputs_of(family)
    shared = [name for name in PER_TOKEN if name in clip]
    both = {**image, **clip, **{name: torch.cat([clip[name], image[name]], 1) for name in shared}}
    ids = both["input_ids"]
    kept = kept_mask(result(**both).kept_indices, ids.shape[1])[0]
    groups = runs(placeholders(ids[0]).tolist())
    assert len(groups) == (3 if family == "qwen3_vl" else 2)
    for group in groups:
        assert int(kept[group].sum()) == quota(len(group), 0.3)
