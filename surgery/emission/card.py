"""The model card: the README.md of a converted checkpoint.

It says what was done, what it costs in bytes and in quality, how to load it safely and how to make it again. Equal
conversions give equal cards: there is no time and no path of this machine in it. Whatever comes from the base is
hostile input and goes through `markdown`; of its own card only the licence is read.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from surgery.checkpoint.journal import Finished
from surgery.checkpoint.reader import Checkpoint
from surgery.emission.checkpoint import result_code, result_config
from surgery.emission.figures import figures, sample_rows, variants_text
from surgery.emission.licence import base_licence
from surgery.emission.lock import LOCK, portable_source
from surgery.emission.markdown import code, fenced, table, text, value
from surgery.emission.pictures import PLACE
from surgery.emission.side_files import repairs
from surgery.planning import Draft, Plan
from surgery.version import __version__

if TYPE_CHECKING:
    from surgery.emission.figures import Compared
    from surgery.manifest import Manifest
    from surgery.operations.base import Step
    from surgery.verification import Verification

TESTED = Path(__file__).with_name("tested_versions.json")  # tools/compat writes it
MAX_LISTED = 20
# Divergence up to which a quantized cache is recommended, in nats per token.
RECOMMENDED = 0.01
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def card_bytes(
    base: Checkpoint,
    plan: Plan,
    draft: Draft,
    manifest: Manifest,
    outputs: Mapping[str, Finished],
    verification: Verification | None,
    compared: Sequence[Compared] = (),
    name: str = "",
) -> bytes:
    """The card of the checkpoint whose files are `outputs`; the card itself and the lock come after it.

    `compared` has the figures of all results that were made together, among which this one is called `name`.
    """
    licence = base_licence(base)
    sections = {
        "What was done": operations_text(plan, draft, manifest.steps),
        "Figures": figures(base, draft, manifest, outputs, verification),
        **({"What it sees": seen} if (seen := sample_text(verification)) else {}),
        **({"Variants": variants_text(compared, name)} if compared else {}),
        "Loading": loading(draft, outputs, manifest.steps),
        **({"Using it": used} if (used := usage(manifest.steps)) else {}),
        "Checked": checked(base, manifest.steps, verification),
        **({"Quantized cache": cached} if (cached := quantized_cache(verification)) else {}),
        "Limits": limits(draft, manifest.steps, custom=bool(_code_files(outputs))),
        "Files": files_text(base, plan, outputs),
        "Making it again": reproducing(manifest),
        "Licence": licence_text(base, licence),
    }
    parts = [front_matter(base, manifest.steps, licence, images=sees(draft)), title(base, manifest.steps)]
    parts += [f"## {heading}\n\n{content}" for heading, content in sections.items()]
    return ("\n\n".join(part.strip("\n") for part in parts) + "\n").encode()


def sees(draft: Draft) -> bool:
    """Whether the model takes images beside text."""
    return draft.model.architecture.vision is not None


def front_matter(base: Checkpoint, steps: Sequence[Step], licence: str | None, *, images: bool) -> str:
    """The YAML that the Hub reads; `images` is whether the model takes some."""
    data: dict[str, Any] = {"license": licence} if licence else {}
    if hub_id(base):
        # The Hub knows finetune, quantized, adapter and merge; a model with changed weights is the first of these.
        relation = "quantized" if quantizes(steps) else "finetune"
        data |= {"base_model": hub_id(base), "base_model_relation": relation}
    tags = dict.fromkeys(["surgery", *(step.operation.name for step in steps)])
    task = "image-text-to-text" if images else "text-generation"
    data |= {"library_name": "transformers", "pipeline_tag": task, "tags": list(tags)}
    return f"---\n{yaml.safe_dump(data, sort_keys=False, default_flow_style=None)}---"


def quantizes(steps: Sequence[Step]) -> bool:
    """Whether a step packs weights."""
    return any(step.operation.quantizes for step in steps)


def hub_id(base: Checkpoint) -> str | None:
    """OWNER/NAME of a base that came from the Hub."""
    found = _HUB_ID.match(base.source) if base.revision is not None else None
    return found.group() if found else None


def title(base: Checkpoint, steps: Sequence[Step]) -> str:
    """The heading, and where the model comes from."""
    name = hub_id(base) or portable_source(base)
    done = ", ".join(dict.fromkeys(step.operation.name for step in steps)) or "a copy"
    link = f"[{name}](https://huggingface.co/{name})" if hub_id(base) else code(name)
    at = f" at commit {code(base.revision)}" if base.revision else ""
    return f"# {text(name)}: {done}\n\nMade from {link}{at} by surgery {__version__}. Loading it does not need surgery."


def operations_text(plan: Plan, draft: Draft, steps: Sequence[Step]) -> str:
    """Every operation with its settings, what became of the tensors, and the notes of the plan."""
    lines = [line for step in steps for line in _operation(step)]
    fates = ", ".join(f"{count:,} {fate}" for fate, count in sorted(plan.fates.items()))
    lines += [f"Of the tensors {fates}.", "", *(f"- {text(note)}" for note in draft.notes)]
    return "\n".join(lines)


def _operation(step: Step) -> Iterator[str]:
    operation, fields = step.operation, type(step.settings).model_fields
    values = step.settings.model_dump(mode="json")
    yield f"**{operation.name}**: {text(operation.title)}. Source: {text(operation.source)}."
    yield ""
    rows = [(code(name), value(values[name]), text(of.description or "")) for name, of in fields.items()]
    yield from table(("setting", "value", "meaning"), rows)
    yield ""


def loading(draft: Draft, outputs: Mapping[str, Finished], steps: Sequence[Step]) -> str:
    """How to load the published model, pinned to a commit, what that needs, and what code it runs."""
    files = _code_files(outputs)
    pinned = f'"OWNER/NAME", revision="<40-hex commit>"{", trust_remote_code=True" if files else ""}'
    auto, reader, name = ("AutoModelForCausalLM", "AutoTokenizer", "tokenizer")
    if sees(draft):
        auto, reader, name = ("AutoModelForImageTextToText", "AutoProcessor", "processor")
    lines = [f"from transformers import {auto}, {reader}", "", f"model = {auto}.from_pretrained({pinned})"]
    if any(name in outputs for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        lines.append(f"{name} = {reader}.from_pretrained({pinned})")
    after = "`OWNER/NAME` and the commit are those of the repository you read this in; of a folder give only the path."
    return f"{_installing(steps)}{fenced(chr(10).join(lines), 'python')}\n\n{after}\n{code_table(draft, outputs)}"


def usage(steps: Sequence[Step]) -> str:
    """What operations say of their results at run time."""
    return "\n\n".join(step.operation.usage for step in steps if step.operation.usage)


def _installing(steps: Sequence[Step]) -> str:
    """What loading needs beside torch and transformers; empty where that is nothing."""
    wanted = {name: None for step in steps for name in step.operation.packages(step.settings).values()}
    if not wanted:
        return ""
    command = " ".join(f'"{name}"' for name in wanted)
    how = "transformers reads these weights with a package beside it:"
    return f"{how}\n\n{fenced(f'pip install {command}', 'bash')}\n\n"


def code_table(draft: Draft, outputs: Mapping[str, Finished]) -> str:
    """Every Python file with its purpose and its hash."""
    if not (files := _code_files(outputs)):
        return "Native: no code. A stock class of transformers holds this model."
    emitted = result_code(draft)
    rows = [(code(name), _purpose(emitted.get(name)), code(outputs[name].sha256)) for name in files]
    warning = "Remote code runs with your rights: read these files, and pin the commit that you read.\n"
    return "\n".join([warning, *table(("file", "purpose", "SHA-256"), rows)])


def _code_files(outputs: Mapping[str, Finished]) -> list[str]:
    return sorted(name for name in outputs if name.endswith(".py"))


def _purpose(source: bytes | None) -> str:
    if source is None:  # a base's own code is not even parsed
        return "came with the base"
    return text((ast.get_docstring(ast.parse(source)) or "").partition("\n")[0])


def checked(base: Checkpoint, steps: Sequence[Step], verification: Verification | None) -> str:
    """What the verification found, with which versions, and which others the family is tested on."""
    # The matrix is of results with plain weights.
    tested = [] if quantizes(steps) else tested_versions(str(base.config.get("model_type")))
    matrix = f"This kind of result is tested with transformers {', '.join(tested)}." if tested else ""
    if verification is None:
        return f"This checkpoint was not verified: its manifest says so. {matrix}".strip()
    used = verification.versions
    shown = ", ".join(f"{name} {used[name]}" for name in ("python", "torch", "transformers") if name in used)
    lines = [f"In a fresh process in which surgery could not be imported, with {text(shown)}:", ""]
    for status, words in (("pass", "passed"), ("fail", "failed"), ("skip", "not applicable")):
        names = [code(check.name) for check in verification.checks if check.status == status]
        lines += [f"- {words}: {', '.join(names)}"] if names else []
    return "\n".join([*lines, "", matrix or "No other version of transformers was tried."])


def tested_versions(model_type: str) -> list[str]:
    """The transformers versions on which `tools/compat` saw the family pass; empty where nothing is known."""
    if not TESTED.is_file():
        return []
    found = json.loads(TESTED.read_text(encoding="utf-8"))
    return list(found["families"].get(model_type, []) if found.get("families") else found.get("versions", []))


def sample_text(verification: Verification | None) -> str:
    """A sample image as the result sees it, or why there is none; empty where it was shown none."""
    checks = verification.checks if verification is not None else ()
    check = next((check for check in checks if check.name == "visual_sample"), None)
    if check is None or verification is None:
        return ""
    if verification.sample is None:
        return f"There is no picture: {text(check.detail)}."
    sample = verification.sample
    lines = []
    if sample["kept"] is not None:
        lines.append("tokens that leave the prompt are dark")
    if sample["side"] is not None:
        lines.append("tiles that are masked are black")
    how = f"A sample image that surgery drew, as the vision tower sees it: {' and '.join(lines)}."
    picture = f"![The sample image, with what is kept and what is masked]({PLACE})"
    return "\n".join([how, "", picture, "", *table(("", ""), sample_rows(sample))])


def quantized_cache(verification: Verification | None) -> str:
    """Which quantized caches were measured, and the call for those that cost little; empty where none was measured."""
    checks = verification.checks if verification is not None else ()
    measured = (check.detail for check in checks if check.name == "quantized_cache" and check.status == "pass")
    detail = next(measured, "{}")
    lines = []
    for kind, found in json.loads(detail).items():
        cost, tokens = found["nats_per_token"], found["tokens"]
        lines.append(f"- {code(kind)}: {cost:.3g} nats per token over the second half of windows of {tokens} tokens.")
        if cost <= RECOMMENDED:
            call = f'model.generate(**inputs, cache_implementation="quantized", cache_config={found["cache_config"]})'
            lines += ["", fenced(call, "python"), ""]
        else:
            lines[-1] += f" Not recommended: more than {RECOMMENDED}."
    how = "What transformers' quantized KV cache costs this model. It saves memory, and time no: each step unpacks it."
    return "\n".join([how, "", *lines]) if lines else ""


def limits(draft: Draft, steps: Sequence[Step], *, custom: bool) -> str:
    """What not to expect."""
    kind = code(str(result_config(draft).get("model_type")))
    of_change = (
        "Perplexity on one text tells little of long contexts, instructions, code or other languages: test your use.",
        *dict.fromkeys(text(line) for step in steps for line in step.operation.limits),
    )
    packed = " and read its `quantization_config`" if quantizes(steps) else ""
    stock = (
        f"Other runtimes may load it where they take the sizes of {kind} from config.json{packed}; none was tried.",
    )
    own: tuple[str, ...] = (
        f"llama.cpp, MLX and ONNX exporters choose by `model_type` and do not know {kind}: not supported.",
        "vLLM and SGLang may run it by their transformers backend. Not tried; no smaller cache is promised there.",
    )
    if draft.config.get("surgery", {}).get("latent_attention"):
        own += ("A static cache needs transformers 5.0 or newer; older ones give values the width of keys.",)
    return "\n".join(f"- {line}" for line in (*(of_change if steps else ()), *(own if custom else stock)))


def files_text(base: Checkpoint, plan: Plan, outputs: Mapping[str, Finished]) -> str:
    """What became of the files that came with the base."""
    changed = {repair.name: repair.note for repair in repairs(base)}
    carried = [name for name, dropped in plan.side_files.items() if not dropped and name in outputs]
    same = [code(name) for name in carried if name not in changed]
    lines = [f"- as they came: {', '.join(same)}"] if same else []
    lines += [f"- changed: {code(name)}, {text(note)}" for name, note in changed.items()]
    lines.append("- written anew: `config.json`, in the spelling that transformers 4.48 to 5.x read alike")
    dropped = [f"- not carried: {code(name)}, {text(why)}" for name, why in plan.side_files.items() if why]
    if len(dropped) > MAX_LISTED:
        dropped[MAX_LISTED:] = [f"- not carried: {len(dropped) - MAX_LISTED} more"]
    return "\n".join([*lines, *dropped])


def reproducing(manifest: Manifest) -> str:
    """The manifest, and the command that makes the same bytes."""
    recipe = fenced(manifest.portable().to_yaml(), "yaml")
    again = f"`surgery reproduce {LOCK} OUT` makes the same bytes with surgery {__version__}, or says what changed."
    return f"{recipe}\n\n{again}\n`{LOCK}` holds the hash of every file that was read or written."


def licence_text(base: Checkpoint, licence: str | None) -> str:
    """Terms and credit."""
    unknown = "The base names no licence that could be read: ask its authors before you pass this on."
    terms = f"{code(licence)}, as the base says." if licence else unknown
    return f"{terms} The weights derive from {code(hub_id(base) or portable_source(base))}: credit its authors."
