"""What llm-compressor's REAPPruningModifier keeps, on exactly the tokens it is given; runs in tools/oracle's Python.

    .oracle/bin/python tests/oracles/reap.py CHECKPOINT TOKENS.safetensors SPARSITY

TOKENS has one tensor, `tokens`, [N, T] of int64. Prints one JSON document: by layer the ids of the experts that stay,
the score of every expert, and how many tokens were routed to it. All scores are taken on the intact model in float32.
That is not llm-compressor's default, which prunes a layer before it scores the next one; its default also loses the
causal mask of mixtral and qwen3_moe (0.14.0.1 with transformers 5.17.0).
"""

import argparse
import contextlib
import json
import os
import re
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("sparsity", type=float)
    with contextlib.redirect_stdout(sys.stderr):  # its log goes to whatever stdout is while it is imported
        result = reap(**vars(parser.parse_args()))
    json.dump(result, sys.stdout)


def reap(checkpoint: Path, tokens: Path, sparsity: float) -> dict[str, dict[str, list[float]]]:
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import REAPPruningModifier
    from safetensors.torch import load_file
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    result = {"kept": {}, "scores": {}, "routed": {}}

    class Watched(REAPPruningModifier):
        def on_sequential_epoch_end(self, state, event, **kwargs):
            trackers = dict(self._saliency_trackers)  # it forgets them as it prunes
            super().on_sequential_epoch_end(state, event, **kwargs)
            for name, tracker in trackers.items():
                layer, routed = re.search(r"layers\.(\d+)\.", name)[1], tracker.count.long().tolist()
                if sum(routed) != rows.numel() * self._moe_attrs.top_k:
                    raise AssertionError(f"layer {layer} saw other than {rows.numel()} tokens: {routed}")
                result["kept"][layer] = self._retained_experts[name]
                result["scores"][layer] = tracker.mean_saliency.tolist()
                result["routed"][layer] = routed

    rows = load_file(tokens)["tokens"]
    # Loaded as usual; oneshot takes the fused experts apart.
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    oneshot(
        model=model,
        processor=object(),  # must be there, and is not used: the data is tokens
        dataset=DataLoader([{"input_ids": row} for row in rows], batch_size=1),
        recipe=Watched(sparsity=sparsity),
        pipeline="basic",
        moe_calibrate_all_experts=False,
    )
    return result


if __name__ == "__main__":
    main()
