"""Emitted code and configs, without loading anything."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.emission.code import COMPATIBILITY, RUNTIME, Family, RuntimePart, auto_map, emit_code, neighbours
from surgery.emission.config import custom_config, down_level, down_level_tokenizer, native_config
from surgery.emission.lint import MAX_LINES, interface_calls, lint
from surgery.errors import UnsupportedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.tiny import ARCHITECTURES, FAMILIES, tiny_config

ATTENTION = RuntimePart("surgery_latent_attention.py", "LatentAttention", "self_attn")
ENTRY = "modeling_surgery_llama.py"


def family(model_type="llama"):
    return Family.named(model_type, ARCHITECTURES[model_type].removesuffix("ForCausalLM"))


def emitted(model_type="llama", parts=(ATTENTION,)):
    return emit_code(family(model_type), list(parts), "1.2.3")


def messages(source, name="helper.py", **others):
    files = {name: source.encode()} | {f"{other}.py": text.encode() for other, text in others.items()}
    return [finding.message for finding in lint(files)]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_emitted_files_are_clean_and_always_the_same(model_type):
    files = emitted(model_type)
    assert lint(files) == []
    assert files == emitted(model_type)
    assert list(files) == list(emitted(model_type))
    assert all(content.count(b"\n") < MAX_LINES for content in files.values())
    entry = files[f"modeling_surgery_{model_type}.py"].decode()
    assert "surgery 1.2.3" in entry
    assert "SPDX-License-Identifier: Apache-2.0" in entry


def test_equal_bytes_in_another_process():
    code = (
        "import hashlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "from surgery.emission.code import *\n"
        "part = RuntimePart('surgery_latent_attention.py', 'LatentAttention', 'self_attn')\n"
        "files = emit_code(Family.named('llama', 'Llama'), [part], '1.2.3')\n"
        "print(hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest())\n"
    )
    root = str(Path(__file__).parents[2])
    runs = [
        subprocess.run(
            [sys.executable, "-c", code, root], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1")
    ]
    assert runs[0] == runs[1]


def test_runtime_files_travel_byte_for_byte_with_their_neighbours():
    files = emitted()
    assert set(files) == {
        "configuration_surgery_llama.py",
        ENTRY,
        COMPATIBILITY,
        "surgery_latent_attention.py",
    }
    for name in (COMPATIBILITY, "surgery_latent_attention.py"):
        assert files[name] == (RUNTIME / name).read_bytes()


def test_every_runtime_file_is_self_contained():
    available = {path.name for path in RUNTIME.glob("*.py")} - {"__init__.py"}
    for name in available:
        assert set(neighbours(name)) <= available
        assert "surgery." not in "".join(
            node.module or ""
            for node in ast.walk(ast.parse((RUNTIME / name).read_text()))
            if isinstance(node, ast.ImportFrom) and not node.level
        )


def test_the_entry_swaps_what_the_parts_say():
    experts = RuntimePart("surgery_latent_attention.py", "LatentAttention", "mlp")
    entry = emitted(parts=[ATTENTION, experts])[ENTRY].decode()
    assert "layer.self_attn = LatentAttention(config, index, layer.self_attn)" in entry
    assert "layer.mlp = LatentAttention(config, index, layer.mlp)" in entry
    assert "self.rotary_emb = latent_rotary(config, self.rotary_emb)" in entry
    assert "keep_weight_conversion(" not in entry  # the native rules would write into experts that are gone
    assert 'keep_weight_conversion("llama", "surgery_llama")' in emitted()[ENTRY].decode()


def test_auto_map_names_classes_that_are_there():
    files = emitted("qwen3_moe")
    mapping = auto_map(family("qwen3_moe"))
    assert set(mapping) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for reference in mapping.values():
        module, name = reference.split(".")
        classes = (node.name for node in ast.walk(ast.parse(files[f"{module}.py"])) if isinstance(node, ast.ClassDef))
        assert name in classes


def test_attention_is_found_once():
    tree = ast.parse(emitted()["surgery_latent_attention.py"])
    forwards = [
        function
        for kind in ast.walk(tree)
        if isinstance(kind, ast.ClassDef) and kind.name == "LatentAttention"
        for function in kind.body
        if isinstance(function, ast.FunctionDef) and function.name == "forward"
    ]
    assert len(interface_calls(forwards[0])) == 1


GOOD_FORWARD = """
class A:
    def forward(self, x, past_key_values=None, past_key_value=None, **kwargs):
        attend = eager
        attend = ALL_ATTENTION_FUNCTIONS[self.name]
        return attend(self, x, scaling=self.scaling, **kwargs)
"""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os\n", "imports os"),
        ("def f():\n    import numpy\n", "imports numpy"),
        ("from subprocess import run\n", "imports subprocess"),
        ("x = eval('1')\n", "uses eval"),
        ("f = open\n", "uses open"),
        ("import torch\ntorch.load('x')\n", "uses .load"),
        ("from torch import load\n", "imports load"),
        ("from torch import *\n", "imports *"),
        ("from . import other\n", "relative imports must read"),
        ("from .a.b import c\n", "relative imports must read"),
        ("from ..a import c\n", "relative imports must read"),
        ("from .absent import c\n", "not among the files"),
        ('"""\nfrom .absent import c\n"""\n', "takes for an import"),
        ("class MyMambaThing: pass\n", "contains 'mamba'"),
        ("x = {'per_layer_config': 1}\n", "reserved name per_layer_config"),
        ("config.layer_types = ['mine']\n", "assigns layer_types"),
        ("self.register_buffer('a', b, persistent=False)\n", "not persistent"),
        ("x = 1\n" * 401, "more than 400"),
        ("def f(:\n", "does not parse"),
        (GOOD_FORWARD.replace("past_key_value=None, ", ""), "does not accept past_key_value"),
        (GOOD_FORWARD.replace(", **kwargs):", "):").replace(", **kwargs)", ")"), "does not end in **kwargs"),
        (GOOD_FORWARD.replace("**kwargs):", "cache_position=None, **kwargs):"), "names cache_position"),
        (GOOD_FORWARD.replace("return attend", "attend(scaling=1.0)\n        return attend"), "2 times"),
        (GOOD_FORWARD.replace("scaling=self.scaling", "scaling=x.shape[0]"), "needs scaling="),
        (GOOD_FORWARD.replace("attend = ALL", "self.attend = ALL"), "0 times"),
    ],
)
def test_lint_finds(source, expected):
    if expected == "0 times":
        source = source.replace("attend = eager", "other = eager")
    assert any(expected in message for message in messages(source)), messages(source)


def test_lint_passes_good_files():
    assert messages(GOOD_FORWARD) == []


def test_the_entry_must_import_every_helper_itself():
    entry = '"""No network, no subprocess, no eval, no file access."""\nfrom .one import x\n'
    found = messages(entry, "modeling_m.py", one="from .two import y\nx = y\n", two="y = 1\n")
    assert found == ["does not import two itself, and older loaders copy only what it imports"]
    assert "the header lacks the promise" in messages("x = 1\n", "modeling_m.py")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_theta": 5e5, "rope_scaling": None},
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "beta_fast": 32}},
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32}},
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_scaling": None},
        ),
        (  # 5.x lets the older key win
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 7.0, "factor": 9.0}},
            {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
        ({"rope_theta": 1e4, "rope_scaling": None}, {"rope_theta": 1e4, "rope_scaling": None}),
        ({"dtype": "bfloat16"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({"torch_dtype": "float16"}, {"dtype": "float16", "torch_dtype": "float16"}),
        ({"_name_or_path": "/srv/me", "x": [1]}, {"x": [1]}),
        (
            {"model_type": "qwen3_moe", "num_local_experts": 5},
            {"model_type": "qwen3_moe", "num_local_experts": 5, "num_experts": 5},
        ),
        (
            {
                "model_type": "phi3",
                "rope_parameters": {
                    "rope_type": "longrope",
                    "type": "longrope",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 1.0,
                    "short_factor": [1.0],
                    "long_factor": [2.0],
                    "original_max_position_embeddings": 64,
                },
            },
            {
                "model_type": "phi3",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
                "original_max_position_embeddings": 64,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
            },
        ),
    ],
)
def test_down_level(config, expected):
    before = json.dumps(config)
    assert down_level(config) == expected
    assert json.dumps(config) == before
    assert down_level(expected) == expected


@pytest.mark.parametrize("model_type", FAMILIES)
def test_down_level_leaves_older_configs_alone(model_type):
    config = tiny_config(model_type)
    assert down_level(config) == config


def test_rope_per_layer_type_is_refused():
    nested = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    with pytest.raises(UnsupportedModel) as refused:
        down_level({"rope_parameters": nested})
    assert refused.value.remedy


def test_phi3_rope_that_older_releases_cannot_read_is_refused():
    with pytest.raises(UnsupportedModel):
        down_level({"model_type": "phi3", "rope_parameters": {"rope_type": "yarn", "factor": 2.0}})


def test_custom_and_native_configs():
    base = tiny_config("llama") | {"auto_map": {"AutoModel": "other--x.Y"}, "surgery": {"old": 1}}
    custom = custom_config(base, family(), {"version": 1})
    assert custom["model_type"] == "surgery_llama"
    assert custom["architectures"] == ["SurgeryLlamaForCausalLM"]
    assert custom["auto_map"] == auto_map(family())
    assert custom["surgery"] == {"version": 1}
    assert custom["rope_theta"] == base["rope_theta"]
    native = native_config(base)
    assert native["model_type"] == "llama"
    assert not {"auto_map", "surgery"} & set(native)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"},
            {"tokenizer_class": "PreTrainedTokenizerFast"},
        ),
        ({"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "LlamaTokenizer"}),
        (
            {"extra_special_tokens": ["<a>", "<b>"], "additional_special_tokens": ["<a>"]},
            {"additional_special_tokens": ["<a>", "<b>"]},
        ),
        ({"extra_special_tokens": {"image": "<i>"}}, {"extra_special_tokens": {"image": "<i>"}}),
    ],
)
def test_down_level_tokenizer(config, expected):
    assert down_level_tokenizer(config) == expected
