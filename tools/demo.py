"""Convert the built-in model, load the result in a process where surgery cannot be imported, and compare."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import surgery

REPOSITORY = Path(__file__).resolve().parent.parent

# Less text than the recipe, for a demonstration of a minute or two.
OVERRIDES = ("calibration.text=builtin", "calibration.samples=24", "calibration.length=256")

# What a stranger would write, plus a bar that keeps surgery from being imported.
STRANGER = """
import sys; sys.modules["surgery"] = None
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for name, folder in json.loads(sys.argv[1]).items():
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer("Return the", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=24, do_sample=False)
    found[name] = {"class": type(model).__name__, "text": tokenizer.decode(out[0], skip_special_tokens=True)}
open(sys.argv[2], "w").write(json.dumps(found))
"""


def main() -> int:
    """Run the demo; returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="surgery-demo-") as folder:
        out = Path(folder) / "latent"
        manifest = surgery.load_manifest(REPOSITORY / "manifests/kv-latent-75.yaml", overrides=OVERRIDES)
        print(" --set ".join(["surgery convert builtin:llama latent -m manifests/kv-latent-75.yaml", *OVERRIDES]), "\n")
        done = surgery.convert("builtin:llama", out, manifest)
        base = REPOSITORY / "surgery/builtin/llama"
        loaded = stranger({"before": str(base), "after": str(out)})
        report(done, loaded)
    return 0


def stranger(folders: dict[str, str]) -> dict[str, dict[str, str]]:
    """Load checkpoints in a fresh process without surgery."""
    with tempfile.NamedTemporaryFile("r") as result:
        command = [sys.executable, "-c", STRANGER, json.dumps(folders), result.name]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            sys.exit(f"loading without surgery failed:\n{run.stderr}")
        found: dict[str, dict[str, str]] = json.load(result)
    return found


def report(done: surgery.Conversion, loaded: dict[str, dict[str, str]]) -> None:
    """Print before and after."""
    plan, verification = done.plan, done.verification
    figures = verification.measurements if verification is not None else {}
    rows = [
        ("class", loaded["before"]["class"], loaded["after"]["class"]),
        ("parameters", plan.parameters_before, plan.parameters_after),
        (f"cache bytes per token ({plan.cache_dtype})", plan.cache_bytes_before, plan.cache_bytes_after),
        ("perplexity, held-out text", figures.get("base_perplexity"), figures.get("perplexity")),
        ("continues 'Return the' with", repr(loaded["before"]["text"]), repr(loaded["after"]["text"])),
    ]
    for name, before, after in rows:
        print(f"{name:34} {show(before):>24}  ->  {show(after)}")
    checks = verification.checks if verification is not None else ()
    passed = sum(check.status == "pass" for check in checks)
    print(f"\nverified in a fresh process: {passed} checks passed, {done.seconds:.1f} s in all")


def show(value: object) -> str:
    """A number as a person reads it."""
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    sys.exit(main())
