"""What `kv_latent` writes, in every family, against the base itself.

Two references, neither of which shares code with the operation. `silence` turns the stock base into the partial sums that
a choice of channels means. `padded` puts a result's own projections, filled up with zeros, back into the stock base: the
narrow attention must compute exactly what the wide one computes with them.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as some
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_runtime_attention import NORMED, double, load, needs, repeat, silence, stacked
from torch import nn

import surgery
from surgery.errors import SurgeryError
from surgery.manifest import manifest_from_dict

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.tiny import FAMILIES, head_width, write_tiny

HEAD = 16
TOKENS = 90  # beyond the 64 tokens of the scaled ropes' original context
CUSTOM = (*NORMED, "qwen2_moe")  # stock classes that do not hold narrower heads
SCALED = ("llama3", "yarn", "linear", "dynamic")
CASES = [
    pytest.param(family, rope, id=f"{family}-{rope}", marks=[pytest.mark.slow] if rope in SCALED else [])
    for family in FAMILIES
    for rope in (("default", "longrope") if family == "phi3" else ("default", *SCALED))
]
every_case = pytest.mark.parametrize(("family", "rope"), CASES)


def with_each(name, values, *, ids=None):
    """Every family with the plain rope and each value; with a scaled rope one value, in turn, which is enough there."""
    names = ids or [str(value) for value in values]
    chosen = [
        pytest.param(*case.values, values[at], id=f"{case.id}-{names[at]}", marks=case.marks)
        for turn, case in enumerate(CASES)
        for at in (range(len(values)) if "default" in case.values else [turn % len(values)])
    ]
    return pytest.mark.parametrize(("family", "rope", name), chosen)


every_family = pytest.mark.parametrize("family", FAMILIES)
EVERYTHING = {"qk_dim": [6, 10], "vo_dim": [12, 6], "refit_q": True}
STRIDE = {"method": "stride"}
NO_FIT = {"logit_gain": False, "refit_q": False, "refit_o": False}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def manifest(settings, **calibration):
    return manifest_from_dict(
        {
            "surgery": 1,
            "operations": [{"kv_latent": one} for one in (settings if isinstance(settings, list) else [settings])],
            "calibration": {"text": "self", "samples": 6, "length": 24, **calibration},
            "verify": False,
        }
    )


def convert(base, out, settings, **calibration):
    done = surgery.convert(str(base), out, manifest(settings, **calibration), statistics=out.parent / "statistics")
    return done.out


def tensors_of(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def tokens(count=TOKENS, rows=2):
    return torch.randint(3, 128, (rows, count), generator=torch.Generator().manual_seed(1))


def run(model, ids=None):
    with torch.no_grad():
        return model(tokens() if ids is None else ids).logits


def close(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)


def exact(folder, **kwargs):
    """A model with its stored float64 weights."""
    from transformers import PretrainedConfig

    name = "dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype"
    return double(load(folder, **{name: torch.float64}, **kwargs))


def strided(base, qk_dim, vo_dim, scaling):
    """What `silence` takes, for one stride in all layers."""
    groups = config_of(base)["num_key_value_heads"]
    pairs, values = list(range(0, HEAD // 2, HEAD // qk_dim)), list(range(0, HEAD, HEAD // vo_dim))
    return [([pairs] * groups, [values] * groups, scaling)] * config_of(base)["num_hidden_layers"]


def layers_of(folder):
    """(pairs per KV head, value width, scaling) of every layer of a result, stock or latent."""
    config = config_of(folder)
    if "surgery" not in config:
        width, groups = config["head_dim"], config["num_key_value_heads"]
        pairs = list(range(0, HEAD // 2, HEAD // width))
        return [([pairs] * groups, width, width**-0.5)] * config["num_hidden_layers"]
    layers = config["surgery"]["latent_attention"]["layers"]
    return [(layer["rope_pairs"], layer["vo_dim"], layer["scaling"]) for layer in layers]


def padded(base, folder, **kwargs):
    """The stock base with the projections of a result, each dropped channel zero."""
    model, config, tensors = load(base, **kwargs), config_of(base), tensors_of(folder)
    width, heads = head_width(config), config["num_attention_heads"]
    for number, (pairs, values, scaling) in enumerate(layers_of(folder)):
        attention, prefix = model.model.layers[number].self_attn, f"model.layers.{number}.self_attn"
        fused = tensors.get(f"{prefix}.qkv_proj.weight")
        if fused is not None:
            count, groups = 2 * len(pairs[0]), len(pairs)
            parts = fused.split([heads * count, groups * count, groups * values])
            tensors |= {f"{prefix}.{n}_proj.weight": t for n, t in zip("qkv", parts, strict=True)}
        channels = [[*head, *(pair + width // 2 for pair in head)] for head in pairs]
        kept = [list(range(values))] * len(pairs)
        rows = {"q": stacked(repeat(channels, heads), width), "k": stacked(channels, width), "v": stacked(kept, width)}
        wide = {"q": heads, "k": len(pairs), "v": len(pairs)}
        full = {}
        for name in "qkv":
            for kind in ("weight", "bias"):
                found = tensors.get(f"{prefix}.{name}_proj.{kind}")
                if found is None:
                    continue
                if name != "v" and hasattr(attention, "q_norm"):
                    full[name, kind] = found  # selected after the norm, below
                    continue
                whole = torch.zeros(wide[name] * width, *found.shape[1:], dtype=found.dtype)
                whole[rows[name]] = found * (scaling * width**0.5 if name == "q" else 1.0)
                full[name, kind] = whole
        output = tensors[f"{prefix}.o_proj.weight"]
        whole = torch.zeros(output.shape[0], heads * width, dtype=output.dtype)
        whole[:, stacked(repeat(kept, heads), width)] = output
        if hasattr(attention, "qkv_proj"):
            attention.qkv_proj = linear(torch.cat([full[name, "weight"] for name in "qkv"]))
        else:
            for name in "qkv":
                setattr(attention, f"{name}_proj", linear(full[name, "weight"], full.get((name, "bias"))))
        attention.o_proj = linear(whole, tensors.get(f"{prefix}.o_proj.bias"))
        if hasattr(attention, "q_norm"):
            mask = torch.zeros(heads * width, dtype=torch.float64)
            mask[rows["q"]] = scaling * width**0.5
            if attention.q_norm.weight.numel() == width:
                mask = mask.view(heads, 1, width)
            attention.q_norm.register_forward_hook(lambda _m, _x, out, mask=mask: out * by_heads(mask, out))
    return model.eval()


def by_heads(mask, out):
    """The mask of [B, T, H, d] or [B, H, T, d], whichever this family's norm gives, or of [B, T, H d]."""
    mask = mask.to(out)
    return mask[:, 0] if mask.dim() == 3 and out.shape[-2] == mask.shape[0] and out.shape[-3] != mask.shape[0] else mask


def linear(weight, bias=None):
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    module.weight.data = weight.contiguous()
    if bias is not None:
        module.bias.data = bias.contiguous()
    return module.requires_grad_(False)


# Exact results: nothing is fitted


@every_family
def test_full_width_changes_no_bit(family, tmp_path):
    needs(family)
    base = write_tiny(tmp_path / "base", family, "longrope" if family == "phi3" else "yarn", shards=2)
    for name, chosen in (
        ("stride", {**STRIDE, "kv_ratio": 1.0}),
        ("calibrated", {"qk_dim": HEAD, "vo_dim": HEAD}),
    ):
        out = convert(base, tmp_path / name, chosen)
        before, after = tensors_of(base), tensors_of(out)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert not list(out.glob("*.py"))
        torch.testing.assert_close(run(load(out)), run(load(base)), atol=0, rtol=0)


@with_each("stride", [2, 4, 8])
def test_stride_is_the_masked_base(family, rope, stride, tmp_path):
    needs(family)
    base = write_tiny(tmp_path / f"base_{family}_{rope}", family, rope, seed=3, dtype=torch.float64)
    width = HEAD // stride
    out = convert(base, tmp_path / f"{family}_{rope}_{stride}", {**STRIDE, "qk_dim": width, "vo_dim": width})
    stock = family not in CUSTOM and rope in ("default", "linear", "llama3")
    assert ("surgery" not in config_of(out)) == stock
    assert bool(list(out.glob("*.py"))) != stock
    layers = strided(base, width, width, HEAD**-0.5)
    for implementation in ("eager", "sdpa"):  # the same on both sides: norms, and the eager softmax, are float32
        reference = silence(exact(base, attn_implementation=implementation), layers, config_of(base))
        model = exact(out, attn_implementation=implementation)
        close(run(model), run(reference), 1e-10)
        close(run(model.float()), run(reference.float()))


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "qwen3", "olmoe"])
@pytest.mark.parametrize(("qk_dim", "vo_dim"), [(4, 16), (16, 4), (4, 8), ([2, 8], [16, 4])])
def test_unequal_widths_are_the_masked_base(family, qk_dim, vo_dim, tmp_path):
    base = write_tiny(tmp_path / f"base_{family}", family, seed=3, dtype=torch.float64)
    name = f"{family}_{qk_dim}_{vo_dim}".translate(dict.fromkeys(map(ord, "[], "), "_"))
    out = convert(base, tmp_path / name, {**STRIDE, "qk_dim": qk_dim, "vo_dim": vo_dim})
    qk, vo = (dim if isinstance(dim, list) else [dim] * 2 for dim in (qk_dim, vo_dim))
    layers = [strided(base, k, v, HEAD**-0.5)[0] for k, v in zip(qk, vo, strict=True)]
    close(run(exact(out)), run(silence(exact(base), layers, config_of(base))), 1e-10)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_matched_pairs_are_the_masked_base(family, tmp_path):
    base = write_tiny(tmp_path / f"base_{family}", family, seed=3, dtype=torch.float64)
    out = convert(base, tmp_path / f"{family}_matched", {**STRIDE, "qk_select": "matched", "qk_dim": 8, "vo_dim": 8})
    # exponents 1/4, 1/2, 3/4, 7/8 of a head with 8 pairs at j/8
    layers = [([[2, 4, 6, 7]] * 2, [list(range(0, HEAD, 2))] * 2, HEAD**-0.5)] * 2
    close(run(exact(out)), run(silence(exact(base), layers, config_of(base))), 1e-10)


WINDOWS = {
    "none": ("llama", {}),
    "all layers": ("mistral", {"sliding_window": 7}),
    "last layer": ("qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}),
    "wide head": ("llama", {"hidden_size": 40}),
    "fused": ("phi3", {"sliding_window": 7}),
}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", WINDOWS)
def test_grouping_and_windows(kind, groups, tmp_path):
    family, more = WINDOWS[kind]
    window = "sliding_window" in more
    base = write_tiny(
        tmp_path / f"base_{family}_{groups}", family, dtype=torch.float64, num_key_value_heads=groups, **more
    )
    out = convert(base, tmp_path / f"s_{family}_{groups}", {**STRIDE, "qk_dim": 4, "vo_dim": 8})
    close(run(exact(out)), run(silence(exact(base), strided(base, 4, 8, HEAD**-0.5), config_of(base))), 1e-10)
    out = convert(base, tmp_path / f"c_{family}_{groups}", EVERYTHING)
    close(run(load(out).float()), run(padded(base, out).float()), 2e-5)
    if window:
        assert not torch.allclose(run(load(out).float()), run(unwindowed(out, tmp_path / "open").float()), atol=1e-3)


def unwindowed(folder, copy):
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "config.json").write_text(json.dumps(config_of(folder) | {"sliding_window": None}))
    return load(copy)


def test_clamps_stay(tmp_path):
    base = write_tiny(tmp_path / "base", "olmoe", dtype=torch.float64, clip_qkv=0.7)
    out = convert(base, tmp_path / "clamped", {**STRIDE, "qk_dim": 8, "vo_dim": 8})
    wanted = run(silence(exact(base), strided(base, 8, 8, HEAD**-0.5), config_of(base)))
    close(run(exact(out)), wanted, 1e-10)


def test_scaled_tables_are_the_base_own(tmp_path):
    """A unit vector turned by the latent attention shows the cosine and sine that it used."""
    base = write_tiny(tmp_path / "base", "llama", "yarn")
    out = convert(base, tmp_path / "yarn_unequal", {**STRIDE, "qk_dim": 4, "vo_dim": 8})
    model, wide = load(out), load(base)
    places = torch.arange(200)[None]
    table = wide.model.rotary_emb(torch.zeros(1), places)
    attention = model.model.layers[0].self_attn
    unit = torch.zeros(1, 4, 200, 4)
    unit[..., :2] = 1
    turned, _ = attention._rotate(unit, unit[:, :2], *model.model.rotary_emb(torch.zeros(1), places))
    for new, old in enumerate((0, 4)):
        assert torch.equal(turned[0, 0, :, new], table[0][0, :, old])
        assert torch.equal(turned[0, 0, :, new + 2], table[1][0, :, old])


def test_logits_depend_on_distances_only(tmp_path):
    base = write_tiny(tmp_path / "base", "llama", "llama3", dtype=torch.float64)
    for name, chosen in (
        ("stock", {**STRIDE, "qk_dim": 8, "vo_dim": 8}),
        ("latent", {"qk_dim": 6, "vo_dim": 8}),
        ("paper_own", {"method": "paper", "qk_dim": 8, "vo_dim": 8}),
    ):
        source = base if name != "paper_own" else write_tiny(tmp_path / "plain", "llama", dtype=torch.float64)
        model = exact(convert(source, tmp_path / name, chosen))
        ids, shift = tokens(20), 37
        here, there = (
            model(ids, position_ids=torch.arange(start, start + 20)[None].expand(2, -1)).logits for start in (0, shift)
        )
        close(there, here, 1e-4)  # the angles are float32


def paper_forward(base, ids, qk_dim, vo_dim):
    """KV-Latent as published, from its text: strided channels, its spectrum, 1/sqrt(d_qk). Float64, llama only."""
    t, config = {name: x.double() for name, x in tensors_of(base).items()}, config_of(base)
    heads, groups, quarter = config["num_attention_heads"], config["num_key_value_heads"], qk_dim // 4
    exponents = [(quarter + 2 * j) / qk_dim for j in range(quarter)]
    exponents += [(3 * quarter + j) / qk_dim for j in range(quarter)]
    speeds = torch.tensor([config["rope_theta"] ** -e for e in exponents], dtype=torch.float64)
    angles = torch.arange(ids.shape[1], dtype=torch.float64)[:, None] * speeds
    cos, sin = angles.cos(), angles.sin()

    def norm(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * weight

    def turned(x):
        one, two = x[..., : qk_dim // 2], x[..., qk_dim // 2 :]
        return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)

    hidden = t["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        x = norm(hidden, t[p + "input_layernorm.weight"])
        q, k, v = (
            (x @ t[f"{p}self_attn.{name}_proj.weight"][:: HEAD // width].T).unflatten(-1, (-1, width)).transpose(1, 2)
            for name, width in (("q", qk_dim), ("k", qk_dim), ("v", vo_dim))
        )
        k, v = (x.repeat_interleave(heads // groups, 1) for x in (turned(k), v))
        scores = turned(q) @ k.transpose(-1, -2) / qk_dim**0.5
        future = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
        mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        output = t[f"{p}self_attn.o_proj.weight"][:, :: HEAD // vo_dim]
        hidden = hidden + mixed.transpose(1, 2).flatten(2) @ output.T
        x = norm(hidden, t[p + "post_attention_layernorm.weight"])
        gate, up, down = (t[f"{p}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        hidden = hidden + (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    return norm(hidden, t["model.norm.weight"]) @ t["lm_head.weight"].T


@pytest.mark.parametrize(
    ("qk_dim", "vo_dim"), [(8, 8), (4, 16), (16, 16), (16, 8), ([16, 8], [8, 8]), ([8, 16], [8, 8])]
)
def test_paper_is_the_published_recipe(qk_dim, vo_dim, tmp_path):
    base = write_tiny(tmp_path / "base", "llama", dtype=torch.float64, rope_theta=500000.0)
    name = f"paper_{qk_dim}_{vo_dim}".translate(dict.fromkeys(map(ord, "[], "), "_"))
    model = exact(convert(base, tmp_path / name, {"method": "paper", "qk_dim": qk_dim, "vo_dim": vo_dim}))
    if isinstance(qk_dim, int):
        close(run(model), paper_forward(base, tokens(), qk_dim, vo_dim), 1e-4)  # the angles are float32
        return
    seen = []  # per-layer widths: each layer alone, on the input it got
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(
            lambda _m, x, named, out, n=number: seen.append((n, named["hidden_states"], out[0])), with_kwargs=True
        )
    run(model)
    for number, entering, leaving in seen:
        close(leaving, paper_attention(base, number, entering, qk_dim[number], vo_dim[number]), 1e-4)


def paper_attention(base, layer, x, qk_dim, vo_dim):
    """One attention of the published recipe: `paper_forward` on a base whose other parts add nothing."""
    t, config = {name: w.double() for name, w in tensors_of(base).items()}, config_of(base)
    quarter, p = qk_dim // 4, f"model.layers.{layer}.self_attn."
    exponents = [0.25 + 2 * j / qk_dim for j in range(quarter)] + [0.75 + j / qk_dim for j in range(quarter)]
    turns = torch.tensor([config["rope_theta"] ** -e for e in exponents], dtype=torch.float64)
    phase = torch.polar(
        torch.ones(1, dtype=torch.float64), torch.arange(x.shape[1], dtype=torch.float64)[:, None] * turns
    )

    def heads(name, width):
        return (x @ t[f"{p}{name}_proj.weight"][:: HEAD // width].T).unflatten(-1, (-1, width)).transpose(1, 2)

    def turned(y):
        return torch.complex(y[..., : qk_dim // 2], y[..., qk_dim // 2 :]) * phase

    query, key, value = turned(heads("q", qk_dim)), turned(heads("k", qk_dim)), heads("v", vo_dim)
    group = query.shape[1] // key.shape[1]
    scores = (query @ key.repeat_interleave(group, 1).mH).real / qk_dim**0.5
    scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), float("-inf"))
    mixed = (scores.softmax(-1) @ value.repeat_interleave(group, 1)).transpose(1, 2).flatten(2)
    return mixed @ t[f"{p}o_proj.weight"][:, :: HEAD // vo_dim].T


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("method", ["stride", "paper"])
def test_twice_by_two_is_once_by_four(family, method, tmp_path):
    base = write_tiny(tmp_path / "base", family, dtype=torch.float64)
    # The paper's spectrum of a spectrum is another one; its scale without it does commute.
    rope = {"rope": "keep"} if method == "paper" else {}
    half = convert(base, tmp_path / "half", {"method": method, "qk_dim": 8, "vo_dim": 8} | rope)
    quarter = convert(half, tmp_path / "half_of_half", {"method": method, "qk_dim": 4, "vo_dim": 4} | rope)
    once = convert(base, tmp_path / "once", {"method": method, "qk_dim": 4, "vo_dim": 4} | rope)
    both = convert(base, tmp_path / "both", [{"method": method, "qk_dim": w, "vo_dim": w} | rope for w in (8, 4)])
    for found in (quarter, both):
        assert config_of(found) == config_of(once)
        assert tensors_of(found).keys() == tensors_of(once).keys()
        for name, tensor in tensors_of(once).items():
            close(tensors_of(found)[name], tensor, 1e-15)


@pytest.mark.parametrize("chosen", [{**STRIDE, "qk_dim": 4, "vo_dim": 8}, {"qk_dim": 6, "vo_dim": 12}], ids=str)
def test_permuting_heads_commutes(chosen, tmp_path):
    base = write_tiny(tmp_path / "base", "qwen2", seed=4)
    turned = tmp_path / "turned"
    turned.mkdir()
    (turned / "config.json").write_text((base / "config.json").read_text())
    save_file(swapped(tensors_of(base), HEAD, HEAD), turned / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(run(load(turned)), run(load(base)), atol=1e-5, rtol=0)
    # Not text the model writes itself: that would differ by rounding, and then entirely.
    straight, other = (
        convert(folder, tmp_path / f"{folder.name}_latent", chosen, **some_text(folder)) for folder in (base, turned)
    )
    for first, second in zip(layers_of(straight), layers_of(other), strict=True):
        assert first[0] == second[0][::-1]
    if chosen.get("method") == "stride":
        wanted, found = swapped(tensors_of(straight), 4, 8), tensors_of(other)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    close(run(load(other)), run(load(straight)), 2e-3)


def swapped(tensors, qk_dim, vo_dim):
    """Two KV heads exchanged, together with the two queries of each."""
    widths = {"q_proj": 2 * qk_dim, "k_proj": qk_dim, "v_proj": vo_dim}
    out = {}
    for name, tensor in tensors.items():
        found = tensor
        for part, width in widths.items():
            if part in name:
                found = tensor.unflatten(0, (2, width)).flip(0).flatten(0, 1)
        if "o_proj.weight" in name:
            found = tensor.unflatten(1, (2, 2 * vo_dim)).flip(1).flatten(1, 2)
        out[name] = found.contiguous()
    return out


def some_text(folder):
    """A tokenizer of bytes beside the base, and a text for it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:126]
    tokenizer = Tokenizer(models.BPE({"<s>": 1, **{letter: i + 2 for i, letter in enumerate(alphabet)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    text = folder.parent / "text.txt"
    text.write_text("".join(chr(33 + (7 * i * i + i // 3) % 90) for i in range(2000)))
    return {"text": [str(text)]}


# Calibrated results


@with_each("chosen", [EVERYTHING, {**EVERYTHING, **NO_FIT}, {"kv_ratio": 0.6}], ids=["everything", "no fit", "budget"])
def test_calibrated_is_its_own_weights_in_the_base(family, rope, chosen, tmp_path):
    needs(family)
    base = write_tiny(tmp_path / f"base_{family}_{rope}", family, rope, seed=3)
    out = convert(base, tmp_path / f"{family}_{rope}_calibrated", chosen)
    wanted = run(padded(base, out))
    for implementation in ("eager", "sdpa"):
        close(run(load(out, attn_implementation=implementation)), wanted, 2e-5)


def facts_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["facts"])


@every_case
def test_measuring_sees_the_model_own_attention(family, rope, tmp_path):
    needs(family)
    check_measuring(write_tiny(tmp_path / f"base_{family}", family, rope, seed=6), tmp_path)


@pytest.mark.parametrize("kind", WINDOWS)
def test_measuring_sees_the_model_own_windows(kind, tmp_path):
    family, more = WINDOWS[kind]
    check_measuring(write_tiny(tmp_path / f"base_{family}", family, seed=6, **more), tmp_path)


def check_measuring(base, tmp_path):
    """At full width nothing is lost, so what is measured must be the module's own output."""
    out = convert(base, tmp_path / "out", {"qk_dim": HEAD, "vo_dim": HEAD, **NO_FIT}, length=80)
    assert all(layer["relative_error"] < 1e-8 for layer in facts_of(measured(tmp_path)[0])["layers"])
    assert not list(out.glob("*.py"))


def test_head_widths_that_eight_does_not_divide(tmp_path):
    base = write_tiny(tmp_path / "base", "llama", head_dim=24)
    out = convert(base, tmp_path / "of_24", {"kv_ratio": 0.4})
    assert all(len(pairs[0]) * 2 + values <= 48 for pairs, values, _ in layers_of(out))
    close(run(load(out)), run(padded(base, out)), 2e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_fitted_stride_may_stay_stock(family, tmp_path):
    base = write_tiny(tmp_path / f"base_{family}", family, attention_bias=family == "llama")
    chosen = {**STRIDE, "qk_dim": 8, "vo_dim": 8, "logit_gain": True, "refit_q": True, "refit_o": family == "llama"}
    out = convert(base, tmp_path / f"{family}_stock", chosen)
    assert config_of(out)["head_dim"] == 8
    assert not list(out.glob("*.py"))
    close(run(load(out)), run(padded(base, out)), 2e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_queries_of_a_stock_result_carry_the_scale(family, tmp_path):
    """Only the outputs are fitted: the stock class divides by sqrt(8), the base by sqrt(16)."""
    base = write_tiny(tmp_path / f"base_{family}", family)
    chosen = {**STRIDE, "qk_dim": 8, "vo_dim": 8, **NO_FIT, "refit_o": True}
    out = convert(base, tmp_path / f"{family}_scaled", chosen)
    assert config_of(out)["head_dim"] == 8
    before, after = tensors_of(base), tensors_of(out)
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn"
        for kind in ("weight", "bias") if family == "qwen2" else ("weight",):
            for part, scale in (("q", 0.5**0.5), ("k", 1.0), ("v", 1.0)):
                name = f"{prefix}.{part}_proj.{kind}"
                close(after[name], before[name][::2] * scale, 1e-6)
        assert not torch.allclose(
            after[f"{prefix}.o_proj.weight"], before[f"{prefix}.o_proj.weight"][:, ::2], atol=1e-2
        )


@every_family
@pytest.mark.parametrize(
    "chosen",
    [{"kv_ratio": 0.6}, EVERYTHING, {**STRIDE, "qk_dim": 4, "vo_dim": 8}, {**STRIDE, "kv_ratio": 0.5}],
    ids=["budget", "everything", "stride", "stride to a budget"],
)
def test_cache_bytes_are_those_planned(family, chosen, tmp_path):
    needs(family)
    base = write_tiny(tmp_path / f"base_{family}", family, dtype=torch.bfloat16)
    done = surgery.convert(str(base), tmp_path / f"{family}_out", manifest(chosen), statistics=tmp_path / "statistics")
    model, ids = load(done.out), tokens(11)
    with torch.no_grad():
        cached = [kv[:2] for kv in iterate(model(ids, use_cache=True).past_key_values)]
    config = config_of(base)
    heads = config["num_key_value_heads"]
    widths = [(2 * len(pairs[0]), values) for pairs, values, _ in layers_of(done.out)]
    assert [(k.shape, v.shape) for k, v in cached] == [((2, heads, 11, k), (2, heads, 11, v)) for k, v in widths]
    real = sum(tensor.nbytes for pair in cached for tensor in pair)
    assert real == 2 * 11 * heads * sum(k + v for k, v in widths) * 2
    assert done.plan.cache_bytes_after * 2 * 11 == real
    if "kv_ratio" in chosen:
        assert real <= chosen["kv_ratio"] * 2 * 11 * heads * 2 * 2 * HEAD * 2


def iterate(cache):
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache, strict=True))


@every_family
def test_values_alone_at_full_keys(family, tmp_path):
    """Layer 0 keeps every channel in a new basis, and its bias folded: it must do what the base does."""
    needs(family)
    base = write_tiny(tmp_path / f"base_{family}", family, seed=2)
    out = convert(base, tmp_path / f"{family}_out", {"qk_dim": HEAD, "vo_dim": [HEAD, HEAD - 1], **NO_FIT})
    outputs = []
    for folder in (base, out):
        with torch.no_grad():
            outputs.append(load(folder)(tokens(), output_hidden_states=True).hidden_states[1])
    close(outputs[1], outputs[0], 1e-4)


def test_value_bias_is_folded_exactly(tmp_path):
    base = write_tiny(tmp_path / "base", "qwen2", seed=2)
    tensors = tensors_of(base)
    for layer in range(2):  # values of rank 15, so that a basis of width 15 loses nothing but the rounding
        value, bias = (tensors[f"model.layers.{layer}.self_attn.v_proj.{kind}"] for kind in ("weight", "bias"))
        value[[5, 21]], bias[:] = 0, 3 * torch.randn(32, generator=torch.Generator().manual_seed(layer))
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    out = convert(base, tmp_path / "folded", {"qk_dim": HEAD, "vo_dim": 15, **NO_FIT})
    found = tensors_of(out)
    assert found["model.layers.0.self_attn.v_proj.bias"].abs().max() == 0
    assert found["model.layers.0.self_attn.o_proj.bias"].abs().max() > 0.1
    close(run(load(out)), run(load(base)), 1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16_stays_bfloat16(family, tmp_path):
    base = write_tiny(tmp_path / f"base_{family}", family, dtype=torch.bfloat16)
    out = convert(base, tmp_path / f"{family}_half", EVERYTHING)
    assert {tensor.dtype for tensor in tensors_of(out).values()} == {torch.bfloat16}
    model = load(out).bfloat16()
    model.save_pretrained(tmp_path / f"{family}_again")
    again = load(tmp_path / f"{family}_again").bfloat16()
    torch.testing.assert_close(run(again), run(model), atol=0, rtol=0)
    close(run(load(out).float()), run(padded(base, out).float()), 2e-5)
    close(run(model).float(), run(model.float()), 0.5)


def test_decoding_modes_agree(tmp_path):
    base = write_tiny(tmp_path / "base", "llama", "llama3")
    model = load(convert(base, tmp_path / "decoding", EVERYTHING))
    ids, asked = tokens(9, rows=1), {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    greedy = model.generate(ids, **asked).tolist()
    assert model.generate(ids, use_cache=False, **asked).tolist() == greedy
    padded_ids = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    mask = (padded_ids != 0).long()
    assert model.generate(padded_ids, attention_mask=mask, **asked)[0, 5:].tolist() == greedy[0]
    from surgery.runtime.surgery_compatibility import static_cache_holds_any_width

    if static_cache_holds_any_width():
        assert model.generate(ids, cache_implementation="static", **asked).tolist() == greedy


def test_calibration_beats_the_stride(tmp_path):
    """On a trained base: the point of calibrating."""
    ids = trained_text()
    base = load(Path(surgery.__file__).parent / "builtin" / "llama")
    expected = run(base, ids).log_softmax(-1)
    lost = {}
    for name, chosen in (
        ("calibrated", {"kv_ratio": 0.5}), ("uniform", {"qk_dim": 8, "vo_dim": 8}),
        ("stride", {**STRIDE, "qk_dim": 8, "vo_dim": 8}),
    ):  # fmt: skip
        done = surgery.convert(
            "builtin:llama", tmp_path / name, manifest(chosen, text="builtin", samples=16, length=64),
            statistics=tmp_path / "statistics",
        )  # fmt: skip
        found = run(load(done.out), ids).log_softmax(-1)
        lost[name] = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert lost["calibrated"] < lost["stride"] / 2
    assert lost["uniform"] < lost["stride"] / 2


def trained_text():
    from transformers import AutoTokenizer

    from surgery.builtin.text import heldout_text

    tokenizer = AutoTokenizer.from_pretrained(Path(surgery.__file__).parent / "builtin" / "llama")
    return torch.tensor(tokenizer(heldout_text()[:8000])["input_ids"][: 8 * 64]).view(8, 64)


# Settings at large: a typed refusal, or what the settings say


RANDOM_SETTINGS = some.fixed_dictionaries(
    {},
    optional={
        "kv_ratio": some.sampled_from([0.05, 0.2, 0.3, 0.5, 0.75, 1.0]),
        "qk_dim": some.sampled_from([1, 2, 3, 4, 6, 8, 16, 18, [4, 8], [16, 6], [4]]),
        "vo_dim": some.sampled_from([1, 3, 4, 8, 15, 16, 17, [16, 5], [8, 8, 8]]),
        "method": some.sampled_from(["calibrated", "stride", "paper"]),
        "qk_select": some.sampled_from(["energy", "stride", "matched"]),
        "rope": some.sampled_from(["keep", "paper"]),
        "vo_basis": some.sampled_from(["svd", "stride"]),
        "allocation": some.sampled_from(["measured", "uniform"]),
        "logit_gain": some.booleans(),
        "refit_q": some.booleans(),
        "refit_o": some.booleans(),
    },
)


UNFITTED = some.fixed_dictionaries(
    {
        "qk_dim": some.sampled_from([4, 8, 16, [4, 8], [16, 4]]),
        "vo_dim": some.sampled_from([1, 2, 8, 16, [16, 4]]),
        "method": some.sampled_from(["calibrated", "stride"]),
        "qk_select": some.sampled_from(["energy", "stride", "matched"]),
    }
).map(lambda chosen: {**chosen, **NO_FIT, "vo_basis": "stride"})


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    base = write_tiny(folder / "base", "qwen2", seed=7, attention_bias=False)
    return folder, base


@pytest.mark.slow
@settings(max_examples=80, deadline=None, derandomize=True)
@given(chosen=RANDOM_SETTINGS | UNFITTED)
def test_any_settings_are_refused_or_hold(arena, chosen):
    folder, base = arena
    out = folder / f"result_{len(list(folder.iterdir()))}"
    try:
        done = surgery.convert(str(base), out, manifest(chosen), statistics=folder / "statistics")
    except SurgeryError:
        event("refused")
        assert not out.exists()
        assert not out.with_name(out.name + ".partial").exists()
        return
    said = done.lock["manifest"]["operations"][0]["kv_latent"]
    found = run(load(out))
    if said["rope"] == "paper":  # held against the published recipe above
        assert torch.isfinite(found).all()
        return
    if "surgery" not in config_of(out) and "head_dim" not in config_of(out):  # every channel was kept
        torch.testing.assert_close(found, run(load(base)), atol=0, rtol=0)
        return
    close(found, run(padded(base, out)), 2e-5)
    if said["logit_gain"] or said["refit_q"] or said["refit_o"] or said["vo_basis"] == "svd":
        event("fitted")
        return
    event("exact")
    stock = "surgery" not in config_of(out)
    layers = [
        (
            pairs,
            [list(range(0, HEAD, HEAD // values))] * 2,
            HEAD**-0.5 if stock and said["method"] != "paper" else scaling,
        )
        for pairs, values, scaling in layers_of(out)
    ]
    assert said["qk_select"] == "energy" or all(
        pairs == chosen_pairs(said["qk_select"], pairs) for pairs, _, _ in layers
    )
    close(found, run(silence(load(base), layers, config_of(base))), 2e-5)


def chosen_pairs(select, pairs):
    """The pairs that a rule without data means, for as many as there are."""
    count = len(pairs[0])
    if select == "stride":
        return [list(range(0, HEAD // 2, HEAD // 2 // count))] * 2
    fast = [HEAD // 8 + j * HEAD // 2 // count for j in range(count // 2)]
    return [fast + [3 * HEAD // 8 + j * HEAD // 4 // count for j in range(count // 2)]] * 2


# Calibration: what it depends on, and what is kept


def measured(folder):
    return sorted((folder / "statistics").glob("*.safetensors"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("refit_o", [True, False])
def test_prices_are_divergences_at_the_output(family, refit_o, tmp_path, monkeypatch):
    """A price is what converting that one layer, solved without the last windows, costs on the last windows."""
    from surgery.calibration import stage
    from surgery.calibration.text import Windows

    base, ids = write_tiny(tmp_path / f"base_{family}", family, seed=8), tokens(20, rows=8)
    shown = [ids]
    monkeypatch.setattr(stage, "_windows", lambda *_: Windows(shown[0], {}))
    convert(base, tmp_path / f"{family}_budget", {"kv_ratio": 0.6, "refit_o": refit_o})
    costs = facts_of(measured(tmp_path)[0])["costs"]
    shown[0] = ids[:6]
    expected = run(load(base), ids[6:]).log_softmax(-1)
    layers = (1,) if refit_o else (0, 1)  # a fit in a first layer would be followed by another in the second
    for layer in layers:
        for item, (key, width) in enumerate((("qk_dim", 4), ("vo_dim", 6))):
            widths = [HEAD, HEAD]
            widths[layer] = width
            chosen = {"qk_dim": HEAD, "vo_dim": HEAD, "refit_o": refit_o, key: widths}
            found = run(load(convert(base, tmp_path / f"{family}_{layer}_{key}", chosen)), ids[6:]).log_softmax(-1)
            divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
            assert costs[2 * layer + item][str(width)] == pytest.approx(divergence, rel=1e-3)
            assert costs[2 * layer + item][str(HEAD)] == 0


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_outputs_are_fitted_to_the_original_stream(family, tmp_path, monkeypatch):
    """The second layer's output makes up, as well as least squares can, for what the first one lost."""
    from surgery.calibration import stage
    from surgery.calibration.text import Windows

    base, ids = write_tiny(tmp_path / f"base_{family}", family, seed=8), tokens(60, rows=10)
    monkeypatch.setattr(stage, "_windows", lambda *_: Windows(ids, {}))
    out = convert(base, tmp_path / f"{family}_fitted", {"qk_dim": 6, "vo_dim": 6})
    seen, streams = {}, []
    for name, model in (("base", load(base)), ("result", load(out))):
        projection = model.model.layers[1].self_attn.o_proj
        projection.register_forward_hook(lambda _m, x, y, name=name: seen.update({name: (x[0], y)}))
        with torch.no_grad():
            streams.append(model(ids, output_hidden_states=True).hidden_states[1])
    target = (seen["base"][1] + streams[0] - streams[1]).flatten(0, 1).double()
    design, reached = (one.flatten(0, 1).double() for one in seen["result"])
    if family == "qwen2":
        design = torch.cat([design, torch.ones_like(design[:, :1])], 1)
    best = design @ torch.linalg.lstsq(design, target).solution
    least = float((best - target).square().sum())
    assert least <= float((reached - target).square().sum()) <= 1.01 * least


def test_own_text_is_the_same_every_time(tmp_path):
    base = write_tiny(tmp_path / "base", "llama")
    results = []
    for number in range(2):
        place = tmp_path / str(number)
        place.mkdir()
        results.append(tensors_of(convert(base, place / "out", {"kv_ratio": 0.6})))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    other = tmp_path / "other"
    other.mkdir()
    changed = tensors_of(convert(base, other / "out", {"kv_ratio": 0.6}, seed=1))
    assert any(t.shape != changed[name].shape or not torch.equal(t, changed[name]) for name, t in results[0].items())


def test_stored_statistics_are_taken_again(tmp_path, monkeypatch):
    from surgery.calibration import stage, store
    from surgery.operations.kv_latent import measuring

    base, chosen = write_tiny(tmp_path / "base", "llama"), {"qk_dim": 8, "vo_dim": 12}
    first = tensors_of(convert(base, tmp_path / "first", chosen))
    (stored,) = measured(tmp_path)

    def forbidden(*_args, **_kwargs):
        raise AssertionError("measured again")

    read, opened = [], store.safe_open
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "solve", forbidden)
        patch.setattr(stage, "loaded_model", forbidden)
        patch.setattr(store, "safe_open", lambda path, *more: read.append(path) or opened(path, *more))
        again = tensors_of(convert(base, tmp_path / "again", chosen))
        assert all(torch.equal(again[name], first[name]) for name in first)
        found = store.StoredTensors(stored)
        before = len(read)
        assert found["layers.0.q.weight"].shape == (32, 64)
        assert len(read) == before + 1  # one tensor is one look into the file, nothing is held
        with pytest.raises(KeyError):
            found["layers.9.q.weight"]
        for changed in ({"qk_dim": 8, "vo_dim": 11}, {"qk_dim": 8, "vo_dim": 12, "refit_o": False}):
            with pytest.raises(AssertionError, match="measured again"):
                convert(base, tmp_path / "changed", changed)
        for calibration in ({"samples": 5}, {"length": 23}, {"seed": 3}):
            with pytest.raises(AssertionError, match="measured again"):
                convert(base, tmp_path / "changed", chosen, **calibration)
        other = write_tiny(tmp_path / "other", "llama", seed=1)
        with pytest.raises(AssertionError, match="measured again"):
            convert(other, tmp_path / "changed", chosen)
        assert not (tmp_path / "changed").exists()


def test_changed_text_is_measured_anew(tmp_path):
    base = write_tiny(tmp_path / "base", "llama")
    text = some_text(base)
    results = []
    for content in ("abcd" * 400, "wxyz" * 400, "abcd" * 400):
        Path(text["text"][0]).write_text(content)
        out = convert(base, tmp_path / f"out_{len(results)}", {"qk_dim": 8, "vo_dim": 12}, **text)
        results.append(tensors_of(out)["model.layers.1.self_attn.o_proj.weight"])
    assert len(measured(tmp_path)) == 2
    assert torch.equal(results[0], results[2])
    assert not torch.allclose(results[0], results[1], atol=1e-3)


def test_another_field_is_measured_anew(tmp_path):
    base = write_tiny(tmp_path / "base", "llama")
    some_text(base)
    lines = tmp_path / "text.jsonl"
    lines.write_text(json.dumps({"text": "abcd" * 400, "other": "wxyz" * 400}) + "\n")
    for field in ("text", "other"):
        convert(base, tmp_path / field, {"qk_dim": 8, "vo_dim": 12}, text=[str(lines)], field=field)
    assert len(measured(tmp_path)) == 2


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("resident", [0.7, 0.3])
def test_offloaded_weights_give_the_same_statistics(family, resident, tmp_path):
    from surgery.calibration.loading import loaded_model
    from surgery.checkpoint.evaluate import load as load_tensor
    from surgery.checkpoint.reader import open_checkpoint
    from surgery.operations.base import Measuring
    from surgery.operations.kv_latent.measuring import solve
    from surgery.operations.kv_latent.settings import KVLatentSettings
    from surgery.planning import open_draft

    checkpoint = open_checkpoint(write_tiny(tmp_path / f"base_{family}", family))
    found = []
    for limit in (None, int(resident * checkpoint.tensor_bytes)):
        with loaded_model(checkpoint, "cpu", limit) as network:
            places = set(getattr(network, "hf_device_map", {}).values())
            assert ("disk" in places) == (limit is not None)
            measuring = Measuring(
                network, open_draft(checkpoint).model, lambda name: load_tensor(checkpoint, checkpoint.tensors[name]),
                tokens(20, rows=6), 0,
            )  # fmt: skip
            found.append(solve(measuring, KVLatentSettings(kv_ratio=0.6)))
    whole, offloaded = found
    for first, second in zip(whole.facts["layers"], offloaded.facts["layers"], strict=True):
        assert first | {"relative_error": 0} == second | {"relative_error": 0}
    for name, tensor in whole.tensors.items():
        close(offloaded.tensors[name], tensor)
