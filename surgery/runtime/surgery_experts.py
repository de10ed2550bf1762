# SPDX-License-Identifier: Apache-2.0
"""Layers with different numbers of experts, or of experts per token: the native block, built for each layer."""

import copy
from typing import Any

from torch import nn

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # the name depends on family and release


def experts_per_layer(config: Any, layers: nn.ModuleList) -> nn.ModuleList:
    """Give each of `layers` a MoE block of the size that `config.surgery["experts"]` says.

    `num_experts` and `num_experts_per_tok` there are lists over decoder layers, with null for layers without experts.
    """
    ours = config.surgery["experts"]
    for layer, count, top_k in zip(layers, ours["num_experts"], ours["num_experts_per_tok"], strict=True):
        if count is None:
            continue
        name = "block_sparse_moe" if hasattr(layer, "block_sparse_moe") else "mlp"
        of_layer = copy.deepcopy(config)
        for key in COUNTS:
            if hasattr(of_layer, key):
                setattr(of_layer, key, count)
        of_layer.num_experts_per_tok = top_k
        block = type(getattr(layer, name))(of_layer)
        # The model's config says how experts are computed, also after loading; FP8 loaders take sizes from it instead.
        if hasattr(getattr(block, "experts", None), "config") and not getattr(config, "quantization_config", None):
            block.experts.config = config
        setattr(layer, name, block)
    return layers
