"""What the tests of quantized results share: conversions, and a fresh process that loads them without surgery.

`LOADER` runs in any release of transformers. Of every case it loads the result and the dense decode that
`quant_reference.py` wrote beside it, and keeps logits, loading reports, everything that was said, and what greedy
generation gives.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

import surgery
from tests import quant_reference

ROOT = Path(__file__).parents[1]
# Calibration by text that the model writes itself.
SELF = {"text": "self", "samples": 6, "length": 24}

# Arguments: the folder of cases (NAME/quantized, NAME/dense, tokens.safetensors), and where results go.
LOADER = '''
import contextlib, json, logging, sys, traceback, warnings
from pathlib import Path
sys.modules["surgery"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
place, out, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
out.mkdir(exist_ok=True)
tokens = load_file(place / "tokens.safetensors")["tokens"]
keyword = "dtype" if hasattr(transformers.PretrainedConfig(), "dtype") else "torch_dtype"
lines, found, tensors = [], {}, {}


class Listener(logging.Handler):
    def emit(self, record):
        lines.append(record.name + ": " + record.getMessage())


listener = Listener(logging.WARNING)
logging.getLogger().addHandler(listener)
logging.getLogger("transformers").addHandler(listener)
with contextlib.suppress(ImportError):
    import compressed_tensors
    logging.getLogger("compressed_tensors").addHandler(listener)
    from loguru import logger
    logger.remove()
    logger.add(lambda line: lines.append("loguru: " + line), level="WARNING", format="{message}")


def loaded(folder, dtype):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=any(folder.glob("*.py")), output_loading_info=True, **{keyword: dtype})
    return model.eval(), {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}


def rounded(kind):
    """Symmetric, one scale for each token, and no outlier is cut off."""
    largest_code = {"int": 127.5, "float": 448.0}[kind]

    def hook(module, inputs):
        values = inputs[0].float()
        scale = (values.abs().amax(-1, keepdim=True) / largest_code).clamp(min=1e-8)
        codes = values / scale
        codes = codes.round().clamp(-128, 127) if kind == "int" else codes.to(torch.float8_e4m3fn).float()
        return ((codes * scale).to(inputs[0].dtype), *inputs[1:])

    return hook


@torch.no_grad()
def run(name):
    of = json.loads((place / name / "case.json").read_text())
    dtype = getattr(torch, of["dtype"])
    dense, report = loaded(place / name / "dense", dtype)
    assert not report, report
    if of["inputs"]:
        for module in of["packed"]:
            dense.get_submodule(module).register_forward_pre_hook(rounded(of["inputs"]))
    tensors[name + ".dense"] = dense(tokens, use_cache=False).logits
    del dense
    lines.clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, entry["report"] = loaded(place / name / "quantized", dtype)
        tensors[name + ".quantized"] = model(tokens, use_cache=False).logits
        asked = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        entry["generated"] = model.generate(tokens[:1], attention_mask=torch.ones_like(tokens[:1]), **asked)[0, tokens.shape[1]:].tolist()
    entry["tied"] = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    entry["lines"] = lines + [f"{of.category.__name__}: {of.message}" for of in said]
    best, row = [], tokens[:1]
    for _ in range(6):
        following = model(row, use_cache=False).logits[0, -1]
        following[model.generation_config.eos_token_id] = -torch.inf  # as min_new_tokens does
        best.append(int(following.argmax()))
        row = torch.cat([row, torch.tensor([best[-1:]])], dim=1)
    entry["greedy"] = best


for name in names or sorted(path.name for path in place.iterdir() if path.is_dir()):
    entry = found[name] = {"error": ""}
    try:
        run(name)
    except Exception:
        entry["error"] = traceback.format_exc()
(out / "found.json").write_text(json.dumps({"transformers": transformers.__version__, "cases": found}))
save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out / "logits.safetensors")
'''


@dataclass(frozen=True)
class Loaded:
    """What the fresh process says of one case; logits [N, T, V] are of the result and of its dense decode."""

    error: str
    quantized: Tensor | None = None
    dense: Tensor | None = None
    report: dict[str, list[str]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    greedy: list[int] = field(default_factory=list)
    tied: bool = False

    @classmethod
    def read(cls, out: Path) -> dict[str, Loaded]:
        """By case what `load_all` left in a folder."""
        logits, answer = load_file(out / "logits.safetensors"), json.loads((out / "found.json").read_text())
        return {
            name: cls(**about, quantized=logits.get(f"{name}.quantized"), dense=logits.get(f"{name}.dense"))
            for name, about in answer["cases"].items()
        }

    @property
    def relative(self) -> float:
        """The largest difference of logits over the largest logit."""
        assert not self.error, self.error
        return float((self.quantized - self.dense).abs().max() / self.dense.abs().max())


def convert(base: Path | str, out: Path, *operations: dict[str, Any], **more: Any) -> Any:
    data = {"surgery": 1, "operations": list(operations), "verify": False, "calibration": SELF} | more
    return surgery.convert(str(base), out, surgery.manifest_from_dict(data))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def packed_of(folder: Path) -> list[str]:
    """The modules that are rounded, by the names of their scales."""
    return [found[1] for name in tensors_of(folder) if (found := re.fullmatch(r"(.*)\.(?:weight_scale|scales)", name))]


def prepare(case: Path, dtype: str = "float32") -> None:
    """Write beside CASE/quantized its dense decode, and what `LOADER` must know."""
    quant_reference.write_dense(case / "quantized", case / "dense")
    groups = config_of(case / "quantized")["quantization_config"].get("config_groups", {})
    kinds = {of["input_activations"]["type"] for of in groups.values() if of.get("input_activations")}
    assert len(kinds) <= 1
    about = {"dtype": dtype, "inputs": kinds.pop() if kinds else None, "packed": packed_of(case / "quantized")}
    (case / "case.json").write_text(json.dumps(about))


def load_all(place: Path, out: Path, release: Path | None = None, names: list[str] | None = None) -> dict[str, Loaded]:
    """Load every case of `place` in one fresh process, with a release of `.compat` or what `.venv` has."""
    if not (place / "tokens.safetensors").is_file():
        tokens = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))
        save_file({"tokens": tokens}, place / "tokens.safetensors")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(out.with_suffix(".modules")), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(release or ""),
    }  # fmt: skip
    command = [sys.executable, "-c", LOADER, str(place), str(out), *(names or [])]
    done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert release is None or json.loads((out / "found.json").read_text())["transformers"] == release.name
    return Loaded.read(out)


def shared(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills, once for all workers of a run."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    folder = place / name
    with FileLock(place / f"{name}.lock"):
        if not (folder / "made").is_file():
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder
