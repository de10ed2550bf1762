# SPDX-License-Identifier: Apache-2.0
"""Requests inside prompts, and answers inside what was generated; all of it lists of token ids.

Method: joint intention analysis of AMIA (arXiv 2505.24519), in one generation. Where the text is spliced in and how the
answer is cut out are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

Ids = Sequence[int]
NEW = -1  # a token that was not in the prompt
USUAL_LENGTH = 20  # what transformers generates where nobody says how much


@dataclass(frozen=True)
class Request:
    """What a user asks in one turn: its text from `start` to `end`, the turn itself from `turn` on."""

    turn: int
    start: int
    end: int


@dataclass(frozen=True)
class Prompt:
    """One row of a batch: its tokens, their columns, and the requests in it."""

    ids: list[int]
    columns: list[int]
    requests: list[Request]

    def text(self, request: Request, visual: frozenset[int]) -> list[int]:
        """The tokens of a request, without those that stand for images."""
        return [token for token in self.ids[request.start : request.end] if token not in visual]


@dataclass(frozen=True)
class Owner:
    """Where an image or a clip stands: the row of its prompt, its first token there, and the request that judges it.

    That is the one in whose turn it stands, so a mask stays as it is in later turns.
    """

    row: int
    at: int
    request: Request


def find(ids: Ids, part: Ids, start: int = 0, stop: int | None = None) -> int:
    """The first place in `ids[start:stop]` at which `part` begins, or -1."""
    last = (len(ids) if stop is None else stop) - len(part)
    wanted = list(part)
    places = (at for at in range(start, last + 1) if ids[at] == wanted[0])
    return next((at for at in places if list(ids[at : at + len(part)]) == wanted), -1)


def _after(ids: Ids, part: Ids, at: int) -> int:
    """Where `ids` go on behind `part`, if that begins at `at`."""
    return at + len(part) if part and list(ids[at : at + len(part)]) == list(part) else at


def requests(ids: Ids, turn: dict[str, list[int]], visual: frozenset[int]) -> list[Request]:
    """The request of each user turn of a prompt. Raises ValueError where none is found.

    `turn` says what the base's chat template puts around one; `visual` are tokens that stand for images and frames. A
    prompt that follows no template has one request: what comes after its last image.
    """
    found, begin = [], 0
    while (end := find(ids, turn["close"], begin)) >= 0:
        opened = find(ids, turn["open"], begin, end)
        if opened >= 0:
            start = opened + len(turn["open"])
            found.append(Request(start, _text_start(ids, start, end, turn, visual), end))
        begin = end + len(turn["close"])
    if not found:
        shown = [at for at, token in enumerate(ids) if token in visual]
        if not shown:
            raise ValueError(
                "no user turn is found in the prompt: make it with the base's chat template and "
                "add_generation_prompt=True, or pass defense=False"
            )
        end = find(ids, turn["close"], shown[-1])
        found.append(Request(shown[0], _after(ids, turn["after_image"], shown[-1] + 1), end if end >= 0 else len(ids)))
    return found


def _text_start(ids: Ids, at: int, end: int, turn: dict[str, list[int]], visual: frozenset[int]) -> int:
    """Where the text of a turn begins: behind the images that it opens with."""
    while True:
        ahead = at
        while ahead < end and ids[ahead] in turn["between"]:
            ahead += 1
        ahead = shown = _after(ids, turn["before_image"], ahead)
        while ahead < end and ids[ahead] in visual:
            ahead += 1
        if ahead == shown:
            return at
        at = _after(ids, turn["after_image"], ahead)


def is_wrapped(ids: Ids, request: Request, templates: Sequence[Ids]) -> bool:
    """Whether a request begins with one of the templates; its tokens at the edges may have merged with others."""
    cores = [template[1:-1] for template in templates]
    starts = range(request.start, request.start + 3)
    return any(core and list(ids[at : at + len(core)]) == list(core) for core in cores for at in starts)


def wrapped(ids: Ids, request: Request, template: Ids, marks: Sequence[Ids], separator: int) -> list[tuple[int, int]]:
    """The prompt with `template` before a request, as pairs of token and its place in the old prompt (NEW: none).

    Tags and labels (`marks`) that the user wrote are broken by a `separator`: the template's are the only ones.
    """
    pairs = [(token, at) for at, token in enumerate(ids[: request.start])] + [(token, NEW) for token in template]
    breaks: dict[int, bool] = {}  # place of a mark's last token -> whether that is all of the mark
    for mark in marks:
        at = request.start - 1
        while (at := find(ids, mark, at + 1, request.end)) >= 0:
            breaks[at + len(mark) - 1] = len(mark) == 1
    for at in range(request.start, len(ids)):
        pairs += [(separator, NEW)] * (at in breaks)
        pairs += [] if breaks.get(at) else [(ids[at], at)]
    return pairs


@dataclass(frozen=True)
class Answer:
    """What was generated, divided: the tokens of the answer, those of the analysis, and whether the final tag came."""

    tokens: list[int]
    analysis: list[int]
    tag_found: bool


@dataclass(frozen=True)
class Parser:
    """How an answer is told from the analysis before it.

    final, analysis  the tags, each in all its spellings
    skipped          what may stand between the final tag and the answer
    ends             tokens that end a sentence
    missing          what happens without a final tag: full, strip_analysis or refuse
    refusal          what is said then
    eos              tokens that end a sequence
    limit            tokens of an answer at most
    """

    final: tuple[tuple[int, ...], ...]
    analysis: tuple[tuple[int, ...], ...]
    skipped: frozenset[int]
    ends: frozenset[int]
    missing: str
    refusal: tuple[int, ...]
    eos: frozenset[int]
    limit: int

    def tag_end(self, ids: Ids, start: int = 0) -> tuple[int, int] | None:
        """Begin and end of the first final tag that ends after `start`."""
        return _first(ids, self.final, start)

    def begun(self, ids: Ids, end: int) -> int:
        """Where the answer begins behind a tag that ends at `end`."""
        while end < len(ids) and ids[end] in self.skipped:
            end += 1
        return end

    def until_eos(self, ids: Ids) -> list[int]:
        """What was generated, with the token that ended it, and without the padding behind that."""
        return list(ids[: next((at + 1 for at, token in enumerate(ids) if token in self.eos), len(ids))])

    def parse(self, ids: Ids) -> Answer:
        """Divide what was generated for one sequence; an answer that is empty counts as one without tag."""
        ids = self.until_eos(ids)
        tag = self.tag_end(ids)
        if tag is not None:
            tokens = ids[self.begun(ids, tag[1]) :]
            if any(token not in self.eos for token in tokens):
                return Answer(tokens[: self.limit], self._analysis(ids[: tag[0]]), tag_found=True)
        return Answer(self._without_tag(ids)[: self.limit], self._analysis(ids), tag_found=False)

    def _analysis(self, ids: list[int]) -> list[int]:
        tag = _first(ids, self.analysis)
        return ids[self.begun(ids, tag[1]) :] if tag else ids

    def _without_tag(self, ids: list[int]) -> list[int]:
        tag = _first(ids, self.analysis)
        if self.missing == "full" or (self.missing == "strip_analysis" and tag is None):
            return ids
        rest: list[int] = []
        if self.missing == "strip_analysis" and tag is not None:
            stop = next((at + 1 for at in range(tag[1], len(ids)) if ids[at] in self.ends), len(ids))
            rest = ids[self.begun(ids, stop) :]
        if any(token not in self.eos for token in rest):
            return rest
        return [*self.refusal, *sorted(self.eos)[:1]]


def _first(ids: Ids, spellings: Sequence[Ids], start: int = 0) -> tuple[int, int] | None:
    """Begin and end of what ends first, after `start`, among all places of all spellings."""
    for end in range(start + 1, len(ids) + 1):
        for spelling in spellings:
            begin = end - len(spelling)
            if begin >= 0 and ids[end - 1] == spelling[-1] and list(ids[begin:end]) == list(spelling):
                return begin, end
    return None


@dataclass
class _Sequence:
    """A sequence in the making."""

    ids: list[int] = field(default_factory=list)
    tag: int | None = None

    def grow(self, tokens: Ids, parser: Parser) -> None:
        for token in tokens:
            self.ids.append(token)
            if self.tag is None and (found := parser.tag_end(self.ids, len(self.ids) - 1)):
                self.tag = found[1]

    def answer(self, parser: Parser) -> list[int]:
        return [] if self.tag is None else self.ids[parser.begun(self.ids, self.tag) :]


class Answered(StoppingCriteria):  # type: ignore[misc]
    """Ends a sequence whose answer has as many tokens as the caller wants."""

    def __init__(self, parser: Parser, width: int) -> None:
        self.parser, self.seen, self.rows = parser, width, {}  # type: ignore[var-annotated]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Whether each sequence is done [B]."""
        done = []
        for number, row in enumerate(input_ids[:, self.seen :].tolist()):
            state = self.rows.setdefault(number, _Sequence())
            state.grow(row, self.parser)
            done.append(len(state.answer(self.parser)) >= self.parser.limit)
        self.seen = input_ids.shape[1]
        return torch.tensor(done, device=input_ids.device)


class AnswerStreamer(BaseStreamer):  # type: ignore[misc]
    """Passes the prompt as the caller gave it, and the answer as it comes; the analysis is kept back."""

    def __init__(self, streamer: Any, prompt: Tensor, parser: Parser) -> None:
        self.streamer, self.parser = streamer, parser
        self.prompt: Tensor | None = prompt
        self.state, self.sent = _Sequence(), 0

    def put(self, value: Tensor) -> None:
        """Take the next tokens; the first are those of the prompt."""
        if self.prompt is not None:
            self.streamer.put(self.prompt.cpu())
            self.prompt = None
            return
        self.state.grow(value.flatten().tolist(), self.parser)
        answer = self.state.answer(self.parser)
        if any(token not in self.parser.eos for token in answer):
            self._send(self.parser.until_eos(answer)[: self.parser.limit])

    def end(self) -> None:
        """Send what is left, which without a final tag is all of it."""
        self._send(self.parser.parse(self.state.ids).tokens)
        self.streamer.end()

    def _send(self, answer: list[int]) -> None:
        for token in answer[self.sent :]:
            self.streamer.put(torch.tensor([token]))
        self.sent = max(self.sent, len(answer))


def padded(rows: Sequence[Ids], pad: int, *, left: bool) -> Tensor:
    """Rows of different lengths as one tensor [B, L]."""
    width = max(map(len, rows), default=0)
    filled = ([pad] * (width - len(row)) for row in rows)
    return torch.tensor([[*fill, *row] if left else [*row, *fill] for fill, row in zip(filled, rows, strict=True)])


def setting(kwargs: dict[str, Any], configs: list[Any], name: str) -> Any:
    """A setting of generation: the caller's, or else that of the configs."""
    found = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in found if value is not None), None)


def limit_of(kwargs: dict[str, Any], configs: list[Any], width: int) -> int:
    """How many tokens a caller wants; max_length counts the prompt as it was given."""
    wanted = setting(kwargs, configs, "max_new_tokens")
    if wanted is not None:
        return int(wanted)
    longest = [kwargs.get("max_length"), *(getattr(config, "max_length", None) for config in configs)]
    said = [value for at, value in enumerate(longest) if value is not None and (at == 0 or value != USUAL_LENGTH)]
    if said and said[0] <= width:
        raise ValueError(f"max_length is {said[0]} and the prompt has {width} tokens: raise it, or pass max_new_tokens")
    return int(said[0]) - width if said else USUAL_LENGTH


def eos_of(kwargs: dict[str, Any], configs: list[Any]) -> frozenset[int]:
    """The tokens that end a sequence."""
    found = setting(kwargs, configs, "eos_token_id")
    tokens = found.tolist() if isinstance(found, Tensor) else found
    return frozenset(() if tokens is None else [tokens] if isinstance(tokens, int) else tokens)


def pad_of(kwargs: dict[str, Any], configs: list[Any]) -> int | None:
    """The token that fills rows, if there is one."""
    found = setting(kwargs, configs, "pad_token_id")
    return None if found is None else int(found)
