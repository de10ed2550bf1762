"""What the codebook cache of a finished checkpoint takes for a prompt, by layer and kind, in figures and as a picture.

The model and its cache are the code that lies in the checkpoint, so nothing runs before that is what its lock says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.cache_picture import draw_picture
from surgery.calibration.documents import BUILTIN_TEXTS, evaluation_text
from surgery.checkpoint.reader import Checkpoint
from surgery.errors import CorruptCheckpoint, UsageError
from surgery.finished import load_result, memory_errors, open_result, quiet, refuse_changed, stage
from surgery.metrics.cache import coded_cache
from surgery.progress import Report, silent
from surgery.suggestions import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 1024
WINDOW = 32  # newest tokens that stay as they are, where a config does not say
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
# What a layer's entry says beside the bytes of each kind.
FIGURES = ("layer", "bytes", "stock_bytes", "stored_tokens", "seen_tokens")


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds after one prompt of `tokens` tokens, beside what the stock cache would.

    `ratio` is `bytes` over `stock_bytes`. Each of `layers` has FIGURES and the bytes by kind; its tokens are counted
    over all heads. `text` says what was read, `notes` what is worth knowing beside it.
    """

    tokens: int
    bytes: int
    stock_bytes: int
    ratio: float
    layers: tuple[Mapping[str, int], ...]
    text: str
    notes: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """What bytes are spent on, as the entries of layers name it."""
        return tuple(name for name in self.layers[0] if name not in FIGURES) if self.layers else ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "layers": [dict(layer) for layer in self.layers], "notes": list(self.notes)}

    def draw(self, path: Path | str) -> None:
        """Draw the bytes by layer and kind as the PNG `path`. Raises UsageError, OutputExists or EnvironmentFailure."""
        draw_picture(Path(path), self)


def cache_report(
    checkpoint: Path | str,
    *,
    text: Path | str = "builtin",
    tokens: int = TOKENS,
    settings: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    report: Report = silent,
) -> CacheReport:
    """Run one prompt through the folder `checkpoint`, a result of `codebook_kv`, and tell what its cache holds.

    text      a file, or a word for a text that every Python carries: `builtin`, `builtin:code` ...
    tokens    of it, at most; a model's own limit and the end of the text bound them too
    settings  of the cache, over those of the checkpoint's config

    The checkpoint's code runs in this process: without `trust_remote_code`, UnsafeCheckpoint is raised unless its files
    have the hashes of its lock. Raises the other errors of `surgery.errors` too.
    """
    folder, changes = Path(checkpoint), dict(settings or {})
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise UsageError(
            f"tokens is {tokens!r}", cause="a prompt has at least one token", remedy="give a whole number above 0"
        )
    opened = open_result(folder, "codebook_kv")
    configured = _language(opened)["surgery"]["codebook_cache"]
    words = _text(text)
    if not trust_remote_code:
        with stage(report, "hash", "folder"):
            refuse_changed(folder)
    notes: list[str] = []
    wanted = _longest(tokens, _language(opened), notes)
    with quiet():
        with stage(report, "load", "model"):
            ids = _ids(opened, words, wanted)
            if ids is None:
                notes.append("the folder has no tokenizer: the prompt is seeded random tokens, unlike any text")
            elif len(ids) < wanted:
                _check_length(len(ids), wanted, {**configured, **changes}.get("window"))
                notes.append(f"the text has {len(ids):,} tokens, less than {wanted:,}")
            model = load_result(opened, device)
            cache = _cache(model, changes)
        prompt = _prompt(model, ids, wanted)
        with stage(report, "prompt", "prompt"):
            found = _run(model, prompt, cache)
    count = prompt.shape[1]
    if count < cache.settings.min_prompt:
        notes.append(f"prompts of less than {cache.settings.min_prompt:,} tokens (min_prompt) stay as they are")
    every, aside = len(cache), len(cache) - len(found["layers"])
    if aside:
        notes.append(f"{aside} of {every} layers have a sliding window and a stock cache, and are not counted")
    return CacheReport(
        count, found["bytes"], found["stock_bytes"], found["ratio"], tuple(found["layers"]),
        "random tokens" if ids is None else _name(text), tuple(notes),
    )  # fmt: skip


def _language(opened: Checkpoint) -> Mapping[str, Any]:
    """The config of the language model, which has a codebook cache. Raises UsageError where it has none."""
    for config in (opened.config, opened.config.get("text_config")):
        if isinstance(config, Mapping) and coded_cache(config) is not None:
            return config
    raise UsageError(
        f"{opened.folder} has no codebook cache", cause="its config.json has no surgery.codebook_cache",
        remedy=f"make one that has: surgery convert {opened.folder} OUT -o codebook_kv",
    )  # fmt: skip


def _longest(tokens: int, config: Mapping[str, Any], notes: list[str]) -> int:
    limit = config.get("max_position_embeddings")
    if not isinstance(limit, int) or isinstance(limit, bool) or not 0 < limit < tokens:
        return tokens
    notes.append(f"{limit:,} tokens are all that the model takes (max_position_embeddings)")
    return limit


def _name(text: Path | str) -> str:
    return str(text) if text in BUILTIN_TEXTS else Path(text).name


def _text(text: Path | str) -> str:
    if isinstance(text, str) and (text in BUILTIN_TEXTS or text.startswith("builtin:")):
        if text not in BUILTIN_TEXTS:
            raise UsageError(
                f"there is no text {text[:80]!r}{did_you_mean(text, BUILTIN_TEXTS)}",
                cause=f"there are: {', '.join(BUILTIN_TEXTS)}", remedy="name one of them, or a file",
            )  # fmt: skip
        return evaluation_text(text)
    return evaluation_text([Path(text)])


def _check_length(count: int, wanted: int, window: Any) -> None:
    """A prompt that is hardly more than its window says nothing of what is coded before it."""
    least = 2 * window if isinstance(window, int) else 2 * WINDOW
    if count < least:
        raise UsageError(
            f"the text has {count} tokens, which is too short for a prompt of {wanted}",
            cause=f"the newest tokens stay as they are, and at least {least} are wanted (twice the window)",
            remedy="give a longer text, or leave it out for one that every Python carries",
        )


def _ids(opened: Checkpoint, text: str, wanted: int) -> list[int] | None:
    """The first tokens of a text, None without a tokenizer. Raises CorruptCheckpoint for one that does not load."""
    from surgery.calibration.loading import load_tokenizer
    from surgery.calibration.text import token_pieces, token_prefix

    if not any(opened.path(name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        tokenizer = load_tokenizer(opened)
    except Exception as error:
        raise CorruptCheckpoint(
            f"the tokenizer of {opened.folder} does not load", cause=str(error.__cause__ or error)[:300],
            remedy=f"see what is wrong with it: surgery verify {opened.folder}",
        ) from error  # fmt: skip
    ids = token_prefix(tokenizer)
    for piece in token_pieces(text, tokenizer):
        ids += piece
        if len(ids) >= wanted:
            break
    return ids[:wanted]


def _cache(model: Any, changes: Mapping[str, Any]) -> Any:
    """An empty cache. Raises UsageError where the runtime refuses its settings."""
    if not hasattr(model, "surgery_cache"):
        raise CorruptCheckpoint(
            "the model has no codebook cache although its config has", cause=f"its class is {type(model).__name__}",
            remedy="convert it again; auto_map of config.json must name the code that surgery wrote",
        )  # fmt: skip
    try:
        cache = model.surgery_cache(**changes)
    except (ValueError, TypeError) as error:
        raise UsageError(
            "the cache cannot have these settings", cause=str(error),
            remedy="see what there is: surgery operations codebook_kv",
        ) from error  # fmt: skip
    if not hasattr(cache, "report"):
        raise UsageError(
            "no layer of this model has a codebook cache", cause="all its layers have a sliding window",
            remedy="its cache is bounded as it is",
        )  # fmt: skip
    return cache


def _prompt(model: Any, ids: list[int] | None, count: int) -> Tensor:
    """The prompt [1, T]; of `count` random tokens where there are no ids."""
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    if ids is None:
        return torch.randint(rows, (1, count), generator=torch.Generator().manual_seed(0))
    if max(ids) >= rows:
        raise CorruptCheckpoint(
            f"the tokenizer gives token {max(ids)}, and the model knows {rows}", cause="they do not belong together",
            remedy="use the tokenizer that the model was trained with",
        )  # fmt: skip
    return torch.tensor([ids])


def _run(model: Any, prompt: Tensor, cache: Any) -> Mapping[str, Any]:
    import torch

    with torch.no_grad(), memory_errors(prompt.shape[1], "ask for fewer tokens"):
        model(input_ids=prompt.to(model.device), past_key_values=cache, use_cache=True)
    found: Mapping[str, Any] = model.surgery_cache_report(cache)
    return found
