"""Results of visual_pruning with stages against stock models whose layers have a mask each, written out here."""

import copy
import json
import pickle
import sys
from functools import cache
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

import surgery
from surgery.errors import ManifestError, UnsupportedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.tiny_vision import TEXT, clip_of, inputs_of, write_tiny_vision
from tests.visual_reference import PER_TOKEN, UNWANTED, convert, greedy_dpp, load, longer, padded, sorted_best
from tests.visual_stages_reference import cached, descended, layered, layered_greedy, with_scorers

CLOSE = {"rtol": 0, "atol": 2e-5}
MIXED = (1, 2, 0)
STAGES = {"llava": {0: 0.75, 1: 0.5, 2: 0.2}, "qwen2_vl": {1: 0.6, 2: 0.3}, "qwen3_vl": {0: 0.7, 2: 0.3}}
NEW, LAYERS = 6, TEXT["num_hidden_layers"]
families = pytest.mark.parametrize("family", STAGES)
ruled = pytest.mark.parametrize("kind", ["plain", "trained"])


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def words(stages):
    """Keys as documents have them."""
    return {str(layer): share for layer, share in stages.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("stages")

    @cache
    def made(family, kind):
        if kind == "base":
            return write_tiny_vision(place / family / kind, family)
        if kind == "plain":
            return convert(made(family, "base"), place / family / kind, stages=words(STAGES[family]))
        return with_scorers(made(family, "plain"), place / family / kind)

    return made


@pytest.fixture(scope="module")
def model(folder):
    return cache(lambda family, kind, attention="sdpa": load(folder(family, kind), attention))


def pick_of(model, kind):
    """What chooses in a result: the rule, written out, or its scorer."""

    def by_rule(_layer, visual, _text, count):
        return greedy_dpp(visual, count) if count < len(visual) else range(count)

    def by_scorer(layer, visual, text, count):
        return sorted_best(model.model.visual_scorer[str(layer)](visual, text).tolist(), count)

    return by_rule if kind == "plain" else by_scorer


@pytest.fixture(scope="module")
def keeps_of(model):
    def found(family, kind, batch, attention="sdpa"):
        pick = pick_of(model(family, kind), kind)
        return descended(model(family, "base", attention), batch, STAGES[family], pick)

    return found


def answer(model, batch, **options):
    options = {"do_sample": False, "max_new_tokens": NEW, "suppress_tokens": UNWANTED} | options
    return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]


def longer_keeps(keeps, count):
    """With tokens that were not there when visual ones left."""
    return {layer: torch.cat([keep, keep.new_ones(len(keep), count)], 1) for layer, keep in keeps.items()}


def widths(past):
    return [layer.keys.shape[-2] for layer in past.layers]


def columns(keep):
    """Bool [B, L] -> as `kept_indices`."""
    rows = [row.nonzero()[:, 0].tolist() for row in keep]
    width = max(map(len, rows))
    return torch.tensor([[-1] * (width - len(row)) + row for row in rows])


def follows(output, base, batch, keeps):
    """A result's logits are the base's at the columns that are left."""
    last = keeps[max(keeps)]
    assert torch.equal(output.kept_indices, columns(last))
    expected = layered(base, batch, keeps)[last]
    torch.testing.assert_close(output.logits[output.kept_indices >= 0], expected, **CLOSE)


@families
def test_all_of_them_is_the_base_bit_for_bit(model, family):
    base, result, batch = model(family, "base"), model(family, "trained"), inputs_of(family, MIXED)
    got = result(**batch, visual_reserve=1.0)
    assert torch.equal(got.logits, base(**batch).logits)
    assert not hasattr(got, "kept_indices")
    for options in ({}, {"num_beams": 2}):
        assert torch.equal(answer(result, batch, visual_reserve=1, **options), answer(base, batch, **options))
    text = {name: batch[name][2:] for name in ("input_ids", "attention_mask")}
    assert torch.equal(result(**text).logits, base(**text).logits)


@families
@ruled
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_is_the_base_with_the_dropped_ones_masked_from_their_layer_on(model, keeps_of, family, kind, attention):
    result, batch = model(family, kind, attention), padded(inputs_of(family, MIXED), 2)
    keeps, output = keeps_of(family, kind, batch, attention), result(**batch)
    follows(output, model(family, "base", attention), batch, keeps)
    wide = cached(batch, keeps, LAYERS)
    assert widths(output.past_key_values) == wide
    assert len(set(wide)) == len([*filter(None, STAGES[family])]) + 1


@families
@ruled
def test_it_writes_what_a_masked_base_writes(model, keeps_of, family, kind):
    result, batch = model(family, kind), inputs_of(family, MIXED)
    keeps = keeps_of(family, kind, batch)
    texts = layered_greedy(model(family, "base"), batch, keeps, NEW)
    assert torch.equal(answer(result, batch), texts)
    for masks in (True, False):  # a loop of one's own
        output, grown = result(**batch), batch
        for step in range(NEW):
            logits = output.logits[:, -1]
            logits[:, UNWANTED] = float("-inf")
            assert torch.equal(logits.argmax(-1), texts[:, step])
            grown = longer(grown, texts[:, step])
            options = {"attention_mask": grown["attention_mask"]} if masks else {}
            past = output.past_key_values
            output = result(input_ids=texts[:, step : step + 1], past_key_values=past, **options)
    assert widths(output.past_key_values) == [width + NEW for width in cached(batch, keeps, LAYERS)]


@families
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("images", [(1,), MIXED])
def test_several_tokens_at_once_after_a_prompt(model, keeps_of, family, attention, images):
    result, batch = model(family, "trained", attention), inputs_of(family, images)
    keeps = keeps_of(family, "trained", batch, attention)
    grown, more = batch, torch.tensor([[40, 41, 42], [43, 44, 45], [46, 47, 48]])[: len(images)]
    output = result(input_ids=more, past_key_values=result(**batch).past_key_values)
    for column in more.T:
        grown = longer(grown, column)
    expected = layered(model(family, "base", attention), grown, longer_keeps(keeps, 3))
    torch.testing.assert_close(output.logits, expected[:, -3:], **CLOSE)


@families
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_one_length_may_keep_unequal_numbers(model, keeps_of, family, attention):
    """Then sdpa has no mask, and layers need one."""
    base, result = model(family, "base", attention), model(family, "trained", attention)
    batch = inputs_of(family, (1, 0))
    begins = int((batch["attention_mask"][1] == 0).sum())
    batch["input_ids"][1, :begins] = torch.arange(20, 20 + begins) % 100 + 10
    batch["attention_mask"][1] = 1
    keeps = keeps_of(family, "trained", batch, attention)
    follows(result(**batch), base, batch, keeps)
    assert torch.equal(answer(result, batch), layered_greedy(base, batch, keeps, NEW))


@families
def test_beams(model, keeps_of, family):
    base, result, batch = model(family, "base"), model(family, "trained"), inputs_of(family)
    beams, keeps = [(0.0, [])], keeps_of(family, "trained", batch)
    for _ in range(NEW):
        found = []
        for score, tokens in beams:
            grown = batch
            for token in tokens:
                grown = longer(grown, torch.tensor([token]))
            logits = layered(base, grown, longer_keeps(keeps, len(tokens)))[0, -1].log_softmax(-1)
            logits[UNWANTED] = float("-inf")
            found += [(score + float(value), [*tokens, token]) for token, value in enumerate(logits)]
        beams = sorted(found, key=lambda beam: -beam[0])[:2]
    assert answer(result, batch, num_beams=2).tolist() == [beams[0][1]]
    many = inputs_of(family, MIXED)
    assert answer(result, many, num_beams=2, num_return_sequences=2).shape == (6, NEW)


@families
@ruled
def test_a_batch_is_its_rows_and_padding_is_nothing(model, family, kind):
    result, batch = model(family, kind), inputs_of(family, MIXED)
    together, wider = result(**batch), result(**padded(batch, 5))
    assert torch.equal(together.kept_indices + 5 * (together.kept_indices >= 0), wider.kept_indices)
    visible = together.kept_indices >= 0
    torch.testing.assert_close(wider.logits[visible], together.logits[visible], **CLOSE)
    texts, patches = answer(result, batch), len(batch["pixel_values"]) // sum(MIXED)
    for row, count in enumerate(MIXED):
        here, first = batch["attention_mask"][row].bool(), sum(MIXED[:row])
        single = {}
        for name, value in batch.items():
            size = patches if name == "pixel_values" else 1
            if name in PER_TOKEN:
                single[name] = value[row : row + 1, here]
            elif count:
                single[name] = value[first * size : (first + count) * size]
        torch.testing.assert_close(result(**single).logits[0], together.logits[row, visible[row]], **CLOSE)
        assert torch.equal(answer(result, single)[0], texts[row])


@families
def test_clips_and_padding_on_the_right(model, keeps_of, family):
    base, result = model(family, "base"), model(family, "trained")
    if family != "llava":
        batch = clip_of(family)
        keeps = keeps_of(family, "trained", batch)
        follows(result(**batch), base, batch, keeps)
        assert torch.equal(answer(result, batch), layered_greedy(base, batch, keeps, NEW))
    batch = inputs_of(family)
    right = {
        name: torch.cat([value, value.new_zeros(1, 3)], 1) if name in PER_TOKEN else value
        for name, value in batch.items()
    }
    torch.testing.assert_close(result(**right).logits, result(**batch).logits, **CLOSE)


def test_a_stage_at_the_entry_alone_is_the_reserve(folder, tmp_path):
    base, batch = folder("llava", "base"), inputs_of("llava", MIXED)
    one = load(convert(base, tmp_path / "one", stages={"0": 0.3}))
    other = load(convert(base, tmp_path / "other", reserve=0.3))
    assert torch.equal(one(**batch).logits, other(**batch).logits)
    assert one.config.surgery["visual_pruning"]["reserve"] == 0.3


def test_an_image_keeps_a_least_number_in_every_layer(folder, tmp_path):
    result = load(convert(folder("llava", "base"), tmp_path / "out", stages={"1": 0.5, "2": 0.01}, min_keep=3))
    batch = inputs_of("llava")
    length = batch["input_ids"].shape[1]
    assert widths(result(**batch).past_key_values) == [length, length - 8, length - 13]


@families
def test_the_loss_and_what_chooses_when_answers_are_learned(model, family):
    result, kept = model(family, "trained"), []
    for seed in range(3):
        batch = inputs_of(family, (1, 2))
        answers = torch.randint(10, 128, (2, 4), generator=torch.Generator().manual_seed(seed))
        batch["input_ids"][:, -4:] = answers
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -4:] = answers
        output = result(**batch, labels=labels)
        kept.append(output.kept_indices)
        targets = labels.gather(1, kept[-1].clamp(min=0)).masked_fill(kept[-1] < 0, -100)
        torch.testing.assert_close(
            output.loss, cross_entropy(output.logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        )
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])


@families
def test_gradients_flow_with_and_without_checkpointing(folder, family):
    result, batch, found = load(folder(family, "trained")), inputs_of(family, MIXED), []
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    result.train()
    for checkpointing in (False, True):
        if checkpointing:
            result.activation_checkpointing_enable()
        result.zero_grad()
        with torch.enable_grad():
            result(**batch, labels=labels, use_cache=False).loss.backward()
        found.append({name: p.grad.clone() for name, p in result.named_parameters() if p.grad is not None})
    assert not any("visual_scorer" in name for name in found[0])
    assert found[1].keys() == found[0].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


@families
def test_other_outputs_and_the_model_without_a_head(folder, model, family):
    from transformers import AutoModel

    result, batch = model(family, "trained", "eager"), inputs_of(family, MIXED)
    output = result(**batch, output_hidden_states=True, output_attentions=True)
    wide = widths(output.past_key_values)
    assert [weights.shape[-1] for weights in output.attentions] == wide
    found = result(**batch, return_dict=False)
    assert torch.equal(found[0], output.logits)
    torch.testing.assert_close(result(**batch, logits_to_keep=1).logits, output.logits[:, -1:], **CLOSE)
    alone = AutoModel.from_pretrained(folder(family, "trained"), trust_remote_code=True).eval()
    inside = alone(**batch)
    assert torch.equal(inside.kept_indices, output.kept_indices)
    visible = output.kept_indices >= 0
    torch.testing.assert_close(result.lm_head(inside.last_hidden_state)[visible], output.logits[visible], **CLOSE)


@families
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "saved"])
def test_copies_choose_by_their_own_scorers(folder, family, how, tmp_path):
    result, batch = load(folder(family, "trained")), inputs_of(family)
    if how == "saved":
        result.save_pretrained(tmp_path / "saved")
        other = load(tmp_path / "saved")
    else:
        other = copy.deepcopy(result) if how == "deepcopy" else pickle.loads(pickle.dumps(result))
    before = result(**batch).kept_indices
    assert torch.equal(other(**batch).kept_indices, before)
    other.model.visual_scorer["2"].score.weight.neg_()
    assert not torch.equal(other(**batch).kept_indices, before)
    assert torch.equal(result(**batch).kept_indices, before)


def test_a_scorer_that_is_missing_does_not_load(folder, tmp_path):
    out = tmp_path / "out"
    copytree(folder("llava", "trained"), out)
    (file,) = out.glob("*.safetensors")
    save_file({k: v for k, v in load_file(file).items() if "scorer.1." not in k}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks .* weights of its scorer.*model\.visual_scorer\.1"):
        load(out)


def test_half_precision(folder):
    result, batch = load(folder("llava", "trained"), dtype=torch.bfloat16), inputs_of("llava", MIXED)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    assert result(**batch).logits.dtype == torch.bfloat16
    assert answer(result, batch).shape[1] == NEW


def test_latent_attention_descends_too(folder, tmp_path):
    """The heads are narrow, and the reference is the same model with a mask for each layer."""
    latent = {"kv_latent": {"method": "stride", "qk_dim": 8, "vo_dim": 8}}
    data = {"surgery": 1, "operations": [latent, {"visual_pruning": {"stages": words(STAGES["llava"])}}], "verify": False}
    out = surgery.convert(str(folder("llava", "base")), tmp_path / "out", surgery.manifest_from_dict(data)).out
    result, batch = load(out), inputs_of("llava", MIXED)

    def base(**given):
        return result(**given, visual_reserve=1.0)

    base.model = result.model
    keeps = descended(base, batch, STAGES["llava"], pick_of(result, "plain"))
    follows(result(**batch), base, batch, keeps)
    assert torch.equal(answer(result, batch), layered_greedy(base, batch, keeps, NEW))


# What is refused.


def test_other_shares_than_the_schedule(model):
    result, batch = model("llava", "plain"), inputs_of("llava")
    for call in (result, result.generate, result.model):
        with pytest.raises(ValueError, match=r"layer by layer, down to 0\.2: leave it out, or pass 1\.0"):
            call(**batch, visual_reserve=0.5)
    assert torch.equal(result(**batch, visual_reserve=0.2).logits, result(**batch).logits)


@families
def test_a_cropped_cache(model, family):
    from transformers import DynamicCache

    result, batch = model(family, "trained"), inputs_of(family)
    new = torch.tensor([[9]])
    length = widths(result(**batch).past_key_values)[0]
    for count in (-1, 4 - length):
        past = result(**batch).past_key_values
        past.crop(count)
        with pytest.raises(NotImplementedError, match="cannot be cropped"):
            result(input_ids=new, past_key_values=past)
    past = DynamicCache(config=result.config.get_text_config())
    result(**batch, past_key_values=past)
    past.layers[0].keys, past.layers[0].values = past.layers[0].keys[:, :, :0], past.layers[0].values[:, :, :0]
    with pytest.raises(NotImplementedError, match="cannot be cropped"):  # not as new: others hold what they did
        result(input_ids=new, past_key_values=past)
    past = result(**batch).past_key_values
    first = result(input_ids=new, past_key_values=past).logits
    past.crop(-1)  # what came after the prompt may go
    assert torch.equal(result(input_ids=new, past_key_values=past).logits, first)
    past.layers[0].keys, past.layers[0].values = past.layers[0].keys[:, :, :-1], past.layers[0].values[:, :, :-1]
    with pytest.raises(NotImplementedError, match="cannot be cropped"):  # as 4.x does to a length that others are below
        result(input_ids=new, past_key_values=past)


def test_attention_whose_masks_are_not_known(model, folder):
    from transformers import AttentionInterface

    AttentionInterface.register("others", AttentionInterface()["sdpa"])
    result, batch = load(folder("llava", "plain"), "others"), inputs_of("llava")
    with pytest.raises(NotImplementedError, match=r"eager or sdpa attention, and this is others.*visual_reserve=1\.0"):
        result(**batch)
    assert result(**batch, visual_reserve=1.0).logits.isfinite().all()


def test_a_prompt_that_is_longer_than_a_sliding_window(tmp_path):
    base = write_tiny_vision(tmp_path / "base", "llava_next")
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["sliding_window"] = 60
    (base / "config.json").write_text(json.dumps(config))
    result = load(convert(base, tmp_path / "out", stages={"0": 0.75, "2": 0.5}))
    short, long = inputs_of("llava_next"), inputs_of("llava_next", (2,))
    assert answer(result, short, max_new_tokens=3).shape == (1, 3)
    with pytest.raises(NotImplementedError, match="sliding window of 60"):
        result(**long)
    with pytest.raises(NotImplementedError, match="sliding window of 60"):
        answer(result, short, max_new_tokens=20)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stages": {}}, "no layer"),
        ({"stages": {"2": 0.5, "0": 0.25}}, "ascend"),
        ({"stages": {"0": 0.25, "2": 0.5}}, "must not rise"),
        ({"stages": {"0": 0}}, "greater than 0"),
        ({"stages": {"-1": 0.5}}, "must be a whole number"),
        ({"stages": {"x": 0.5}}, "must be a whole number"),
        ({"stages": {"0": True}}, "must be a number"),
        ({"stages": 0.5}, "must be a mapping"),
        ({"stages": {"0": 0.5}, "reserve": 0.25}, "reserve is 0.25, and stages leave 0.5"),
    ],
)
def test_stages_that_are_none(settings, said):
    with pytest.raises(ManifestError, match=said):
        surgery.manifest_from_dict({"surgery": 1, "operations": [{"visual_pruning": settings}]})


@pytest.mark.parametrize(
    ("family", "operations", "said"),
    [
        ("llava", [{"visual_pruning": {"stages": {"3": 0.5}}}], "stages has layer 3, and its last layer is 2"),
        ("qwen3_vl", [{"visual_pruning": {"stages": {"0": 0.5, "1": 0.25}}}], "layer 1 must be 0, or 2 on"),
        ("llava", ["codebook_kv", {"visual_pruning": {"stages": {"1": 0.5}}}], "the same tokens in every layer"),
    ],
)
def test_layers_where_tokens_cannot_leave(folder, family, operations, said):
    manifest = surgery.manifest_from_dict({"surgery": 1, "operations": operations})
    with pytest.raises(UnsupportedModel, match=said):
        surgery.plan(str(folder(family, "base")), manifest)
