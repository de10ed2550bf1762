"""Every check of the verification passes on sound checkpoints and is shown to fail on one that breaks just that."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from surgery.errors import UsageError, VerificationFailure
from surgery.verification import LOCK, Promises, Trial, check_hashes, check_structure, verify

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.tiny import write_tiny

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
SPECIALS = ["<pad>", "<s>", "</s>"]
KV_NUMBERS = 2 * 2 * 2 * 16  # keys and values, layers, heads, width

CONFIGURATION = """
from transformers import LlamaConfig


class SurgeryConfig(LlamaConfig):
    model_type = "surgery_llama"

    def __init__(self, surgery=None, **kwargs):
        super().__init__(**kwargs)
        self.surgery = surgery or {}


SurgeryConfig.register_for_auto_class()
"""

MODELING = """
import warnings

import torch
from transformers.generation import GenerationMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention, LlamaForCausalLM, LlamaModel, apply_rotary_pos_emb, eager_attention_forward)

from .configuration_surgery import SurgeryConfig


class SurgeryAttention(LlamaAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None,
                past_key_value=None, **kwargs):
        cache = past_key_values if past_key_values is not None else past_key_value
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        scaling = self.scaling
        # before the cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        # after the cache
        interface = eager_attention_forward
        if self.config._attn_implementation != "eager":
            interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = interface(self, query, key, value, attention_mask, scaling=scaling, dropout=0.0, **kwargs)
        output = self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous())
        # after attention
        return output, weights


class SurgeryModel(LlamaModel):
    config_class = SurgeryConfig

    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = SurgeryAttention(config, index)
        self.post_init()


class SurgeryForCausalLM(LlamaForCausalLM, GenerationMixin):
    config_class = SurgeryConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = SurgeryModel(config)
        self.post_init()

    # more methods


SurgeryModel.register_for_auto_class("AutoModel")
SurgeryForCausalLM.register_for_auto_class("AutoModelForCausalLM")
"""

CACHE_METHOD = """
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                                 past_key_values=past_key_values, **kwargs)
        if output.past_key_values is not None:
            output.past_key_values.{method} = lambda *args, **kwargs: None
        return output
"""

IDENTITY_IN_DICT = """
    def to_dict(self):
        return super().to_dict() | {"identity": id(self)}


"""

DOUBLING_SAVE = """
    def save_pretrained(self, folder, **kwargs):
        kept = self.lm_head.weight.data.clone()
        self.lm_head.weight.data.mul_(2)
        super().save_pretrained(folder, **kwargs)
        self.lm_head.weight.data.copy_(kept)
"""

# Check that must fail, and it alone: what replaces which line of the modeling code.
SABOTAGED_CODE = {
    "loading_report": ("import warnings", "import warnings\n\nimport surgery"),
    "cached_decode_equals_full_forward": (
        "cache = past_key_values if past_key_values is not None else past_key_value",
        "cache = past_key_value",
    ),
    "greedy_equals_beam_1": (
        "# after the cache",
        "key = key if cache is None or key.shape[2] == query.shape[2] else key.flip(2)",
    ),
    "beam_4": ("# more methods", CACHE_METHOD.format(method="reorder_cache")),
    "num_return_sequences": (
        "# after the cache",
        "value = value if cache is None or query.shape[2] > 1 else value.roll(1, 0)",
    ),
    "assisted_decoding": ("# more methods", CACHE_METHOD.format(method="crop")),
    "left_padded_batch": ("# after the cache", "attention_mask = None"),
    "cache_bytes": (
        "# before the cache",
        "key, value = (part.repeat_interleave(2, 1) for part in (key, value)); self.num_key_value_groups = 1",
    ),
    "eager_equals_sdpa": ("# before the cache", 'scaling *= 1.1 if self.config._attn_implementation == "eager" else 1'),
    "output_attentions": ("# after attention", "weights = None"),
    "save_reload": ("# more methods", DOUBLING_SAVE),
    "gradient_checkpointing": ("# after attention", "output = output + 0 * (output * 0).abs().sqrt()"),
    "static_cache": (
        "# after the cache",
        'value = value.flip(1) if type(cache).__name__ == "StaticCache" else value',
    ),
    "no_warnings": ("# after attention", 'warnings.warn("this model talks", UserWarning)'),
}


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = write_tiny(tmp_path_factory.mktemp("native") / "model", "llama")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    generator = torch.Generator().manual_seed(3)
    letters = torch.randint(len(LETTERS), (4000,), generator=generator)
    file = tmp_path_factory.mktemp("text") / "heldout.txt"
    file.write_text("".join(LETTERS[index] for index in letters))
    return file


def write_tokenizer(folder, *, bos=False, size=0):
    """One token per letter, after three special ones; `size` raises the highest id."""
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *LETTERS])}
    vocabulary |= {f"<{index}>": index for index in range(len(vocabulary), size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIALS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_remote(folder, *, modeling=MODELING, configuration=CONFIGURATION, **overrides):
    """A tiny Llama whose attention comes as code beside the weights."""
    entries = {"AutoConfig": "configuration_surgery.SurgeryConfig", "AutoModel": "modeling_surgery.SurgeryModel"}
    entries["AutoModelForCausalLM"] = "modeling_surgery.SurgeryForCausalLM"
    own = {"model_type": "surgery_llama", "auto_map": entries, "architectures": ["SurgeryForCausalLM"]}
    write_tiny(folder, "llama", **overrides)
    config = json.loads((folder / "config.json").read_text()) | own | {"surgery": {"version": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_surgery.py").write_text(configuration)
    (folder / "modeling_surgery.py").write_text(modeling)
    return folder


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def sabotaged(source, old, new):
    assert source.count(old) == 1
    return source.replace(old, new)


def failures(folder, *checks, against=None, promises=None, **trial):
    """Names of the checks that fail when `checks` are asked for; each of them must be among the answers."""
    result = verify(folder, against=against, promises=promises, trial=Trial(checks=checks or None, windows=2, **trial))
    assert {check.name for check in result.checks} >= set(checks)
    assert result.passed == (not result.failures)
    return {check.name: check.detail for check in result.failures}


def write_lock(folder):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    outputs = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)} for name, content in files.items()
    }
    (folder / LOCK).write_text(json.dumps({"outputs": outputs}))


# ---- sound checkpoints


# What is looked at where weights are packed, a quantized cache is asked for, or the cache is coded.
OF_QUANTIZED = ("dequantized_logits", "quantized_cache", "codebook_cache", "visual_pruning")


@pytest.mark.slow
def test_native_checkpoint_passes_everything(native, text):
    promises = Promises(
        kv_bytes_per_token=2 * KV_NUMBERS,
        kv_numbers_per_token=KV_NUMBERS,
        kv_dtype="bfloat16",
        static_cache=True,
        max_perplexity_ratio=1.0,
        identical=True,
    )
    result = verify(native, against=native, promises=promises, trial=Trial(text=text, windows=4, length=64))
    assert [(check.name, check.detail) for check in result.failures] == []
    assert {check.name for check in result.checks if check.status == "skip"} == {"hashes", *OF_QUANTIZED}
    assert result.measurements["kl"] == 0
    assert result.measurements["agreement"] == 1
    assert result.measurements["tokens"] == 4 * 63
    assert result.measurements["kv_bytes_per_token"] == 2 * KV_NUMBERS
    assert set(result.versions) == {"transformers", "torch", "python"}
    result.require()


@pytest.mark.slow
def test_remote_code_passes_everything(tmp_path):
    folder = write_remote(tmp_path / "model")
    write_lock(folder)
    result = verify(folder, promises=Promises(kv_bytes_per_token=4 * KV_NUMBERS, static_cache=True))
    assert [(check.name, check.detail) for check in result.failures] == []
    skipped = {check.name for check in result.checks if check.status == "skip"}
    assert skipped == {"tokenizer", "perplexity_gate", "base_comparison", "logits_equal", *OF_QUANTIZED}
    assert all(check.detail for check in result.checks if check.status == "skip")


@pytest.mark.slow
def test_bfloat16_is_verified_as_stored(tmp_path):
    folder = write_tiny(tmp_path / "model", "llama", dtype=torch.bfloat16)
    assert failures(folder, dtype="auto") == {}


@pytest.mark.slow
@pytest.mark.parametrize("bos", [False, True])
def test_perplexity_and_divergence_are_those_of_known_distributions(tmp_path, text, bos):
    """Two models that give the same distribution everywhere: every number is known in closed form."""
    logits = torch.randn(2, 128, generator=torch.Generator().manual_seed(5))
    folders = [write_constant(tmp_path / f"model{index}", logits[index], bos=bos) for index in range(2)]
    out, base = (row.double().log_softmax(-1) for row in logits)
    result = verify(
        folders[0], against=folders[1], trial=Trial(checks=["base_comparison"], text=text, windows=3, length=32)
    )
    assert result.passed
    tokens = torch.tensor([LETTERS.index(letter) + len(SPECIALS) for letter in text.read_text()])
    targets = tokens[: 3 * 31] if bos else tokens[: 3 * 32].view(3, 32)[:, 1:].flatten()
    measured = result.measurements
    assert measured["tokens"] == len(targets) == 93
    assert measured["perplexity"] == pytest.approx(math.exp(-out[targets].mean()), rel=1e-5)
    assert measured["base_perplexity"] == pytest.approx(math.exp(-base[targets].mean()), rel=1e-5)
    assert measured["kl"] == pytest.approx(float((base.exp() * (base - out)).sum()), rel=1e-5)
    assert measured["agreement"] == float(out.argmax() == base.argmax())


def write_constant(folder, logits, *, bos):
    """A model whose hidden state is one everywhere, so that the head's rows are the logits."""
    write_tiny(folder, "llama")
    write_tokenizer(folder, bos=bos)

    def edit(tensors):
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor.zero_()
        tensors["model.embed_tokens.weight"].fill_(1.0)
        tensors["model.norm.weight"].fill_(1.0)
        tensors["lm_head.weight"] = (logits[:, None] / 64).repeat(1, 64)

    edit_tensors(folder, edit)
    return folder


# ---- one sabotage, one failing check


@pytest.mark.slow
@pytest.mark.parametrize("check", SABOTAGED_CODE)
def test_sabotaged_code(tmp_path, check):
    modeling = sabotaged(MODELING, *SABOTAGED_CODE[check])
    folder = write_remote(tmp_path / "model", modeling=modeling)
    promises = Promises(kv_numbers_per_token=KV_NUMBERS, static_cache=True)
    assert set(failures(folder, check, "finite_logits", "config_roundtrip", promises=promises)) == {check}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), "missing"),
        (lambda tensors: tensors.update({"model.layers.1.spare.weight": torch.zeros(2)}), "unexpected"),
        (lambda tensors: tensors.update({"lm_head.weight": torch.zeros(100, 64)}), "size"),
    ],
    ids=["missing", "unexpected", "mismatched"],
)
def test_tensors_that_do_not_fit(tmp_path, edit, word):
    folder = write_tiny(tmp_path / "model", "llama")
    edit_tensors(folder, edit)
    found = failures(folder, "config_roundtrip")  # loading is looked at even when nobody asks
    assert set(found) == {"loading_report"}
    assert word in found["loading_report"].lower()


@pytest.mark.slow
def test_nan_weight(tmp_path):
    folder = write_tiny(tmp_path / "model", "llama")
    edit_tensors(folder, lambda tensors: tensors["lm_head.weight"][5].fill_(math.nan))
    assert set(failures(folder, "finite_logits", "config_roundtrip", "rope_frequencies")) == {"finite_logits"}
    assert set(failures(folder, "eager_equals_sdpa", "save_reload")) == {"eager_equals_sdpa", "save_reload"}


@pytest.mark.slow
def test_promised_rope_frequencies(native):
    right = tuple(10_000.0 ** (-index / 8) for index in range(8))
    wrong = tuple(500_000.0 ** (-index / 8) for index in range(8))
    checks = ("rope_frequencies", "finite_logits")
    assert failures(native, *checks, promises=Promises(inv_freq=right)) == {}
    assert set(failures(native, *checks, promises=Promises(inv_freq=wrong))) == {"rope_frequencies"}


@pytest.mark.slow
def test_rope_base_that_the_code_does_not_read(tmp_path):
    dropping = sabotaged(
        CONFIGURATION, "super().__init__(**kwargs)", "kwargs.pop('rope_theta', None); super().__init__(**kwargs)"
    )
    folder = write_remote(tmp_path / "model", configuration=dropping, rope_theta=500_000.0)
    assert set(failures(folder, "rope_frequencies", "finite_logits")) == {"rope_frequencies"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("surgery=None, **kwargs", "surgery, **kwargs"),
        ("SurgeryConfig.register", IDENTITY_IN_DICT + "SurgeryConfig.register"),
    ],
    ids=["needs an argument", "is not what was pickled"],
)
def test_configuration_class(tmp_path, old, new):
    folder = write_remote(tmp_path / "model", configuration=sabotaged(CONFIGURATION, old, new))
    assert set(failures(folder, "config_roundtrip", "finite_logits")) == {"config_roundtrip"}


@pytest.mark.slow
def test_code_that_is_not_saved_again(tmp_path):
    folder = write_remote(tmp_path / "model")
    (folder / "surgery_unused.py").write_text("")
    assert "surgery_unused.py" in failures(folder, "save_reload")["save_reload"]


@pytest.mark.slow
def test_tokenizer_with_more_tokens_than_rows(tmp_path):
    folder = write_tiny(tmp_path / "model", "llama")
    write_tokenizer(folder, size=200)
    assert set(failures(folder, "tokenizer", "finite_logits")) == {"tokenizer"}
    (folder / "tokenizer.json").write_text("{")
    assert set(failures(folder, "finite_logits")) == {"tokenizer"}  # a broken one is never silent


@pytest.mark.slow
@pytest.mark.parametrize(
    "promises", [Promises(kv_numbers_per_token=KV_NUMBERS - 1), Promises(kv_bytes_per_token=KV_NUMBERS)]
)
def test_wrong_claim_of_cache_bytes(native, promises):
    assert set(failures(native, "cache_bytes", "finite_logits", promises=promises)) == {"cache_bytes"}


@pytest.mark.slow
def test_comparison_with_the_base(tmp_path, native, text):
    folder = write_tiny(tmp_path / "model", "llama")
    write_tokenizer(folder)
    edit_tensors(folder, lambda tensors: tensors["lm_head.weight"].mul_(3))
    checks = ("perplexity_gate", "base_comparison", "logits_equal")
    promises = Promises(max_perplexity_ratio=1.2, identical=True)
    found = failures(folder, *checks, against=native, promises=promises, text=text)
    assert set(found) == {"perplexity_gate", "logits_equal"}
    loose = Promises(max_perplexity_ratio=1e6)
    assert failures(folder, *checks, against=native, promises=loose, text=text) == {}
    other = write_tiny(tmp_path / "base", "llama", vocab_size=96)
    assert set(failures(folder, "base_comparison", "finite_logits", against=other)) == {"base_comparison"}


@pytest.mark.slow
def test_held_out_text_without_a_tokenizer(tmp_path, native, text):
    folder = write_tiny(tmp_path / "model", "llama")
    promises = Promises(max_perplexity_ratio=2.0)
    assert set(failures(folder, "perplexity_gate", against=native, promises=promises, text=text)) == {"perplexity_gate"}


# ---- files, without a model


def test_hashes(tmp_path):
    folder = write_tiny(tmp_path / "model", "llama")
    assert check_hashes(folder).status == "skip"
    write_lock(folder)
    assert check_hashes(folder).status == "pass"
    extra = folder / "modeling_extra.py"
    extra.write_text("")
    assert check_hashes(folder).detail == "modeling_extra.py is not in the lock"
    extra.unlink()
    content = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(content.replace(b"64", b"65"))
    assert check_hashes(folder).detail == "config.json has another hash"
    (folder / "config.json").write_bytes(content + b"\n")
    assert check_hashes(folder).detail == "config.json has another size"
    (folder / "config.json").unlink()
    assert check_hashes(folder).detail == "config.json is missing"
    os.mkfifo(folder / "config.json")
    assert check_hashes(folder).status == "fail"
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(content)
    (folder / "elsewhere").symlink_to(tmp_path)
    assert check_hashes(folder).detail == "elsewhere is not in the lock"


@pytest.mark.parametrize("lock", ["{", "[]", "{}", '{"outputs": {"config.json": "abc"}}'])
def test_unusable_lock(tmp_path, lock):
    (tmp_path / LOCK).write_text(lock)
    assert check_hashes(tmp_path).status == "fail"


def test_nothing_runs_from_a_changed_folder(tmp_path):
    trace = tmp_path / "trace"
    folder = write_remote(tmp_path / "model")
    write_lock(folder)
    code = f"open({str(trace)!r}, 'w')\n{MODELING}"
    (folder / "modeling_surgery.py").write_text(code)
    result = verify(folder)
    assert [check.name for check in result.failures] == ["hashes"]
    assert not trace.exists()
    with pytest.raises(VerificationFailure, match="hashes"):
        result.require()


def test_structure(tmp_path):
    folder = write_tiny(tmp_path / "model", "llama")
    assert check_structure(folder)[0].status == "pass"
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-8])
    assert check_structure(folder)[0].status == "fail"
    assert [check.name for check in verify(folder).failures] == ["structure"]


# ---- the process


@pytest.mark.slow
def test_a_probe_that_dies_or_hangs(tmp_path):
    dying = sabotaged(
        MODELING, "import warnings", "import os\nimport sys\n\nprint('the end', file=sys.stderr)\nos._exit(3)"
    )
    folder = write_remote(tmp_path / "model", modeling=dying)
    with pytest.raises(VerificationFailure, match="status 3") as caught:
        verify(folder)
    assert caught.value.cause == "the end"
    with pytest.raises(VerificationFailure, match="longer than"):
        verify(folder, trial=Trial(timeout=0.05))


@pytest.mark.slow
def test_unknown_check(native):
    with pytest.raises(VerificationFailure) as caught:
        verify(native, trial=Trial(checks=["no_such_check"]))
    assert "no_such_check" in caught.value.cause


def test_questions_that_cannot_be_answered(native, text):
    for promises, given in (
        (Promises(max_perplexity_ratio=1.1), {"trial": Trial(text=text)}),
        (Promises(max_perplexity_ratio=1.1), {"against": native}),
        (Promises(identical=True), {}),
    ):
        with pytest.raises(UsageError):
            verify(native, promises=promises, **given)
