"""LatentAttention in every family against the base model itself with the dropped channels silenced.

The reference shares no code with what is tested: hooks on the stock model zero the dropped query pairs and the dropped
value channels, so its logits are the exact partial sums that the narrow attention must compute.
"""

import copy
import importlib
import json
import pickle
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.emission.code import Family, RuntimePart, emit_code
from surgery.emission.config import custom_config, down_level

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.tiny import ARCHITECTURES, FAMILIES, MOE_FAMILIES, head_width, write_tiny

PART = RuntimePart("surgery_latent_attention.py", "LatentAttention", "self_attn")
NORMED = ("qwen3", "qwen3_moe", "olmoe")
BIASED = ("qwen2", "qwen2_moe")
CASES = [
    (family, rope)
    for family in FAMILIES
    for rope in (("default", "longrope") if family == "phi3" else ("default", "llama3", "yarn"))
]
TOKENS = 90  # beyond the 64 tokens of the scaled ropes' original context


def family_of(model_type):
    return Family.named(model_type, ARCHITECTURES[model_type].removesuffix("ForCausalLM"))


def needs(model_type):
    family = family_of(model_type)
    try:
        importlib.import_module(family.modeling_module)
    except ImportError:
        pytest.skip(f"the installed transformers has no {model_type}")
    try:
        getattr(importlib.import_module(family.configuration_module), family.config_class)(tie_word_embeddings=False)
    except Exception:  # noqa: BLE001 - its kind belongs to huggingface_hub, and to some releases only
        pytest.skip("5.4 declares OLMoE's tie_word_embeddings an int and refuses the stock checkpoints too")


def choose(config, seed, *, shared=False):
    """Random pairs per head and unequal widths per layer: [(pairs per head, value channels per head, scaling)]."""
    chance = random.Random(seed)
    width, heads = head_width(config), config["num_key_value_heads"]
    layers = []
    for count, values, scaling in ((4, 12, width**-0.5), (6, 6, 0.3)):
        pairs = [chance.sample(range(width // 2), count) for _ in range(heads)]
        kept = [chance.sample(range(width), values) for _ in range(heads)]
        layers.append(([pairs[0]] * heads if shared else pairs, kept, scaling))
    return layers


def narrow(base, folder, layers, *, base_config=None, inv_freq=None):
    """Write the checkpoint whose attention keeps `layers` of `base`, by slicing rows and columns."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((base / "config.json").read_text())
    tensors = load_file(base / "model.safetensors")
    family, width, heads = config["model_type"], head_width(config), config["num_attention_heads"]
    groups = config["num_key_value_heads"]
    for layer, (pairs, kept, _) in enumerate(layers):
        prefix = f"model.layers.{layer}.self_attn"
        if family == "phi3":
            fused = tensors.pop(f"{prefix}.qkv_proj.weight").split([heads * width, groups * width, groups * width])
            tensors |= {f"{prefix}.{n}_proj.weight": t for n, t in zip("qkv", fused, strict=True)}
        channels = [[*head, *(p + width // 2 for p in head)] for head in pairs]
        rows = {"v": stacked(kept, width), "q": stacked(repeat(channels, heads), width), "k": stacked(channels, width)}
        for name in "v" if family in NORMED else "vqk":
            for kind in ("weight", "bias"):
                if f"{prefix}.{name}_proj.{kind}" in tensors:
                    tensors[f"{prefix}.{name}_proj.{kind}"] = tensors[f"{prefix}.{name}_proj.{kind}"][rows[name]]
        output = f"{prefix}.o_proj.weight"
        tensors[output] = tensors[output][:, stacked(repeat(kept, heads), width)].contiguous()
    settings = {
        "qkv_bias": family in BIASED,
        "o_bias": False,
        "inv_freq": inv_freq,
        "select_after_norm": family in NORMED,
        "clip_qkv": config.get("clip_qkv"),
        "layers": [
            {
                "num_key_value_heads": len(pairs),
                "qk_dim": 2 * len(pairs[0]),
                "vo_dim": len(kept[0]),
                "rope_pairs": pairs,
                "scaling": scaling,
            }
            for pairs, kept, scaling in layers
        ],
    }
    write_custom(folder, config | (base_config or {}), tensors, settings)
    return folder


def write_custom(folder, config, tensors, settings):
    family = family_of(config["model_type"])
    written = custom_config(config, family, {"version": 1, "latent_attention": settings})
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in emit_code(family, [PART], "test").items():
        (folder / name).write_bytes(content)


def repeat(per_group, heads):
    return [head for head in per_group for _ in range(heads // len(per_group))]


def stacked(per_head, width):
    return [head * width + channel for head, channels in enumerate(per_head) for channel in channels]


def silence(model, layers, config):
    """Turn the stock model into the reference, with hooks."""
    width, heads = head_width(config), config["num_attention_heads"]
    for layer, (pairs, kept, scaling) in zip(model.model.layers, layers, strict=True):
        attention = layer.self_attn
        gain = scaling * width**0.5
        queries = torch.zeros(heads, width, dtype=torch.float64)
        for head, chosen in enumerate(repeat(pairs, heads)):
            queries[head, [*chosen, *(p + width // 2 for p in chosen)]] = gain
        values = torch.zeros(heads * width)
        values[stacked(repeat(kept, heads), width)] = 1
        if hasattr(attention, "qkv_proj"):
            rest = torch.ones(attention.qkv_proj.out_features - heads * width)
            hook_output(attention.qkv_proj, torch.cat([queries.flatten(), rest]))
        elif hasattr(attention, "q_norm"):
            per_head = attention.q_norm.weight.shape[0] == width
            hook_output(attention.q_norm, queries if per_head else queries.flatten())
        else:
            hook_output(attention.q_proj, queries.flatten())
        attention.o_proj.register_forward_pre_hook(lambda _, x, mask=values: (x[0] * mask.to(x[0]),))
    return model


def hook_output(module, mask):
    def multiply(_module, _inputs, output):
        factor = mask.to(output)
        if mask.dim() == 2 and output.shape[-2] != mask.shape[0]:  # heads before tokens
            factor = factor[:, None]
        return output * factor

    module.register_forward_hook(multiply)


def load(folder, auto="AutoModelForCausalLM", **kwargs):
    import transformers

    loader = getattr(transformers, auto)
    model, report = loader.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **kwargs)
    found = {key: list(value) for key, value in report.items() if value}
    headless = {"unexpected_keys": ["lm_head.weight"]} if auto == "AutoModel" else {}
    assert found in ({}, headless)
    return model.eval()


def enable_checkpointing(model):
    if hasattr(model, "activation_checkpointing_enable"):  # the older name warns
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def double(model):
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernel has no float64
    return model.double()


_made = {}


@pytest.fixture
def case(request, tmp_path_factory):
    """(folder, reference logits in fp32 and fp64, model) of one family and rope, made once."""
    family, rope = request.param
    needs(family)
    if request.param not in _made:
        root = tmp_path_factory.mktemp(f"{family}_{rope}")
        base = write_tiny(root / "base", family, rope, seed=3)
        config = json.loads((base / "config.json").read_text())
        layers = choose(config, seed=5)
        folder = narrow(base, root / f"narrow_{family}_{rope}", layers)
        ids = torch.randint(3, 128, (2, TOKENS), generator=torch.Generator().manual_seed(1))
        reference = silence(load(base, attn_implementation="sdpa"), layers, config)
        with torch.no_grad():
            wanted = reference(ids).logits
            exact = double(reference)(ids).logits
        _made[request.param] = SimpleNamespace(
            family=family, folder=folder, base=base, layers=layers, ids=ids, wanted=wanted, exact=exact
        )
    return _made[request.param]


every_case = pytest.mark.parametrize("case", CASES, indirect=True, ids="-".join)
every_family = pytest.mark.parametrize("case", [(f, "default") for f in FAMILIES], indirect=True, ids="-".join)


@every_case
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits_are_the_partial_sums(case, implementation):
    model = load(case.folder, attn_implementation=implementation)
    with torch.no_grad():
        torch.testing.assert_close(model(case.ids).logits, case.wanted, atol=1e-5, rtol=0)
        if implementation == "sdpa":
            torch.testing.assert_close(double(model)(case.ids).logits, case.exact, atol=1e-10, rtol=0)


@every_case
def test_cached_decoding_is_the_full_forward(case):
    model = load(case.folder)
    ids = case.ids[:, :24]
    with torch.no_grad():
        full = model(ids).logits
        step = model(ids[:, :15], use_cache=True)
        logits = [step.logits]
        for position in range(15, 24):
            step = model(ids[:, position : position + 1], past_key_values=step.past_key_values, use_cache=True)
            logits.append(step.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), full, atol=1e-5, rtol=0)


@every_family
def test_generation_modes_agree(case):
    model = load(case.folder)
    ids = case.ids[:1, :7]
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    greedy = model.generate(ids, do_sample=False, **settings)
    assert model.generate(ids, do_sample=False, use_cache=False, **settings).tolist() == greedy.tolist()
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    batch = torch.cat([padded, case.ids[1:, : padded.shape[1]]])
    mask = torch.cat([(padded != 0).long(), torch.ones_like(padded)])
    together = model.generate(batch, attention_mask=mask, do_sample=False, **settings)
    assert together[0, 4:].tolist() == greedy[0].tolist()
    beams = model.generate(ids, num_beams=3, num_return_sequences=2, do_sample=False, **settings)
    assert beams.shape == (2, 15)
    uncached = model.generate(ids, num_beams=3, num_return_sequences=2, do_sample=False, use_cache=False, **settings)
    assert beams.tolist() == uncached.tolist()


@every_family
def test_a_static_cache_gives_the_same_tokens(case):
    model = load(case.folder)
    if not model._supports_static_cache:
        pytest.skip("a static cache of this release wants values as wide as keys")
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0, "do_sample": False}
    dynamic = model.generate(case.ids[:1, :14], **settings)
    static = model.generate(case.ids[:1, :14], cache_implementation="static", disable_compile=True, **settings)
    assert static.tolist() == dynamic.tolist()


@every_family
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_left_padding_changes_nothing(case, implementation):
    model = load(case.folder, attn_implementation=implementation)
    ids = case.ids[:1, :12]
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(ids).logits
        together = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@every_family
def test_attentions_are_given(case):
    model = load(case.folder, attn_implementation="eager")
    with torch.no_grad():
        output = model(case.ids[:, :9], output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 2
    assert len(output.hidden_states) == 3
    for weights in output.attentions:
        assert weights.shape == (2, 4, 9, 9)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))


@every_family
def test_gradient_checkpointing_gives_the_same_gradients(case):
    gradients = []
    for checkpointing in (False, True):
        model = load(case.folder).train()
        if checkpointing:
            enable_checkpointing(model)
        model(case.ids[:, :20], labels=case.ids[:, :20], use_cache=False).loss.backward()
        attention = model.model.layers[0].self_attn
        gradients.append([attention.q_proj.weight.grad, attention.v_proj.weight.grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-4)


@every_family
def test_save_and_reload(case, tmp_path):
    model = load(case.folder)
    again = tmp_path / f"again_{case.family}"
    model.save_pretrained(again)
    assert {f.name for f in case.folder.glob("*.py")} == {f.name for f in again.glob("*.py")}
    reloaded = load(again)
    body = load(again, auto="AutoModel")
    with torch.no_grad():
        torch.testing.assert_close(reloaded(case.ids).logits, model(case.ids).logits, atol=1e-6, rtol=0)
        hidden = body(case.ids).last_hidden_state
        torch.testing.assert_close(reloaded.lm_head(hidden), reloaded(case.ids).logits, atol=1e-6, rtol=0)


@every_family
def test_the_config_is_ordinary(case, tmp_path):
    model = load(case.folder)
    config = model.config
    kind = type(config)
    assert kind().surgery == {}
    assert kind.model_type == config.model_type == f"surgery_{case.family}"
    assert pickle.loads(pickle.dumps(config)).surgery == copy.deepcopy(config).surgery == config.surgery
    repr(config)
    kind().save_pretrained(tmp_path / "default")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(twin(case.ids).logits, model(case.ids).logits)


@every_family
def test_what_is_cached_is_what_is_kept(case):
    from transformers import DynamicCache

    model = load(case.folder)
    seen = []
    attention = type(model.model.layers[0].self_attn)
    for layer in model.model.layers:
        assert type(layer.self_attn) is attention
    with torch.no_grad():
        cache = DynamicCache()  # a few families gave back tuples in 4.48 unless given a cache
        model(case.ids[:, :10], past_key_values=cache, use_cache=True)
    for index in range(2):
        layer = cache.layers[index] if hasattr(cache, "layers") else None
        keys, values = (layer.keys, layer.values) if layer else (cache.key_cache[index], cache.value_cache[index])
        seen.append((tuple(keys.shape), tuple(values.shape)))
    assert seen == [((2, 2, 10, 8), (2, 2, 10, 12)), ((2, 2, 10, 12), (2, 2, 10, 6))]


def test_all_pairs_in_order_are_the_base_to_the_bit(tmp_path):
    base = write_tiny(tmp_path / "base_bits", "llama", "yarn")
    everything = ([list(range(8))] * 2, [list(range(16))] * 2, 16**-0.5)
    model = load(narrow(base, tmp_path / "bits", [everything, everything]))
    ids = torch.arange(3, 90)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load(base)(ids).logits)


@pytest.mark.parametrize("shared", [True, False])
def test_clipped_and_shared_choices(tmp_path, shared):
    needs("olmoe")
    base = write_tiny(tmp_path / "base_clip", "olmoe", clip_qkv=0.7)
    config = json.loads((base / "config.json").read_text())
    layers = [(pairs, kept, 0.25) for pairs, kept, _ in choose(config, seed=2, shared=shared)]
    model = load(narrow(base, tmp_path / f"clip_{shared}", layers))
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        wanted = silence(load(base), layers, config)(ids).logits
        torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=0)


def test_own_frequencies_replace_the_table(tmp_path):
    base = write_tiny(tmp_path / "base_freq", "llama")
    config = json.loads((base / "config.json").read_text())
    layers = choose(config, seed=4)
    native = [10000.0 ** (-2 * j / 16) for j in range(8)]
    used = sorted({pair for pairs, _, _ in layers for head in pairs for pair in head})
    own = [([[used.index(p) for p in head] for head in pairs], kept, scaling) for pairs, kept, scaling in layers]
    folder = narrow(base, tmp_path / "freq", layers, inv_freq=[native[pair] for pair in used])
    written = json.loads((folder / "config.json").read_text())
    for entry, (pairs, _, _) in zip(written["surgery"]["latent_attention"]["layers"], own, strict=True):
        entry["rope_pairs"] = pairs
    (folder / "config.json").write_text(json.dumps(written))
    ids = torch.arange(3, 90)[None]
    model = load(folder)
    with torch.no_grad():
        wanted = silence(load(base), layers, config)(ids).logits
        torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=0)
        cast = model.to(torch.bfloat16).model.rotary_emb(torch.zeros(1, dtype=torch.float32), torch.tensor([[8192]]))
    exact = torch.tensor(native, dtype=torch.float64)[used] * 8192
    torch.testing.assert_close(cast[0][0, 0, : len(used)].double(), exact.cos(), atol=2e-3, rtol=0)


def test_fewer_cached_heads_in_one_layer(tmp_path):
    base = write_tiny(tmp_path / "base_heads", "llama")
    tensors = load_file(base / "model.safetensors")
    for name in ("k_proj", "v_proj"):  # two equal heads, so that one of them says it all
        weight = tensors[f"model.layers.1.self_attn.{name}.weight"]
        weight[16:] = weight[:16]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    layers = choose(config, seed=6, shared=True)
    layers[1] = ([layers[1][0][0]] * 2, [layers[1][1][0]] * 2, layers[1][2])
    single = [layers[0], ([layers[1][0][0]], [layers[1][1][0]], layers[1][2])]
    model = load(narrow(base, tmp_path / "heads", single))
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        wanted = silence(load(base), layers, config)(ids).logits
        torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tmp_path, tied):
    base = write_tiny(tmp_path / "base_tied", "qwen2", tie_word_embeddings=tied)
    config = json.loads((base / "config.json").read_text())
    model = load(narrow(base, tmp_path / f"tied_{tied}", choose(config, seed=1)))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path / f"saved_tied_{tied}")
    assert (load(tmp_path / f"saved_tied_{tied}").lm_head.weight.data_ptr() == 0) is False


def test_flash_gets_one_width(tmp_path):
    """A stand-in for a flash kernel, which cannot run here: it insists on equal widths that are multiples of 8."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    base = write_tiny(tmp_path / "base_flash", "llama")
    config = json.loads((base / "config.json").read_text())
    model = load(narrow(base, tmp_path / "flash", choose(config, seed=8)), attn_implementation="sdpa")
    calls = []

    def kernel(module, query, key, value, attention_mask, **kwargs):
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]
        assert query.shape[-1] % 8 == 0
        calls.append(query.shape[-1])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    states = torch.randn(1, 11, 64)
    angles = model.model.rotary_emb(states, torch.arange(11)[None])
    with torch.no_grad():
        wanted = [layer.self_attn(states, position_embeddings=angles)[0] for layer in model.model.layers]
        try:
            ALL_ATTENTION_FUNCTIONS["flash_stand_in"] = kernel
        except TypeError:
            ALL_ATTENTION_FUNCTIONS.register("flash_stand_in", kernel)
        model.config._attn_implementation_internal = "flash_stand_in"
        found = [layer.self_attn(states, position_embeddings=angles)[0] for layer in model.model.layers]
    assert calls == [16, 16]
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_experts_are_loaded_not_drawn(family, tmp_path):
    needs(family)
    base = write_tiny(tmp_path / f"base_{family}", family)
    config = down_level(json.loads((base / "config.json").read_text()))
    folder = narrow(base, tmp_path / f"experts_{family}", choose(config, seed=7))
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(load(folder)(ids).logits, load(folder)(ids).logits)
