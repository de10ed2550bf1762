"""What a conversion will do, known before any weight is read.

Operations edit a `Draft`: config fields, tensor expressions, runtime parts. The `Plan` is what can be told about the
draft: bytes, memory, cache, stages, code, and the ledger of every tensor. Nothing here imports torch.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.architectures import Architecture, Model, find_architecture, find_family
from surgery.architectures.family import layer_pattern
from surgery.checkpoint.dtypes import FLOATING, SAFETENSORS_NAMES, TORCH_NAMES, element_count
from surgery.checkpoint.expressions import Computed, Rewrite, Rows, Stored, Tensors, TensorSpec, Value, sources
from surgery.checkpoint.layout import index_bytes, lay_out
from surgery.checkpoint.reader import Checkpoint
from surgery.emission.code import Family, RuntimePart, emit_code
from surgery.errors import InternalError, RefusedInput, SurgeryError, UnsupportedModel
from surgery.metrics.active import active_parameters
from surgery.metrics.cache import cache_bytes_per_token, coded_cache
from surgery.version import __version__

if TYPE_CHECKING:
    from surgery.manifest import Manifest
    from surgery.operations.base import Statistics, Step

# Measured on CPython 3.11 with `tools/bench_stream`: the interpreter with this package, and what importing torch adds.
INTERPRETER_BYTES = 70_000_000
TORCH_BYTES = 330_000_000
SMALL_FILES_BYTES = 64 << 20
# Models whose fp32 weights take more than this are measured in the type they are stored in.
FLOAT32_LIMIT = 2_000_000_000


class _Shapes(Mapping[str, tuple[int, ...]]):
    """The shapes of a draft's tensors, always as they are now."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self._draft.tensors[name].spec.shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._draft.tensors)

    def __len__(self) -> int:
        return len(self._draft.tensors)


class _Bytes(Mapping[str, int]):
    """The bytes of a draft's tensors, always as they are now."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft

    def __getitem__(self, name: str) -> int:
        return self._draft.tensors[name].spec.nbytes

    def __iter__(self) -> Iterator[str]:
        return iter(self._draft.tensors)

    def __len__(self) -> int:
        return len(self._draft.tensors)


@dataclass(frozen=True, slots=True)
class Parameters:
    """How many parameters there are, how many are trained, and through how many a token goes.

    `active` is None where that is all, or not known.
    """

    all: int
    active: int | None
    trained: int


@dataclass
class Draft:
    """A checkpoint in the making; the one mutable thing that operations see.

    `config` is the language model's config, nested in `root` for multimodal models (the same object otherwise).
    `parts` are the runtime files that the result needs; none means that a stock class holds it. `changes` are the
    groups of parameters that operations declared as theirs, `trained` the tensors that training adapts, and
    `scratch_bytes` what it keeps on disk meanwhile. `facts` are what an operation decided, for the lock. Where weights
    are packed, `unpacked` counts what they stand for. `folder` is that of the base, where the
    files lie that are neither config nor weights.
    """

    architecture: Architecture | None
    root: dict[str, Any]
    config: dict[str, Any]
    tensors: dict[str, Value]
    parts: list[RuntimePart] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    changes: set[str] = field(default_factory=set)
    trained: set[str] = field(default_factory=set)
    scratch_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    unpacked: Parameters | None = None
    folder: Path | None = None

    def onto(self, checkpoint: Checkpoint) -> Draft:
        """The same draft once its tensors so far were written as `checkpoint`; their order stays the draft's."""
        return replace(self, tensors={name: Stored(checkpoint.tensors[name]) for name in self.tensors})

    def fork(self) -> Draft:
        """A draft of its own that goes on from here."""
        root, config = copy.deepcopy((self.root, self.config))  # together, so that one object stays one
        return replace(
            self, root=root, config=config, tensors=dict(self.tensors), parts=list(self.parts),
            dropped=dict(self.dropped), notes=list(self.notes), changes=set(self.changes), trained=set(self.trained),
            facts=copy.deepcopy(self.facts),
        )  # fmt: skip

    def prepare(self, step: Step, dtype: str) -> bool:
        """Before packing: store every floating tensor as `dtype` (as in `output.dtype`); whether any tensor changed.

        Scales and packed weights that come afterwards are then left alone.
        """
        if not step.operation.quantizes or self.unpacked is not None:
            return False
        before = self.tensors
        self.finish(dtype)
        self.unpacked = count_parameters(self)
        return any(self.tensors[name] is not before[name] for name in before)

    def finish(self, dtype: str) -> None:
        """Store every floating tensor as `dtype` (as in `output.dtype`), where that was not done before packing."""
        if dtype != "keep" and self.unpacked is None:
            self.cast(SAFETENSORS_NAMES[dtype])

    @property
    def model(self) -> Model:
        """The draft as operations see a model. Raises UnsupportedModel for families without a data file."""
        family = self.architecture or find_architecture(self.config)
        return Model(family, self.config, _Shapes(self), _Bytes(self), self.root)

    def spec(self, name: str) -> TensorSpec:
        """Type and shape of a tensor as it is now."""
        return self.tensors[name].spec

    def rewrite(
        self,
        inputs: Sequence[str],
        outputs: Mapping[str, TensorSpec],
        function: Callable[[Tensors], Tensors],
        *,
        why: str,
        work_bytes: int = 0,
    ) -> None:
        """Replace the tensors `inputs`, of which there may be none, by `outputs` of `function` (see `Rewrite`)."""
        rewrite = Rewrite({name: self.tensors[name] for name in inputs}, dict(outputs), function, why, work_bytes)
        clash = [name for name in outputs if name in self.tensors and name not in inputs]
        if clash:
            raise InternalError(
                f"an operation would overwrite {clash[0]!r}", cause="it is not among the inputs of the rewrite",
                remedy="report this as a defect, with the manifest",
            )  # fmt: skip
        made: dict[str, Value] = {name: Computed(rewrite, name) for name in outputs}
        consumed = set(inputs)
        if consumed >= set(made):  # the common case, without rebuilding a map of 10^5 names
            self.tensors.update(made)
            for name in consumed - set(made):
                del self.tensors[name]
            return
        rebuilt: dict[str, Value] = {}
        for name, value in self.tensors.items():
            if name not in consumed:
                rebuilt[name] = value
            elif made:
                rebuilt.update(made)
                made = {}
        self.tensors = rebuilt | made  # what is made of nothing comes last

    def drop(self, names: Collection[str], why: str) -> None:
        """Leave tensors out of the result, with the reason for the ledger."""
        self.dropped.update({info.name: why for name in names for info in sources(self.tensors[name])})
        gone = set(names)
        self.tensors = {name: value for name, value in self.tensors.items() if name not in gone}

    def rename(self, names: Mapping[str, str]) -> None:
        """Let tensors have other names (old -> new); several may change places."""
        renamed = {names.get(name, name): value for name, value in self.tensors.items()}
        if len(renamed) != len(self.tensors):
            raise InternalError(
                "an operation would give two tensors one name", cause="a new name is another tensor's",
                remedy="report this as a defect, with the manifest",
            )  # fmt: skip
        self.tensors = renamed

    def take_rows(self, name: str, rows: Sequence[int], why: str) -> None:
        """Keep only `rows` of a tensor's first axis, in this order."""
        value, kept = self.tensors[name], tuple(rows)
        if isinstance(value, Stored):
            self.tensors[name] = Rows(value.info, kept, why)
        elif isinstance(value, Rows):
            self.tensors[name] = Rows(value.info, tuple(value.rows[row] for row in kept), why)
        else:
            spec = value.spec

            def function(tensors: Tensors) -> Tensors:
                return {name: tensors[name][list(kept)]}

            self.rewrite([name], {name: TensorSpec(spec.dtype, (len(kept), *spec.shape[1:]))}, function, why=why)

    def cast(self, dtype: str) -> None:
        """Store every floating tensor as `dtype` (safetensors name)."""

        def cast_one(name: str) -> Callable[[Tensors], Tensors]:
            def function(tensors: Tensors) -> Tensors:
                import torch

                return {name: tensors[name].to(getattr(torch, TORCH_NAMES[dtype]))}

            return function

        cast: dict[str, Value] = {}
        for name, value in self.tensors.items():
            spec = value.spec
            cast[name] = value
            if spec.dtype in FLOATING and spec.dtype != dtype:
                outputs = {name: TensorSpec(dtype, spec.shape)}
                cast[name] = Computed(Rewrite({name: value}, outputs, cast_one(name), f"stored as {dtype}"), name)
        self.tensors = cast
        self.config["torch_dtype"] = self.root["torch_dtype"] = TORCH_NAMES[dtype]
        self.config.pop("dtype", None)
        self.root.pop("dtype", None)


def open_draft(checkpoint: Checkpoint) -> Draft:
    """A draft that is the checkpoint itself."""
    root = copy.deepcopy(dict(checkpoint.config))
    try:
        architecture: Architecture | None = find_family(root)
    except UnsupportedModel:
        architecture = None
    config = _language_part(architecture, root)
    tensors: dict[str, Value] = {name: Stored(info) for name, info in checkpoint.tensors.items()}
    draft = Draft(architecture, root, config, tensors, folder=checkpoint.folder)
    _spell_tower(draft)
    return draft


def _language_part(architecture: Architecture | None, root: Any) -> Any:
    """The config of the language model: a part of `root` for multimodal models, unless they keep both in one."""
    nested = root.get(architecture.text_config) if architecture and architecture.text_config else None
    return nested if isinstance(nested, dict) else root


def _spell_tower(draft: Draft) -> None:
    """Name the vision tower's tensors as the Hub and transformers 4 do; 5.x saves them without a part of the name."""
    vision = draft.architecture.vision if draft.architecture else None
    if vision is None or vision.tower is None:
        return
    prefix = f"{vision.short_tower}."
    short = [name for name in draft.tensors if name.startswith(prefix) and not name.startswith(vision.tower)]
    if short:
        draft.rename({name: f"{vision.tower}.{name.removeprefix(prefix)}" for name in short})


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """What becomes of one tensor: `kept`, `renamed`, `rewritten`, `dropped` or `added`; `why` names the cause."""

    name: str
    fate: str
    why: str


def ledger(checkpoint: Checkpoint, draft: Draft) -> tuple[LedgerEntry, ...]:
    """The account of every base tensor and every added one. Raises InternalError where one is unaccounted for."""
    used: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name, value in draft.tensors.items():
        if isinstance(value, Stored):
            kept[value.info.name] = name
        elif isinstance(value, Rows):
            used[value.info.name] = value.why
        else:
            used.update({info.name: value.rewrite.why for info in sources(value)})
    entries = []
    for name in checkpoint.tensors:
        if name in kept:
            entries.append(LedgerEntry(name, "kept" if kept[name] == name else "renamed", ""))
        elif name in used:
            entries.append(LedgerEntry(name, "rewritten", used[name]))
        elif name in draft.dropped:
            entries.append(LedgerEntry(name, "dropped", draft.dropped[name]))
        else:
            raise InternalError(
                f"tensor {name!r} is unaccounted for", cause="an operation consumed it without saying why",
                remedy="report this as a defect, with the manifest",
            )  # fmt: skip
    added = [name for name in draft.tensors if name not in checkpoint.tensors]
    whys = {name: value.rewrite.why for name, value in draft.tensors.items() if isinstance(value, Computed)}
    return (*entries, *(LedgerEntry(name, "added", whys.get(name, "")) for name in added))


@dataclass(frozen=True, slots=True)
class Stage:
    """One link of the chain: `measure` runs the model on text, `train` adapts it, `edit` streams tensors."""

    kind: str
    title: str
    operations: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do. Sizes are bytes; `estimated` says that some sizes wait for a measurement.

    `cache_coded` says that a token has no fixed bytes in the cache, and `cache_bytes_after` is that of long prompts.
    `active_before` and `active_after` are the parameters that a token goes through, for models with experts.
    `variants` has the plan of each variant, as if it were made alone; `disk_needed` and `peak_memory` cover them all.
    """

    source: str
    revision: str | None
    family: str
    operations: tuple[Mapping[str, Any], ...]
    stages: tuple[Stage, ...]
    parameters_before: int
    parameters_after: int
    bytes_read: int
    bytes_written: int
    disk_needed: int
    peak_memory: int
    cache_dtype: str
    cache_bytes_before: int | None
    cache_bytes_after: int | None
    cache_coded: bool
    active_before: int | None
    active_after: int | None
    code: tuple[str, ...]
    shards: tuple[str, ...]
    ledger: tuple[LedgerEntry, ...]
    side_files: Mapping[str, str]
    trained_parameters: int
    notes: tuple[str, ...]
    estimated: bool
    variants: Mapping[str, Plan] = field(default_factory=dict)

    @property
    def fates(self) -> Mapping[str, int]:
        """How many tensors are kept, rewritten, dropped and added."""
        return Counter(entry.fate for entry in self.ledger)

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the ledger's lines (its counts are there)."""
        plain = {key: value for key, value in vars(self).items() if key not in {"ledger", "stages", "variants"}}
        plain["stages"] = [{"kind": s.kind, "title": s.title, "operations": list(s.operations)} for s in self.stages]
        plain["ledger"] = dict(self.fates)
        if self.variants:
            plain["variants"] = {name: plan.to_json() for name, plan in self.variants.items()}
        return plain


def _none_stored(_step: Step) -> None:
    """Where no results are stored."""


def make_plan(
    checkpoint: Checkpoint,
    manifest: Manifest,
    *,
    workers: int = 2,
    stored: Callable[[Step], Statistics | None] = _none_stored,
) -> Plan:
    """Plan a conversion without reading weights. Raises UnsupportedModel where an operation does not fit.

    `stored` gives the result of a measurement on the base that was made before; with it less is estimated.
    """
    run = _DryRun(open_draft(checkpoint), manifest.output.dtype, stored)
    run.apply(manifest.steps)
    shared = len(run.stages)
    variants: dict[str, Plan] = {}
    disk = 0
    for name, steps in manifest.variants.items():
        branch = run.fork()
        with variant_errors(name):
            branch.apply(steps)
            stages = branch.finish()
            plan = describe(
                checkpoint, branch.draft, manifest.variant(name), stages, estimated=branch.estimated, workers=workers
            )  # fmt: skip
        reused = starts_on_main(manifest, steps[0]) and stages[shared].kind == "edit"
        between = sum(stage.kind == "edit" for stage in stages[shared:]) - 1 - reused
        disk += plan.bytes_written + SMALL_FILES_BYTES + between * max(plan.bytes_written, checkpoint.tensor_bytes)
        variants[name] = plan
    stages = run.finish()
    plan = describe(checkpoint, run.draft, manifest, stages, estimated=run.estimated, workers=workers)
    peak = max(each.peak_memory for each in (plan, *variants.values()))
    return replace(plan, disk_needed=plan.disk_needed + disk, peak_memory=peak, variants=variants)


def starts_on_main(manifest: Manifest, step: Step) -> bool:
    """Whether `step`, the first one of a variant, may measure the main result: alone it would not see another type."""
    return step.measures and (manifest.output.dtype == "keep" or step.operation.quantizes)


@contextmanager
def variant_errors(name: str) -> Iterator[None]:
    """Let errors name the variant that they are about."""
    try:
        yield
    except SurgeryError as error:
        error.problem = f"variant {name}: {error.problem}"
        raise


def describe(
    checkpoint: Checkpoint,
    draft: Draft,
    manifest: Manifest,
    stages: tuple[Stage, ...],
    *,
    estimated: bool,
    workers: int,
) -> Plan:
    """The plan of a draft whose operations have been applied."""
    shards = lay_out(checkpoint, draft.tensors, manifest.output.shard_bytes)
    index = index_bytes(shards)
    written = sum(len(shard.header) + shard.data_bytes for shard in shards)
    parameters = count_parameters(draft)
    edits, trains = (sum(stage.kind == kind for stage in stages) for kind in ("edit", "train"))
    dtype = storage_dtype(checkpoint)
    cache_dtype = str(draft.config.get("torch_dtype") or dtype).removeprefix("torch.")
    original = _language_part(draft.architecture, checkpoint.config)
    return Plan(
        source=checkpoint.source,
        revision=checkpoint.revision,
        family=draft.architecture.title if draft.architecture else f"unlisted ({draft.config.get('model_type')})",
        operations=tuple({step.operation.name: step.settings.model_dump(mode="json")} for step in manifest.steps),
        stages=stages,
        parameters_before=checkpoint.parameter_count,
        parameters_after=parameters.all,
        bytes_read=_bytes_read(draft),
        bytes_written=written,
        # What stands between stages may be as large as the base, if a later operation is the one that cuts.
        disk_needed=written
        + max(edits - 1, 0) * max(written, checkpoint.tensor_bytes)
        + draft.scratch_bytes
        + SMALL_FILES_BYTES,
        peak_memory=max(
            _peak_memory(draft, workers),
            _calibration_memory(checkpoint, draft, manifest) if calibrates(manifest.steps) else 0,
            _reading_memory(checkpoint) if any(step.weights_only for step in manifest.steps) else 0,
            _training_memory(checkpoint, parameters.trained) if trains else 0,
        ),
        cache_dtype=cache_dtype,
        cache_bytes_before=cache_bytes_per_token(original, dtype),
        cache_bytes_after=cache_bytes_per_token(draft.config, cache_dtype),
        cache_coded=coded_cache(draft.config) is not None,
        active_before=count_parameters(open_draft(checkpoint)).active,
        active_after=parameters.active,
        code=tuple(emit_code(Family.of(draft.model.architecture), draft.parts, __version__) if draft.parts else ()),
        shards=(*(shard.name for shard in shards), *((index[0],) if index else ())),
        ledger=ledger(checkpoint, draft),
        side_files={file.name: file.dropped for file in checkpoint.side_files},
        trained_parameters=parameters.trained,
        notes=tuple(draft.notes),
        estimated=estimated,
    )


def storage_dtype(checkpoint: Checkpoint) -> str:
    """The torch name of the type that the config states, or else of most weights."""
    stated = checkpoint.config.get("torch_dtype") or checkpoint.config.get("dtype")
    if isinstance(stated, str):
        return stated.removeprefix("torch.")
    count = Counter(info.dtype for info in checkpoint.tensors.values())
    return TORCH_NAMES.get(count.most_common(1)[0][0], "float32")


def count_parameters(draft: Draft) -> Parameters:
    """The parameters of a draft; of packed weights, those that they stand for."""
    if draft.unpacked is not None:
        return draft.unpacked
    counts = {name: element_count(value.spec.shape) for name, value in draft.tensors.items()}
    trained = sum(count for name, count in counts.items() if name in draft.trained)
    return Parameters(sum(counts.values()), _active(draft), trained)


def _active(draft: Draft) -> int | None:
    if draft.architecture is None or draft.architecture.experts is None:
        return None
    try:
        return active_parameters(draft.model)
    except RefusedInput:
        return None  # an operation on experts says so itself; others do not mind


@dataclass
class _DryRun:
    """Operations applied one after the other, with consecutive edits grouped into one stage."""

    draft: Draft
    dtype: str
    stored: Callable[[Step], Statistics | None]
    stages: list[Stage] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    estimated: bool = False
    untouched: bool = True

    def fork(self) -> _DryRun:
        """A run of its own that goes on from here."""
        return replace(self, draft=self.draft.fork(), stages=list(self.stages), pending=list(self.pending))

    def apply(self, steps: Sequence[Step]) -> None:
        """Apply operations."""
        for step in steps:
            step.check(self.draft.model)
            cast = self.draft.prepare(step, self.dtype)
            self.untouched = self.untouched and not cast
            found: Statistics | None = None
            if step.measures or step.trains:
                if self.pending or cast:
                    self.stages.append(Stage("edit", "write the intermediate checkpoint", tuple(self.pending)))
                    self.pending = []
                kind, verb = ("measure", "calibrate") if step.measures else ("train", "train by")
                self.stages.append(Stage(kind, f"{verb} {step.operation.name}", (step.operation.name,)))
                found = self.stored(step) if step.measures and self.untouched else None
                self.estimated = self.estimated or (step.measures and found is None)
            step.edit(self.draft, found)
            self.untouched = False
            self.pending.append(step.operation.name)

    def finish(self) -> tuple[Stage, ...]:
        """Apply what the output asks for; returns all stages."""
        self.draft.finish(self.dtype)
        if self.pending or not self.stages:
            self.stages.append(Stage("edit", "write the checkpoint", tuple(self.pending)))
        return tuple(self.stages)


def _bytes_read(draft: Draft) -> int:
    rewrites = {id(v.rewrite): v for v in draft.tensors.values() if isinstance(v, Computed)}
    stored = sum(value.spec.nbytes for value in draft.tensors.values() if not isinstance(value, Computed))
    return stored + sum(info.nbytes for value in rewrites.values() for info in sources(value))


def calibrates(steps: Sequence[Step]) -> bool:
    """Whether a step needs text and the running model."""
    return any(step.measures and not step.weights_only for step in steps)


def _peak_memory(draft: Draft, workers: int) -> int:
    peaks = [value.rewrite.peak_bytes for value in draft.tensors.values() if isinstance(value, Computed)]
    return INTERPRETER_BYTES + (TORCH_BYTES + workers * max(peaks) if peaks else 0) + workers * (8 << 20)


def _calibration_memory(checkpoint: Checkpoint, draft: Draft, manifest: Manifest) -> int:
    """The largest of what the measuring steps take. Models with experts are loaded whole: transformers fuses these."""
    steps = [step for step in manifest.steps if step.measures and not step.weights_only]
    walked = [step.operation.by_layers(step.settings) and draft.model.architecture.experts is None for step in steps]
    whole = 0 if all(walked) else _measuring_memory(checkpoint, draft, manifest)
    return max(whole, _walked_memory(checkpoint, draft, manifest) if any(walked) else 0)


def _measuring_memory(checkpoint: Checkpoint, draft: Draft, manifest: Manifest) -> int:
    """Bound of calibration: the model in fp32 where that is small, and a handful of residual streams."""
    tokens = manifest.calibration.samples * manifest.calibration.length
    return INTERPRETER_BYTES + 2 * TORCH_BYTES + _loaded_bytes(checkpoint) + 8 * tokens * draft.model.hidden_size * 4


def _walked_memory(checkpoint: Checkpoint, draft: Draft, manifest: Manifest) -> int:
    """Estimate for measuring layer by layer: embeddings, a layer and its copy, and six times the inputs squared."""
    pattern = layer_pattern(draft.model.architecture.layers)
    layers: Counter[str] = Counter()
    widest = outside = 0
    for info in checkpoint.tensors.values():
        match = pattern.match(info.name)
        if match:
            layers[match[1]] += element_count(info.shape)
            widest = max(widest, info.shape[-1] if len(info.shape) == 2 else 0)
        else:
            outside = max(outside, element_count(info.shape))
    batch = 16 * manifest.calibration.length * widest
    numbers = outside + 3 * max(layers.values(), default=0) + 6 * widest**2 + 4 * batch
    return INTERPRETER_BYTES + 2 * TORCH_BYTES + 4 * numbers


def _reading_memory(checkpoint: Checkpoint) -> int:
    """Bound of measuring weights alone: one tensor, and a part of it in float32."""
    return INTERPRETER_BYTES + TORCH_BYTES + 2 * max(info.nbytes for info in checkpoint.tensors.values())


def _training_memory(checkpoint: Checkpoint, trained: int) -> int:
    """Estimate for training: two models, and gradients and moments in float32; activations come on top."""
    return INTERPRETER_BYTES + 2 * TORCH_BYTES + 2 * _loaded_bytes(checkpoint) + 4 * 4 * trained


def _loaded_bytes(checkpoint: Checkpoint) -> int:
    """Weights of the model as it is loaded: in float32 where that is small, else as stored."""
    whole = checkpoint.parameter_count * 4
    return whole if whole <= FLOAT32_LIMIT else checkpoint.tensor_bytes
