"""What the benchmark of rounding shares: a base in 16 bits, texts as windows, conversions, rivals, and what is left.

Every result is decoded by hand into dense float32 weights and run by the same code, whoever wrote it, so that no
kernel's arithmetic is in a figure.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quality import log_probabilities, whole_characters
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery
from surgery.builtin.text import DOMAINS, heldout_documents
from surgery.calibration.text import text_windows
from surgery.manifest import Calibration
from surgery.probe.dequantized import write_decoded
from surgery.probe.packed import packed_modules, tensor_files

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("held out", "foreign")
# What only says how the codes are laid out, and is in no budget.
LAYOUT = ("weight_shape", "g_idx")
# What calibrates a story model: the first bytes of the stories.
CALIBRATION_BYTES = 3 << 19


class Refused(Exception):
    """Why a row cannot be had."""


@dataclass(frozen=True)
class Found:
    """By text: KL to the base and negative log-likelihood per token, and the share of equal best tokens, by window."""

    kl: Mapping[str, Tensor]
    nll: Mapping[str, Tensor]
    agreement: Mapping[str, Tensor]


class Bench:
    """A base, what it says on text that nothing is calibrated on, and ways to round it.

    name  `builtin:llama`, `builtin:moe`, or a model below `data`/models. It is cast to bfloat16 first.
    """

    def __init__(self, name: str, data: Path, work: Path, windows: int, samples: int, length: int) -> None:
        self.name, self.work, self.samples, self.length = name, work, samples, length
        folder = name if name.startswith("builtin:") else str(data / "models" / name)
        self.base = work / "base"
        settings = {"surgery": 1, "operations": [], "output": {"dtype": "bfloat16"}, "verify": False}
        surgery.convert(folder, self.base, surgery.manifest_from_dict(settings))
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.text, held_out, foreign = self._texts(data)
        self.windows = {TEXTS[0]: self._windows(held_out, windows), TEXTS[1]: self._windows(foreign, windows)}
        model = load(self.base)
        self.dense = "experts" not in json.dumps([name for name, _ in model.named_parameters()])
        self.expected = {text: log_probabilities(model, rows) for text, rows in self.windows.items()}
        self.probe: list[str] = []

    def _texts(self, data: Path) -> tuple[Any, Any, Any]:
        """What calibrates, and what judges: of the same kind, and of another."""
        grimm = [str((data / "text" / "grimm.txt").absolute())]
        if self.name.startswith("builtin:"):
            mixed = self.name == "builtin:moe"
            domains = DOMAINS if mixed else DOMAINS[:1]
            held = [document for domain in domains for document in heldout_documents(domain)]
            other = grimm if mixed else self._jsonl("code", heldout_documents("code"))
            return "builtin:mixed" if mixed else "builtin", self._jsonl("held_out", held), other
        raw = (data / "text" / "tinystories.txt").read_bytes()
        parts = []
        for name, part in (("calibration", raw[:CALIBRATION_BYTES]), ("held_out", raw[CALIBRATION_BYTES:])):
            path = self.work / f"{name}.txt"
            path.write_bytes(whole_characters(part))
            parts.append([str(path)])
        return parts[0], parts[1], grimm

    def _jsonl(self, name: str, documents: Sequence[str]) -> list[str]:
        path = self.work / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        return [str(path)]

    def _windows(self, text: Any, samples: int, seed: int = 0) -> Tensor:
        wanted = {"text": text, "samples": samples, "length": self.length, "seed": seed}
        longest = json.loads((self.base / "config.json").read_text())["max_position_embeddings"]
        return text_windows(Calibration.model_validate(wanted), self.tokenizer, longest).tokens

    def _manifest(self, settings: dict[str, Any], seed: int) -> dict[str, Any]:
        calibration = {"text": self.text, "samples": self.samples, "length": self.length, "seed": seed}
        return {"surgery": 1, "operations": [{"quantize": settings}], "calibration": calibration, "verify": False}

    def ours(self, settings: dict[str, Any], seed: int) -> tuple[Path, dict[str, Any]]:
        """What `quantize` makes in this process."""
        out = self.work / "out"
        started = time.process_time()
        try:
            manifest = surgery.manifest_from_dict(self._manifest(settings, seed))
            with tempfile.TemporaryDirectory(dir=self.work) as fresh:  # nothing that was measured before is taken
                done = surgery.convert(str(self.base), out, manifest, overwrite=True, statistics=Path(fresh))
        except surgery.SurgeryError as error:
            raise Refused(error.cause or str(error)) from error
        notes = [note for note in done.plan.notes if "bits_by" in note or "not rounded as asked" in note]
        return out, {"seconds": time.process_time() - started, **({"notes": notes} if notes else {})}

    def gptqmodel(self, python: Path, settings: dict[str, Any], seed: int) -> tuple[Path, dict[str, Any]]:
        """The same through `engine: gptqmodel`, in the Python that has it."""
        manifest = self.work / "manifest.json"
        manifest.write_text(json.dumps(self._manifest({**settings, "engine": "gptqmodel"}, seed)))
        out = self.work / "out"
        places = [str(self.base), str(out)]
        command = [str(python), "-m", "surgery", "convert", *places, "-q", "--overwrite", "-m", str(manifest)]
        with tempfile.TemporaryDirectory(dir=self.work) as fresh:
            return out, {"seconds": run(python, [*command, "--statistics", fresh])}

    def llm_compressor(self, python: Path, settings: Sequence[str], seed: int) -> tuple[Path, dict[str, Any]]:
        """GPTQ by llm-compressor on the same windows, in the Python that has it."""
        tokens, out = self.work / "tokens.safetensors", self.work / "out-of-llm-compressor"
        save_file({"tokens": self._windows(self.text, self.samples, seed)}, tokens)
        shutil.rmtree(out, ignore_errors=True)
        script = str(ROOT / "tests" / "oracles" / "quantization.py")
        command = [str(python), script, "gptq", str(self.base), str(out), "--tokens", str(tokens), *settings]
        return out, {"seconds": run(python, command)}

    @torch.no_grad()
    def measure(self, folder: Path) -> Found:
        """What a result does to the windows, with the weights that its files stand for."""
        settings = json.loads((folder / "config.json").read_text())["quantization_config"]
        modules = packed_modules(folder)
        with tempfile.TemporaryDirectory(dir=self.work) as place:
            dense = Path(place) / "dense"
            write_decoded(folder, dense, settings, dict.fromkeys(modules, torch.float32))
            model = load(dense)
        with rounded_inputs(model, settings, set(modules)):
            found = Found(*({} for _ in range(3)))
            for text, windows in self.windows.items():
                got, expected = log_probabilities(model, windows), self.expected[text]
                found.kl[text] = (expected.exp() * (expected - got)).sum(-1).mean(-1)
                found.nll[text] = likelihood(got, windows)
                found.agreement[text] = (got.argmax(-1) == expected.argmax(-1)).float().mean(-1)
        gc.collect()
        return found

    def figures(self, found: Found) -> dict[str, float]:
        """Means over windows, and the standard error of KL."""
        figures = {}
        for text, windows in self.windows.items():
            kl = found.kl[text]
            worse = found.nll[text] - likelihood(self.expected[text], windows)
            figures |= {
                f"{text} ppl ratio": float(worse.mean().exp()),
                f"{text} KL": float(kl.mean()),
                f"{text} KL se": float(kl.std() / len(kl) ** 0.5),
                f"{text} agreement": float(found.agreement[text].mean()),
            }
        return figures

    def inputs(self, module: str) -> int:
        """How many inputs a matrix of the base has."""
        name = f"{module}.weight"
        with safe_open(tensor_files(self.base)[name], "pt") as file:
            return int(file.get_slice(name).get_shape()[1])

    def sizes(self, folder: Path) -> dict[str, float]:
        """Bytes of the file, and of all that stands for the matrices that 8 bits round, per number of these.

        `budget` leaves out what only says how codes are laid out.
        """
        modules = self.probe or packed_modules(folder)
        owned: dict[str, int] = {}
        for name, path in tensor_files(folder).items():
            module, _, ending = name.rpartition(".")
            with safe_open(path, "pt") as file:
                owned[name] = file.get_tensor(name).nbytes if module in modules and ending != "bias" else 0
        files = tensor_files(self.base)
        numbers = 0
        for module in modules:
            with safe_open(files[f"{module}.weight"], "pt") as file:
                numbers += file.get_tensor(f"{module}.weight").numel()
        plain = sum(size for name, size in owned.items() if not name.endswith(LAYOUT))
        return {
            "file bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            "weight bytes": sum(owned.values()), "bytes per weight": sum(owned.values()) / numbers,
            "budget": plain / numbers,
        }  # fmt: skip


def load(folder: Path) -> Any:
    """A checkpoint in float32. Raises RuntimeError where it lacks a tensor, or has one too many."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if any(report.values()):
        raise RuntimeError(f"{folder} does not load as it is: {report}")
    return model.eval()


def likelihood(found: Tensor, windows: Tensor) -> Tensor:
    """Negative log-likelihood per token of each window."""
    return -found.gather(-1, windows[:, 1:, None])[..., 0].mean(-1)


@contextmanager
def rounded_inputs(model: Any, settings: Mapping[str, Any], modules: set[str]) -> Iterator[None]:
    """Inputs of these modules rounded to 8 bits with a scale a token, where the config says so."""
    inputs = next(iter(settings.get("config_groups", {}).values()), {}).get("input_activations")

    def rounding(_: nn.Module, positional: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        reach = 448 if inputs["type"] == "float" else 127.5
        scale = (positional[0].abs().amax(-1, keepdim=True) / reach).clamp(min=1e-8)
        scaled = positional[0] / scale
        if inputs["type"] == "float":
            return (scaled.clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale,)
        return (scaled.round().clamp(-128, 127) * scale,)

    named = [module for name, module in model.named_modules() if name in modules]
    handles = [module.register_forward_pre_hook(rounding) for module in named] if inputs else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(python: Path, command: Sequence[str]) -> float:
    """Run a rival; seconds of a core that it took, its start among them. Raises Refused."""
    if not python.exists():
        raise Refused(f"{python} is not there")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        raise Refused((done.stderr.strip().splitlines() or ["it failed and said nothing"])[-1])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
