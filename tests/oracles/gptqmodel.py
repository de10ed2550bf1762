"""What optimum's GPTQ makes of a checkpoint, and what a GPTQ checkpoint computes; runs in tools/gptqmodel's Python.

    .gptqmodel/bin/python tests/oracles/gptqmodel.py quantize FOLDER OUT --bits 4 --group-size 32 --tokens TOKENS
    .gptqmodel/bin/python tests/oracles/gptqmodel.py logits FOLDER TOKENS OUT

TOKENS has one tensor, `tokens`, [N, T] of int64. `quantize` writes a GPTQ v1 checkpoint and leaves the matrices dense
that the format cannot hold; a code file is copied by transformers. `logits` writes one tensor, `logits`, [N, T, V] of
float32, and fails where a tensor is missing, left over or of another shape. It computes in float32 with exactly the
numbers of the file; `--kernel auto` takes what a user gets, which for 4 bits on a CPU rounds scales and activations to
bfloat16.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

del sys.path[0]  # this folder, in which this file would be taken for the package gptqmodel
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
os.environ |= {
    "GPTQMODEL_CPU_WORKERS": "4",  # it asks a pool for more workers than a machine of two cores gives it
    "GPTQMODEL_DISABLE_PACK_EXT": "1",  # nothing here is worth half a minute of compiling
    "TORCHDYNAMO_DISABLE": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("quantize")
    command.set_defaults(command=quantize)
    command.add_argument("checkpoint", type=Path)
    command.add_argument("out", type=Path)
    command.add_argument("--bits", type=int, default=4)
    command.add_argument("--group-size", type=int, default=32)
    command.add_argument("--tokens", type=Path, required=True)
    command.add_argument("--act-order", action="store_true")
    command.add_argument("--damp", type=float, default=0.01)
    command = commands.add_parser("logits")
    command.set_defaults(command=logits)
    command.add_argument("checkpoint", type=Path)
    command.add_argument("tokens", type=Path)
    command.add_argument("out", type=Path)
    command.add_argument("--kernel", choices=["exact", "auto"], default="exact")
    arguments = vars(parser.parse_args())
    with contextlib.redirect_stdout(sys.stderr):  # its log goes to whatever stdout is while it is imported
        arguments.pop("command")(**arguments)


def quantize(
    checkpoint: Path, out: Path, bits: int, group_size: int, tokens: Path, act_order: bool, damp: float
) -> None:
    import torch
    from optimum.gptq import GPTQQuantizer
    from optimum.gptq.utils import get_block_name_with_pattern, get_layers
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    rows = load_file(tokens)["tokens"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32).eval()
    layers = get_layers(model.get_submodule(get_block_name_with_pattern(model))[0])
    step = 32 if group_size == -1 else max(32, group_size)
    fit = [name for name, layer in layers.items() if not layer.in_features % step and not layer.out_features % 32]
    quantizer = GPTQQuantizer(
        bits,
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows],
        group_size=group_size,
        damp_percent=damp,
        desc_act=act_order,
        act_group_aware=False,  # another order of the columns, which is its default
        modules_in_block_to_quantize=None if len(fit) == len(layers) else [[name] for name in fit],
    )
    quantizer.quantize_model(model)
    quantizer.dataset = None  # else every token is written into config.json
    model.config.quantization_config = quantizer.to_dict() | {"format": "gptq", "checkpoint_format": "gptq"}
    quantizer.save(model, out)  # turns the v2 in memory into v1, but would leave a config that says v2


def logits(checkpoint: Path, tokens: Path, out: Path, kernel: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM, GPTQConfig

    rows = load_file(tokens)["tokens"]
    stored = getattr(AutoConfig.from_pretrained(checkpoint, trust_remote_code=True), "quantization_config", None)
    chosen = {}
    if stored and kernel == "exact":
        chosen["quantization_config"] = GPTQConfig(stored["bits"], backend="gptq_torch")
    model, report = AutoModelForCausalLM.from_pretrained(
        checkpoint, trust_remote_code=True, dtype=torch.float32, output_loading_info=True, **chosen
    )
    if any(report.values()):
        raise AssertionError(f"does not load as it is: {report}")
    for name, buffer in list(model.named_buffers()):
        if stored and kernel == "exact" and name.endswith(".scales"):
            model.get_submodule(name.removesuffix(".scales")).scales = buffer.float()  # else it multiplies in float16
    with torch.no_grad():
        result = torch.cat([model.eval()(row[None]).logits.float() for row in rows])
    save_file({"logits": result.contiguous()}, out)


if __name__ == "__main__":
    main()
