"""Settings of `quantize`, what it takes for a matrix in each family, and how a budget of bytes is spent."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

import surgery
from surgery.checkpoint.expressions import TensorSpec
from surgery.checkpoint.reader import open_checkpoint
from surgery.errors import ManifestError
from surgery.operations.quantize import FORMATS, refuses
from surgery.operations.quantize.budget import (
    CHOICES,
    allocate_by_gain,
    best_uniform,
    budget_bytes,
    choice_bytes,
    choices_for,
    units_of,
)
from surgery.operations.quantize.settings import QuantizeSettings
from surgery.operations.quantize.targets import (
    Linear,
    Targets,
    find_targets,
    fitting,
    grids_for,
    layout,
    uniform_grids,
    wanted_grid,
)
from surgery.planning import open_draft
from surgery.quantization.compressed_tensors_format import COMPRESSED_TENSORS
from surgery.quantization.gptq_format import GPTQ
from surgery.quantization.grid import Grid
from tests.tiny import ARCHITECTURES as FAMILIES
from tests.tiny import write_tiny


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def chosen(**given):
    """The settings as a manifest gives them."""
    (step,) = surgery.manifest_from_dict({"surgery": 1, "operations": [{"quantize": given}]}).steps
    return step.settings


def refusal(given):
    with pytest.raises(ManifestError) as caught:
        chosen(**given)
    return caught.value


# Settings


def test_defaults():
    assert chosen().model_dump() == {
        "method": "rtn", "bits": 4, "group_size": None, "format": "compressed-tensors", "type": "int", "activations": "none",
        "bytes_per_weight": None, "scales": "mse", "bias_correction": "none", "act_order": True, "damping": 0.01,
        "engine": "surgery", "raise_above": 0.25, "ignore": [],
    }  # fmt: skip


GPTQ_FILES = {"format": "gptq"}
GPTQ_FLOAT = "can have format: gptq only with type: int, no activations and no bytes_per_weight"
ENGINE = {"engine": "gptqmodel", "format": "gptq", "method": "gptq"}
ENGINE_WANTS = "can have engine: gptqmodel only with method: gptq and format: gptq"
DYNAMIC_BITS = "can have activations: dynamic only with bits: 8"
BUDGET_ALONE = "can have bytes_per_weight only with type: int and without activations"
BUDGET_GROUPS = "can have bytes_per_weight only without group_size"
CONTRADICTIONS = [
    ({"type": "float"}, "can have type: float only with bits: 8"),
    ({"type": "float", "bits": 4}, "can have type: float only with bits: 8"),
    ({"type": "float", "bits": 8, "bytes_per_weight": 1.0}, BUDGET_ALONE),
    ({"type": "float", "bytes_per_weight": 1.0}, BUDGET_ALONE),
    ({"type": "float", "method": "gptq", "bits": 8, "bytes_per_weight": 1.0}, BUDGET_ALONE),
    ({"type": "float", "bits": 8, "method": "gptq"}, "can have type: float only with method: rtn"),
    ({"type": "float", "bits": 8, "group_size": 128}, "can have type: float only with group_size: channel"),
    ({"activations": "dynamic"}, DYNAMIC_BITS),
    ({"activations": "dynamic", "bytes_per_weight": 1.0}, BUDGET_ALONE),
    ({"activations": "dynamic", "bits": 8, "bytes_per_weight": 1.0, "group_size": 32}, BUDGET_ALONE),
    ({"activations": "dynamic", "bits": 8, "group_size": 32}, "can have activations: dynamic only with group_size: channel"),
    (GPTQ_FILES | {"type": "float", "bits": 8}, GPTQ_FLOAT),
    (GPTQ_FILES | {"activations": "dynamic", "bits": 8}, GPTQ_FLOAT),
    (GPTQ_FILES | {"bytes_per_weight": 1.0}, GPTQ_FLOAT),
    (GPTQ_FILES | {"type": "float", "bits": 8, "bytes_per_weight": 1.0}, BUDGET_ALONE),
    (GPTQ_FILES | {"bias_correction": "judged"}, "can have format: gptq only without bias_correction"),
    (GPTQ_FILES | {"group_size": "channel"}, "can have format: gptq only with group_size: 32, 64 or 128"),
    (GPTQ_FILES | {"group_size": 16}, "can have format: gptq only with group_size: 32, 64 or 128"),
    ({"engine": "gptqmodel"}, ENGINE_WANTS),
    ({"engine": "gptqmodel", "method": "gptq"}, ENGINE_WANTS),
    ({"engine": "gptqmodel", "format": "gptq"}, ENGINE_WANTS),
    *((ENGINE | {"scales": scales}, "can have engine: gptqmodel only without scales, which it chooses itself") for scales in ("activation", "judged")),
    ({"bytes_per_weight": 1.0, "group_size": 128}, BUDGET_GROUPS),
    ({"bytes_per_weight": 1.0, "group_size": 32, "bits": 8}, BUDGET_GROUPS),
]  # fmt: skip


@pytest.mark.parametrize(("given", "said"), CONTRADICTIONS, ids=str)
def test_contradictions_are_refused(given, said):
    error = refusal(given)
    assert error.problem.startswith("manifest, operations[0].quantize: quantize ")
    assert said in error.problem
    assert "\n" not in error.problem + error.cause + error.remedy
    assert error.remedy == "see its settings: surgery operations quantize"
    assert error.exit_code == 2


@pytest.mark.parametrize("given", [{"type": "float"}, {"activations": "dynamic"}], ids=str)
def test_what_is_in_the_way_of_eight_bits_is_named(given):
    assert "bytes_per_weight" in refusal(given | {"bits": 8, "bytes_per_weight": 1.0}).problem


@pytest.mark.parametrize("given", [{}, {"scales": "none"}, {"scales": "mse"}], ids=str)
def test_an_engine_that_chooses_its_own_scales_goes_with_the_default(given):
    assert chosen(**ENGINE, **given).scales == given.get("scales", "mse")


WRONG = [
    *(({"bits": bits}, "quantize.bits must be 4 or 8") for bits in (3, 2, 16, 0, -4, "4", 4.5, True, None)),
    *(({"group_size": size}, "quantize.group_size must be 'channel' or") for size in (0, 1, 7, -2, 65_537, 32.5, True, "row", [32])),
    *(({"damping": value}, "quantize.damping must be") for value in (0, -0.01, 1.5, "much")),
    *(({"bytes_per_weight": value}, "quantize.bytes_per_weight must be") for value in (0.5, 0, -1, 2, 3.5)),
    *(({"raise_above": value}, "quantize.raise_above must be") for value in (0, -1)),
    ({"ignore": ["("]}, "quantize.ignore has '(', which is no regular expression"),
    ({"ignore": ["ok", "[z-a]"]}, "quantize.ignore has '[z-a]', which is no regular expression"),
    ({"ignore": "up_proj"}, "quantize.ignore must be a list"),
    ({"method": "awq"}, "quantize.method must be 'rtn' or 'gptq'"),
    ({"format": "compressed_tensors"}, "did you mean 'compressed-tensors'?"),
    ({"type": "fp8"}, "quantize.type must be 'int' or 'float'"),
    ({"scales": "max"}, "quantize.scales must be"),
    ({"act_order": "yes"}, "quantize.act_order must be true or false"),
    ({"groupsize": 32}, "unknown key 'groupsize' (did you mean 'group_size'?)"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "said"), WRONG, ids=str)
def test_values_that_cannot_be_are_refused(given, said):
    (key,) = given
    error = refusal(given)
    assert said in error.problem
    assert error.problem.startswith(f"manifest, operations[0].quantize.{key}")
    assert "\n" not in error.problem + error.cause + error.remedy


def test_a_file_is_named_with_its_line(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("surgery: 1\noperations:\n  - quantize:\n      method: rtn\n      bits: 3\n")
    with pytest.raises(ManifestError) as caught:
        surgery.load_manifest(file)
    assert f"{file}:5: quantize.bits must be 4 or 8" in caught.value.problem


@pytest.mark.parametrize(("given", "grid"), [
    ({}, Grid(4, 128)), ({"bits": 8}, Grid(8, None)), ({"group_size": -1}, Grid(4, None)), ({"group_size": "channel"}, Grid(4, None)),
    ({"group_size": 32}, Grid(4, 32)), ({"bits": 8, "group_size": 64}, Grid(8, 64)), ({"format": "gptq"}, Grid(4, 128)),
    ({"format": "gptq", "bits": 8}, Grid(8, 128)), ({"format": "gptq", "group_size": 32}, Grid(4, 32)),
    ({"bits": 8, "type": "float"}, Grid(8, None, "float")), ({"bits": 8, "activations": "dynamic"}, Grid(8, None)),
    ({"bits": 8, "group_size": -1, "type": "float", "activations": "dynamic"}, Grid(8, None, "float")),
], ids=str)  # fmt: skip
def test_the_grid_that_settings_name(given, grid):
    assert wanted_grid(chosen(**given)) == grid
    again = surgery.manifest_from_dict({"surgery": 1, "operations": [{"quantize": chosen(**given).model_dump(mode="json")}]})
    assert again.steps[0].settings == chosen(**given)
    if given.get("group_size") == -1:
        assert chosen(**given).group_size == "channel"


@pytest.mark.parametrize(("given", "calibrates"), [
    ({}, False), ({"scales": "mse"}, False), ({"bits": 8, "type": "float"}, False), ({"format": "gptq"}, False),
    ({"bits": 8, "activations": "dynamic"}, False), ({"method": "gptq"}, True), ({"scales": "activation"}, True),
    ({"scales": "judged"}, True), ({"bias_correction": "judged"}, True), ({"bytes_per_weight": 1.0}, True), (ENGINE, True),
], ids=str)  # fmt: skip
def test_which_settings_need_data(given, calibrates):
    assert chosen(**given).calibrates is calibrates


def test_formats_are_called_as_manifests_spell_them():
    assert {name: form.name for name, form in FORMATS.items()} == {"compressed-tensors": "compressed-tensors", "gptq": "gptq"}
    assert {*FORMATS} == {*get_args(QuantizeSettings.model_fields["format"].annotation)}
    assert FORMATS == {"compressed-tensors": COMPRESSED_TENSORS, "gptq": GPTQ}


# Which matrices


def model_of(folder):
    return open_draft(open_checkpoint(folder)).model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def model(family, **overrides):
        key = family, *sorted(overrides.items())
        if key not in made:
            made[key] = model_of(write_tiny(tmp_path_factory.mktemp("base"), family, **overrides))
        return made[key]

    return model


QKV = {"qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "o": ["self_attn.o_proj"]}
MLP = {"gate_up": ["mlp.gate_proj", "mlp.up_proj"], "down": ["mlp.down_proj"]}


def routed(block="mlp", names=("gate_proj", "up_proj", "down_proj")):
    return {"experts": [f"{block}.experts.{expert}.{name}" for expert in range(4) for name in names]}


def shared(name):
    return {"shared gate_up": [f"mlp.{name}.gate_proj", f"mlp.{name}.up_proj"], "shared down": [f"mlp.{name}.down_proj"]}


# By family: the units of a layer (experts of all layers are one), what stays as it is, and tensors that are no modules.
EXPECTED = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), (QKV | MLP, [], [])),
    "phi3": ({"qkv": ["self_attn.qkv_proj"], "o": QKV["o"], "gate_up": ["mlp.gate_up_proj"], "down": MLP["down"]}, [], []),
    "mixtral": (QKV | routed("block_sparse_moe", ("w1", "w3", "w2")), ["block_sparse_moe.gate"], []),
    "qwen2_moe": (QKV | routed() | shared("shared_expert"), ["mlp.gate", "mlp.shared_expert_gate"], []),
    **dict.fromkeys(("qwen3_moe", "olmoe"), (QKV | routed(), ["mlp.gate"], [])),
    "deepseek_v2": (
        {"q": ["self_attn.q_proj"], "o": QKV["o"]} | routed() | shared("shared_experts"),
        ["mlp.gate", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj"],
        [],
    ),
    "deepseek_v3": (
        {"o": QKV["o"]} | routed() | shared("shared_experts"),
        ["mlp.gate", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj", "self_attn.q_a_proj", "self_attn.q_b_proj"],
        [],
    ),
    "glm4_moe": (QKV | routed() | shared("shared_experts"), ["mlp.gate"], []),
    "gpt_oss": (QKV, ["mlp.router"], ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]),
    "granitemoe": (QKV, ["block_sparse_moe.router.layer"], ["block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"]),
}  # fmt: skip


def in_layers(names, layers=range(2)):
    return sorted(f"model.layers.{layer}.{name}" for layer in layers for name in names)


def grouped(targets):
    """The modules of each unit, whatever units are called."""
    return sorted(sorted(linear.module for linear in linears) for linears in units_of(targets.linears).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_rounded_in_each_family(family, models):
    model, (units, dense, fused) = models(family), EXPECTED[family]
    targets = find_targets(model, [])
    wanted = [in_layers(unit, [layer]) for name, unit in units.items() if name != "experts" for layer in range(2)]
    assert grouped(targets) == sorted([*wanted, *([in_layers(units["experts"])] if "experts" in units else [])])
    assert sorted(targets.dense) == in_layers(dense)
    assert sorted(targets.fused) == in_layers(fused)
    for linear in targets.linears:
        assert (linear.outputs, linear.inputs) == model.shapes[linear.weight]
        assert linear.width == 4
        assert linear.expert == (".experts." in linear.module)
        assert linear.module.startswith(f"model.layers.{linear.layer}.")
    # Every matrix of the model is accounted for: rounded, left, no module, an embedding or the head.
    matrices = {name for name, shape in model.shapes.items() if len(shape) > 1 and not name.endswith("_proj_bias")}
    known = {linear.weight for linear in targets.linears} | {f"{module}.weight" for module in targets.dense} | {*targets.fused}
    assert matrices - known <= {"model.embed_tokens.weight", "lm_head.weight"}


def test_factors_of_attention_are_rounded_where_they_are_wide(models):
    model = models("deepseek_v3", q_lora_rank=256, kv_lora_rank=248, hidden_size=256, num_hidden_layers=1)
    targets = find_targets(model, [])
    assert sorted(targets.dense) == in_layers(["mlp.gate", "self_attn.kv_b_proj", "self_attn.q_b_proj"], [0])  # 112 and 96 outputs
    assert in_layers(["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"], [0]) in grouped(targets)  # [256, 256]: one input


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_draft_layers_stay(family, models):
    model = models(family, mtp=True)
    targets = find_targets(model, [])
    assert sorted(targets.dense) == in_layers(EXPECTED[family][1])
    assert not any(linear.module.startswith("model.layers.2.") for linear in targets.linears)
    found = layout(model, targets, uniform_grids(targets, chosen()), chosen())
    drafts = {name.removesuffix(".weight") for name, shape in model.shapes.items()
              if name.startswith("model.layers.2.") and len(shape) == 2 and "embed" not in name}  # fmt: skip
    assert {*found.dense} == {"lm_head", *targets.dense, *drafts}
    assert drafts >= {"model.layers.2.eh_proj", "model.layers.2.shared_head.head"}


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_layers_without_experts_beside_those_with(family, models):
    targets = find_targets(models(family, first_k_dense_replace=1), [])
    assert in_layers(MLP["gate_up"], [0]) in grouped(targets)
    assert in_layers(routed()["experts"], [1]) in grouped(targets)
    assert "model.layers.0.mlp.gate" not in targets.dense


@pytest.mark.parametrize(("ignore", "left"), [
    (["down_proj$"], r"down_proj$"), (["layers[.]0[.]"], r"layers\.0\."), (["q_proj", "^model.layers.1.mlp.experts.3"], r"q_proj|1\.mlp\.experts\.3"),
    (["nothing"], r"^$"), ([".*"], r""),
], ids=str)  # fmt: skip
def test_ignored_modules_stay(ignore, left, models):
    model = models("qwen3_moe")
    every, targets = find_targets(model, []), find_targets(model, ignore)
    gone = [linear.module for linear in every.linears if re.search(left, linear.module)]
    assert [linear for linear in every.linears if linear.module not in gone] == [*targets.linears]
    assert {*targets.dense} == {*every.dense, *gone}


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_width_is_that_of_the_numbers_as_stored(dtype, width, models):
    assert {linear.width for linear in find_targets(models("llama", dtype=dtype), []).linears} == {width}


@pytest.mark.parametrize("tied", [False, True])
def test_dense_modules_of_a_config(tied, models):
    model = models("mixtral", tie_word_embeddings=tied, intermediate_size=100)  # 100 * 4 / 32 is no whole number
    targets = find_targets(model, [])
    grids = uniform_grids(targets, chosen(group_size=32))
    found = layout(model, targets, grids, chosen(group_size=32))
    left = in_layers(routed("block_sparse_moe", ("w1", "w3", "w2"))["experts"])  # experts all or none
    assert sorted(found.dense) == sorted(["lm_head", *in_layers(["block_sparse_moe.gate"]), *left])
    assert {*found.grids} == {linear.module for linear in targets.linears} - {*left}
    assert not found.activations
    assert layout(model, targets, grids, chosen(bits=8, activations="dynamic")).activations


# Which grid


def a_linear(inputs, outputs=64, module="model.layers.0.mlp.up_proj", *, expert=False):
    return Linear(module, 0, module, outputs, inputs, 2, expert=expert)


@pytest.mark.parametrize(("given", "shape", "grid"), [
    ({}, (64, 256), Grid(4, 128)), ({}, (64, 192), Grid(4, None)), ({}, (64, 96), Grid(4, None)), ({}, (64, 100), None), ({}, (64, 7), None),
    ({}, (7, 8), Grid(4, None)), ({"group_size": 12}, (7, 24), Grid(4, 12)), ({"group_size": "channel"}, (7, 40), Grid(4, None)),
    ({"bits": 8}, (7, 20), Grid(8, None)), ({"bits": 8}, (7, 18), None), ({"bits": 8, "group_size": 64}, (7, 100), Grid(8, None)),
    ({"bits": 8, "activations": "dynamic"}, (5, 7), Grid(8, None)), ({"bits": 8, "type": "float"}, (5, 7), Grid(8, None, "float")),
    ({"format": "gptq"}, (64, 256), Grid(4, 128)), ({"format": "gptq"}, (64, 192), None), ({"format": "gptq"}, (40, 256), None),
    ({"format": "gptq", "group_size": 32}, (64, 96), Grid(4, 32)), ({"format": "gptq", "bits": 8, "group_size": 64}, (32, 64), Grid(8, 64)),
], ids=str)  # fmt: skip
def test_the_grid_that_fits(given, shape, grid):
    settings = chosen(**given)
    assert fitting(wanted_grid(settings), a_linear(shape[1], shape[0]), settings) == grid


@pytest.mark.parametrize(("given", "sizes", "grid"), [
    ({}, (256, 128), Grid(4, 128)), ({}, (256, 192), Grid(4, None)), ({}, (192, 96), Grid(4, None)), ({}, (256, 100), None),
    ({}, (192, 100), None), ({"bits": 8}, (20, 40), Grid(8, None)), ({"bits": 8}, (20, 42), None), ({"bits": 8, "group_size": 32}, (64, 20), Grid(8, None)),
    ({"bits": 8, "type": "float"}, (7, 9), Grid(8, None, "float")),
], ids=str)  # fmt: skip
def test_experts_have_one_grid_whatever_the_others_have(given, sizes, grid):
    settings = chosen(**given)
    experts = [a_linear(size, module=f"model.layers.0.mlp.experts.{e}.up_proj", expert=True) for e, size in enumerate(sizes)]
    others = [a_linear(256, module="model.layers.0.self_attn.o_proj"), a_linear(9, module="model.layers.0.self_attn.k_proj")]
    found = grids_for([*experts, *others], wanted_grid(settings), settings)
    assert [found[expert.module] for expert in experts] == [grid, grid]
    assert [found[other.module] for other in others] == [fitting(wanted_grid(settings), other, settings) for other in others]
    assert {*grids_for([*experts, *others], None, settings).values()} == {None}


def test_gptq_files_leave_a_matrix_in_every_layer_or_in_none():
    sizes = {"model.layers.0.mlp.up_proj": 128, "model.layers.1.mlp.up_proj": 100, "model.layers.0.mlp.down_proj": 128, "model.layers.1.mlp.down_proj": 128}
    targets = Targets(tuple(a_linear(size, module=module) for module, size in sizes.items()), ("model.layers.0.self_attn.o_proj",), ())
    found = uniform_grids(targets, chosen(format="gptq"))
    assert {module for module, grid in found.items() if grid is None} == {m for m in sizes if "up_proj" in m}
    packed = uniform_grids(targets, chosen())
    assert {module for module, grid in packed.items() if grid is None} == {"model.layers.1.mlp.up_proj"}


# What is refused


@pytest.mark.parametrize(("family", "given", "said"), [
    ("llama", {"ignore": ["."]}, "no linear module of its layers is left to round"),
    ("llama", {"format": "gptq", "group_size": 128}, "no matrix of it fits this format and group_size"),
    ("qwen3_moe", {"format": "gptq", "group_size": 32}, "transformers loads GPTQ files of models with experts wrongly"),
    ("granitemoe", {"format": "gptq", "group_size": 32}, "transformers loads GPTQ files of models with experts wrongly"),
    ("olmoe", {"bits": 8, "activations": "dynamic"}, "transformers does not load experts with rounded inputs"),
    ("mixtral", {"ignore": ["w2$"]}, "model.layers.0.block_sparse_moe.experts.0.w2 would stay as it is"),
    ("qwen3_moe", {"ignore": ["experts.3[.]"]}, "model.layers.0.mlp.experts.3.down_proj would stay as it is"),
    *((family, {}, None) for family in FAMILIES), ("llama", {"format": "gptq", "group_size": 32}, None),
    ("gpt_oss", {"bits": 8, "activations": "dynamic"}, None), ("qwen2_moe", {"ignore": ["shared_expert"]}, None),
], ids=str)  # fmt: skip
def test_models_that_cannot_be_rounded_so(family, given, said, models):
    found = refuses(models(family), chosen(**given))
    assert (found or "").startswith(said or "")
    assert (found is None) == (said is None)


def test_what_is_quantized_is_not_quantized_again(models):
    model = models("llama")
    quantized = replace(model, config={**model.config, "quantization_config": {"quant_method": "fp8"}})
    assert refuses(quantized, chosen()).startswith("it is quantized already")


@pytest.mark.parametrize("expert", ["experts.3[.]", "w2$"])
def test_why_an_expert_cannot_stay_is_said(expert, models):
    said = refuses(models("mixtral"), chosen(ignore=[expert]))
    assert said.endswith(" would stay as it is, and transformers 5 loads experts beside packed weights only if packed")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_budget_below_the_least_choice_is_refused(family, models):
    model = models(family, dtype=torch.bfloat16)
    linears = find_targets(model, []).linears
    numbers = sum(linear.outputs * linear.inputs for linear in linears)
    least = stored_bytes(linears, Grid(4, 128), chosen(), torch.bfloat16)
    short = refuses(model, chosen(bytes_per_weight=(least - 0.5) / numbers))
    assert short == f"the fewest bits that fit take {least / numbers:.3f} bytes per weight of it; raise bytes_per_weight"
    assert refuses(model, chosen(bytes_per_weight=(least + 0.5) / numbers)) is None


# A budget of bytes


def stored_bytes(linears, choice, settings, dtype):
    """What the tensors of a choice take, by the format's own list of them, without the shape that packing adds."""
    total = 0
    for linear in linears:
        grid = None if choice is None else fitting(choice, linear, settings)
        shape = torch.empty(linear.outputs, linear.inputs, dtype=dtype, device="meta")
        if grid is None:
            total += shape.nbytes
            continue
        code = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
        specs = COMPRESSED_TENSORS.specs("m", TensorSpec(code, (linear.outputs, linear.inputs)), grid, False)
        total += sum(spec.nbytes for name, spec in specs.items() if not name.endswith("_shape"))
    return total


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_bytes_of_a_choice_are_those_of_its_tensors(choice, dtype, family, models):
    settings = chosen(bytes_per_weight=1.0)
    linears = find_targets(models(family, dtype=dtype, intermediate_size=100), []).linears  # some do not fill words
    assert choice_bytes(linears, choice, settings) == stored_bytes(linears, choice, settings, dtype)


def test_bytes_by_hand():
    settings = chosen(bytes_per_weight=1.0)
    linears = [a_linear(256, 10, "a"), a_linear(96, 4, "b"), a_linear(100, 2, "c")]  # groups of 128; a scale per row; no whole words
    assert choice_bytes(linears, Grid(4, 128), settings) == (1280 + 10 * 2 * 2) + (192 + 4 * 2) + 400
    assert choice_bytes(linears, Grid(4, 32), settings) == (1280 + 10 * 8 * 2) + (192 + 4 * 3 * 2) + 400
    assert choice_bytes(linears, Grid(8, None), settings) == (2560 + 20) + (384 + 8) + (200 + 4)
    assert choice_bytes(linears, None, settings) == 2 * (2560 + 384 + 200)
    assert budget_bytes(Targets(tuple(linears), (), ()), chosen(bytes_per_weight=0.75)) == int(3144 * 0.75)


@pytest.mark.parametrize("per_weight", [0.51, 0.52, 0.55, 0.5625, 0.6, 1.0, 1.03125, 1.5, 1.99])
def test_one_choice_for_all_uses_what_the_budget_allows(per_weight, models):
    settings, targets = chosen(bytes_per_weight=per_weight), find_targets(models("llama", dtype=torch.bfloat16, hidden_size=256), [])
    numbers = sum(linear.outputs * linear.inputs for linear in targets.linears)
    sizes = {choice: choice_bytes(targets.linears, choice, settings) for choice in CHOICES}
    within = [choice for choice in CHOICES if sizes[choice] <= numbers * per_weight]
    wanted = max(within, key=sizes.__getitem__) if within else Grid(4, 128)
    assert best_uniform(targets, settings) == {
        linear.module: None if wanted is None else fitting(wanted, linear, settings) for linear in targets.linears
    }
    assert len(within) == {0.51: 0, 0.52: 1, 0.55: 1, 0.5625: 2, 0.6: 2, 1.0: 2, 1.03125: 3, 1.5: 3, 1.99: 3}[per_weight]


def test_experts_are_never_left_as_they_are_alone():
    assert choices_for([a_linear(64)]) == CHOICES
    assert choices_for([a_linear(64, expert=True)]) == CHOICES[:-1]
    assert CHOICES[-1] is None
    assert None not in CHOICES[:-1]


def total(costs, sizes):
    return sum(cost[size] for cost, size in zip(costs, sizes, strict=True))


@settings(max_examples=200, deadline=None)
@given(some.data())
def test_bytes_go_where_they_gain_most(data):
    """For convex costs and steps of one size, the greedy way is the best of all ways."""
    step, items = data.draw(some.integers(1, 7)), data.draw(some.integers(1, 4))
    costs = []
    for _ in range(items):
        first = data.draw(some.integers(1, 9))
        gains = sorted(data.draw(some.lists(some.integers(0, 20), min_size=0, max_size=3)), reverse=True)
        levels = [100 - sum(gains[:n]) for n in range(len(gains) + 1)]
        costs.append({first + n * step: float(level) for n, level in enumerate(levels)})
    least = sum(min(cost) for cost in costs)
    budget = data.draw(some.integers(least - 5, least + 4 * step * items))
    found = allocate_by_gain(costs, budget)
    affordable = [sizes for sizes in itertools.product(*costs) if sum(sizes) <= budget]
    if not affordable:
        assert found == [min(cost) for cost in costs]
        return
    assert sum(found) <= budget
    assert total(costs, found) == min(total(costs, sizes) for sizes in affordable)


@settings(max_examples=200, deadline=None)
@given(
    some.lists(some.dictionaries(some.integers(1, 30), some.floats(0, 10), min_size=1, max_size=4), min_size=1, max_size=4),
    some.integers(0, 120),
)  # fmt: skip
def test_no_budget_is_exceeded_and_nothing_left_would_help(costs, budget):
    found = allocate_by_gain(costs, budget)
    least = [min(cost) for cost in costs]
    assert sum(found) <= max(budget, sum(least))
    assert all(size in cost for size, cost in zip(found, costs, strict=True))
    assert total(costs, found) <= total(costs, least)
    for item, (size, cost) in enumerate(zip(found, costs, strict=True)):
        spare = budget - sum(found)
        assert not any(other <= size + spare and cost[other] < cost[size] for other in cost if other > size), item


def test_steps_are_taken_along_the_hull_by_hand():
    # 10 bytes for 1 each of gain first; then the second item's one large step, which pays better than its small one.
    costs = [{0: 10.0, 10: 0.0, 20: -1.0}, {0: 10.0, 5: 9.0, 10: 1.0}]
    assert allocate_by_gain(costs, 20) == [10, 10]
    assert allocate_by_gain(costs, 10) == [10, 0]
    assert allocate_by_gain(costs, 15) == [10, 5]
    assert allocate_by_gain(costs, 30) == [20, 10]
    assert allocate_by_gain(costs, -1) == [0, 0]
    # More bytes that harm are never taken; of equal costs the largest item gets the most bytes.
    assert allocate_by_gain([{1: 1.0, 2: 2.0, 3: 1.5}], 99) == [1]
    assert allocate_by_gain([{1: 1.0, 2: 2.0, 3: 1.0}], 99) == [3]
    assert allocate_by_gain([{1: 1.0, 2: 2.0, 3: 1.0}], 2) == [1]


def test_the_largest_item_is_weighed_against_many_small_ones_by_hand():
    # The small ones gain 1.5 a byte, the large one 1; of 10 bytes it gets all or none, by what the small ones can use.
    large, small = {0: 10.0, 10: 0.0}, {0: 3.0, 2: 0.0}
    assert allocate_by_gain([large, small], 10) == [10, 0]
    assert allocate_by_gain([small, small, large, small], 10) == [0, 0, 10, 0]
    assert allocate_by_gain([*[small] * 4, large], 10) == [2, 2, 2, 2, 0]
    assert sorted(allocate_by_gain([*[small] * 4, large], 14)) == [0, 0, 2, 2, 10]
    assert allocate_by_gain([*[small] * 4, large], 9) == [2, 2, 2, 2, 0]


@settings(max_examples=200, deadline=None)
@given(some.data())
def test_one_large_item_may_have_any_sizes_and_costs(data):
    """Beside items of convex costs and steps of one size, the way that is found is the best of all ways."""
    step, items = data.draw(some.integers(1, 5)), data.draw(some.integers(0, 3))
    costs = []
    for _ in range(items):
        gains = sorted(data.draw(some.lists(some.integers(0, 20), min_size=0, max_size=3)), reverse=True)
        costs.append({1 + n * step: 100.0 - sum(gains[:n]) for n in range(len(gains) + 1)})
    levels = data.draw(some.dictionaries(some.integers(1, 40), some.integers(0, 60), max_size=4))
    large = {size: float(cost) for size, cost in levels.items()} | {50: float(data.draw(some.integers(0, 60)))}
    costs.insert(data.draw(some.integers(0, items)), large)
    least = sum(min(cost) for cost in costs)
    budget = data.draw(some.integers(least - 5, sum(max(cost) for cost in costs) + 1))
    found = allocate_by_gain(costs, budget)
    affordable = [sizes for sizes in itertools.product(*costs) if sum(sizes) <= budget]
    if not affordable:
        assert found == [min(cost) for cost in costs]
        return
    assert sum(found) <= budget
    assert total(costs, found) == min(total(costs, sizes) for sizes in affordable)
