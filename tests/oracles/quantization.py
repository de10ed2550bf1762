"""What llm-compressor makes of a checkpoint when it quantizes it; runs in tools/oracle's Python.

    .oracle/bin/python tests/oracles/quantization.py rtn CHECKPOINT OUT --scheme int4
    .oracle/bin/python tests/oracles/quantization.py gptq CHECKPOINT OUT --tokens TOKENS.safetensors
    .oracle/bin/python tests/oracles/quantization.py logits CHECKPOINT TOKENS.safetensors OUT.safetensors

`rtn` rounds tensor by tensor with model_free_ptq; `gptq` calibrates with GPTQModifier; `logits` loads a checkpoint of
either maker and fails unless every weight was found. TOKENS has one tensor, `tokens`, [N, T] of int64. Prints one JSON
document: of `rtn` and `gptq` the modules left dense as their inputs do not divide into groups, of `gptq` also by module
the loss, and whether it was rounded to nearest as its Hessian could not be inverted.

`rtn` divides in the dtype of the weights, so that in bfloat16 the quotients are rounded before they are rounded to
integers; give it float32 to compare integers. `gptq` and `logits` load in float32 unless told otherwise.
"""

import argparse
import contextlib
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}

PRESETS = {"int4": "W4A16", "int8": "W8A16", "w8a8": "W8A8", "fp8": "FP8_DYNAMIC"}  # compressed-tensors' names
# Beside everything that ends with "norm", which model_free_ptq leaves out by itself.
DENSE = ["lm_head", "re:.*embed_tokens$", "re:.*\\.(gate|router)$", "re:.*\\.shared_expert_gate$"]


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("rtn")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("out", type=Path)
    command.add_argument("--scheme", choices=PRESETS, required=True)
    command.add_argument("--group-size", default="32", help="or channel; w8a8 and fp8 are always by channel")
    command.add_argument("--ignore", action="append", default=[], help="one more module, or re:PATTERN, that stays dense")
    command = commands.add_parser("gptq")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("out", type=Path)
    command.add_argument("--tokens", type=Path, required=True)
    command.add_argument("--bits", type=int, choices=[4, 8], default=4)
    command.add_argument("--group-size", default="32", help="or channel")
    command.add_argument("--act-order", choices=["static", "none"], default="static")
    command.add_argument("--damp", type=float, default=0.01)
    command.add_argument("--block", type=int, default=128)
    command.add_argument("--dtype", choices=["float32", "auto"], default="float32", help="auto is the checkpoint's")
    pipeline = command.add_mutually_exclusive_group()
    pipeline.add_argument("--sequential", dest="pipeline", action="store_const", const="sequential", default="sequential")
    pipeline.add_argument("--basic", dest="pipeline", action="store_const", const="basic")
    command.add_argument("--all-experts", action="store_true", help="show every expert every token")
    command.add_argument("--hessians", type=Path, help="write there by module what was inverted, before damping")
    command.add_argument("--ignore", action="append", default=[], help="one more module, or re:PATTERN, that stays dense")
    command = commands.add_parser("logits")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("tokens", type=Path)
    command.add_argument("out", type=Path)
    command.add_argument("--dtype", choices=["float32", "auto"], default="float32", help="auto is the checkpoint's")
    options = vars(parser.parse_args())
    with contextlib.redirect_stdout(sys.stderr):  # its log goes to whatever stdout is while it is imported
        result = {"rtn": rtn, "gptq": gptq, "logits": logits}[options.pop("command")](**options)
    json.dump(result, sys.stdout)


def rtn(checkpoint: Path, out: Path, scheme: str, group_size: str, ignore: list[str]) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationConfig
    from llmcompressor import model_free_ptq

    chosen = quantization_scheme(PRESETS[scheme], group_size if scheme in ("int4", "int8") else "channel")
    uneven = undivided(checkpoint, chosen.weights.group_size, ignore) if scheme in ("int4", "int8") else []
    config = QuantizationConfig(config_groups={"group_0": chosen}, ignore=DENSE + ignore + uneven)
    model_free_ptq(checkpoint, out, config=config, device="cpu")
    check_finite(out)
    return {"undivided": uneven}


def gptq(
    checkpoint: Path,
    out: Path,
    tokens: Path,
    bits: int,
    group_size: str,
    act_order: str,
    damp: float,
    block: int,
    dtype: str,
    pipeline: str,
    all_experts: bool,
    hessians: Path | None,
    ignore: list[str],
) -> dict[str, Any]:
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.gptq import base as implementation
    from safetensors.torch import load_file, save_file
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    losses: dict[str, float] = {}
    inverted: dict[str, torch.Tensor] = {}
    fallen: list[str] = []
    unseen: list[str] = []
    quantize_weight = implementation.quantize_weight

    class Watched(GPTQModifier):
        def compress_module_list(self, module_list):
            for module in module_list:  # one by one, to know whose loss it is; on a CPU it batches none anyway
                name = self._module_names[module]
                if not self._hessians[module].any():  # such an expert would be written as zeros
                    unseen.append(name)
                if hessians is not None:
                    inverted[name] = self._hessians[module] / self._num_samples[module]

                def watched(*args, name=name, **kwargs):
                    weights, loss, fallback = quantize_weight(*args, **kwargs)
                    losses[name] = float(loss[0])
                    return weights, loss, fallback

                implementation.quantize_weight = watched
                super().compress_module_list([module])
            fallen[:] = self._rtn_fallback_module_names

        def on_calibration_end(self, state, event, **kwargs):
            unseen.extend(name for name in self._module_names.values() if name not in losses)  # written with no scales
            super().on_calibration_end(state, event, **kwargs)

    class Unwritten:  # must be there, and is not used: the data is tokens
        def save_pretrained(self, folder):
            pass

    rows = load_file(tokens)["tokens"]
    loaded_as = torch.float32 if dtype == "float32" else "auto"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=loaded_as, trust_remote_code=True).eval()
    if pipeline == "sequential" and "mask_function(" in Path(inspect.getfile(type(model))).read_text():
        raise ValueError(f"llm-compressor's tracing loses the causal mask of {type(model).__name__}: use --basic")
    scheme = quantization_scheme(f"W{bits}A16", group_size)
    uneven = undivided(checkpoint, scheme.weights.group_size, ignore)
    try:
        oneshot(
            model=model,
            processor=Unwritten(),
            dataset=DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows], batch_size=1),
            recipe=Watched(
                config_groups={"group_0": scheme},
                ignore=DENSE + ignore + uneven,
                actorder=None if act_order == "none" else act_order,
                dampening_frac=damp,
                block_size=block,
            ),
            pipeline=pipeline,
            moe_calibrate_all_experts=all_experts,
            trust_remote_code_model=True,
            output_dir=str(out),
        )
    finally:
        implementation.quantize_weight = quantize_weight
    if unseen:
        raise ValueError(f"no token reached {', '.join(unseen)}: give more tokens, or --all-experts")
    check_finite(out)
    if hessians is not None:
        save_file(inverted, hessians)
    return {"undivided": uneven, "losses": losses, "rounded": fallen}


def logits(checkpoint: Path, tokens: Path, out: Path, dtype: str) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    loaded_as = torch.float32 if dtype == "float32" else "auto"
    model, report = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=loaded_as, trust_remote_code=True, output_loading_info=True)
    if any(report.values()):
        raise ValueError(f"{checkpoint} does not load as it is: {report}")
    rows = load_file(tokens)["tokens"]
    with torch.no_grad():
        found = torch.cat([model(input_ids=row[None], use_cache=False).logits.float() for row in rows])
    save_file({"logits": found}, out)
    return {}


def quantization_scheme(preset: str, group_size: str) -> Any:
    """The preset, by groups of another size or by channel."""
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme

    scheme = preset_name_to_scheme(preset, ["Linear"])
    grid = {"strategy": "channel"} if group_size == "channel" else {"strategy": "group", "group_size": int(group_size)}
    fields = {name: value for name, value in scheme.weights.model_dump(exclude_unset=True).items() if name != "group_size"}
    scheme.weights = QuantizationArgs(**fields | grid)
    return scheme


def undivided(checkpoint: Path, group_size: int | None, ignore: list[str]) -> list[str]:
    """Modules whose inputs do not divide into groups, or into 32 where a channel is packed: llm-compressor fails there."""
    from compressed_tensors.utils import match_quantizable_tensors
    from safetensors import safe_open

    names = []
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in list(opened.keys())}
        for module, name in match_quantizable_tensors(shapes, DENSE + ignore, ["Linear"]):
            if shapes[name][-1] % (group_size or 32):
                names.append(module)
    return names


def check_finite(folder: Path) -> None:
    from safetensors.torch import load_file

    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if tensor.is_floating_point() and not tensor.float().isfinite().all():
                raise ValueError(f"{name} of {file} is not finite")


if __name__ == "__main__":
    main()
