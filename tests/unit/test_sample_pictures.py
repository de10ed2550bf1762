"""The sample image of a card: what the probe says of it, how it is drawn, what the card tells, and why there is none."""

from __future__ import annotations

import io
import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

import surgery
from surgery.completion import SAMPLES
from surgery.emission.card import sample_text
from surgery.emission.pictures import COLOURS, PLACE, SIDE, View, cuts, dimmed, sample_png
from surgery.probe import running
from surgery.probe.noise import Noise
from surgery.probe.outcome import Outcome
from surgery.probe.sampled import ENLARGED, loaded_processor, visual_sample
from surgery.probe.subject import Subject
from surgery.verification import Check, Verification
from tests.picture_cases import picture

QUESTION = "Which digit is yellow?"
MASKS = "visual_defense:intention_analysis=false,scorer=own"
FULL = {
    "question": "what | <b>?", "visual_tokens": 64, "kept": list(range(0, 64, 4)), "rows": 8, "columns": 8, "first": 0,
    "side": 4, "masked": [0, 5, 9], "scores": [0.5] * 16, "answer_whole": "a\n# b", "answer": "`c`",
}  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampled") / "sampled"
    operations = ("visual_pruning", MASKS)
    surgery.convert("builtin:llava", folder, surgery.load_manifest(operations=operations, overrides=["verify=false"]))
    return folder


@pytest.fixture(scope="module")
def model(both: Path) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(both, trust_remote_code=True).eval()


@pytest.fixture
def subject(both: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """The loaded model, with settings of its own that a test may change."""
    sample = {"image": str(SAMPLES / "0.png"), "question": QUESTION, "view": str(tmp_path / "view.png")}
    made = Subject({"checkpoint": str(both), "trust_remote_code": True, "sample": sample}, Noise())
    monkeypatch.setattr(model.config, "surgery", json.loads(json.dumps(model.config.surgery)))
    made.model = model
    return made


def loaded(subject: Subject) -> tuple[Any, dict[str, Any]]:
    processor = transformers.AutoProcessor.from_pretrained(subject.folder)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    return processor, dict(processor(images=[Image.open(SAMPLES / "0.png")], text=[text], return_tensors="pt"))


def test_the_probe_tells_what_the_model_does(subject: Subject) -> None:
    assert visual_sample(subject) == Outcome("pass")
    assert not subject.model._forward_hooks
    found = json.loads(json.dumps(subject.sample))
    processor, inputs = loaded(subject)
    options = {"max_new_tokens": 16, "do_sample": False}
    output = subject.model.generate(**inputs, **options, return_dict_in_generate=True)
    whole = subject.model.generate(**inputs, **options, defense=False, visual_reserve=1.0)
    width = inputs["input_ids"].shape[1]
    words = [processor.tokenizer.decode(row[0, width:], skip_special_tokens=True) for row in (whole, output.sequences)]
    assert [found["answer_whole"], found["answer"]] == [text.strip() for text in words]
    assert found["masked"] == output.defense[0]["masked_tiles"][0]
    assert found["scores"] == output.defense[0]["scores"][0].tolist()
    assert (found["visual_tokens"], len(found["kept"]), found["side"]) == (64, 16, 4)
    assert (found["rows"], found["columns"], found["first"], found["question"]) == (8, 8, 0, QUESTION)
    black = [8 * row + column for tile in found["masked"] for row, column in [divmod(tile, 4)]]
    assert black
    with Image.open(SAMPLES / "0.png") as sample, Image.open(subject.job["sample"]["view"]) as view:
        assert view.size == sample.size
        assert max(abs(a - b) for a, b in zip(sample.convert("RGB").tobytes(), view.tobytes(), strict=True)) <= 1


def test_answers_before_and_after_are_told_apart(subject: Subject) -> None:
    """With next to nothing kept the built-in model cannot know the digit that it knows of the whole image."""
    subject.model.config.surgery["visual_pruning"]["reserve"] = 0.001
    subject.model.config.surgery["visual_defense"]["masked_patches"] = 15
    subject.job["sample"] |= {"image": str(SAMPLES / "2.png"), "question": "What is at h6?"}
    visual_sample(subject)
    assert subject.sample is not None
    assert len(subject.sample["kept"]) == 1
    assert len(subject.sample["masked"]) == 15
    assert subject.sample["answer_whole"] == "2" != subject.sample["answer"]


@pytest.mark.parametrize(
    ("pruned", "patches", "scorer", "why", "shows"),
    [
        (True, 3, "given", "", (True, False)),
        (True, 0, "own", "", (True, False)),
        (False, 3, "own", "", (False, True)),
        (False, 3, "given", "it prunes no visual tokens, and masks nothing by itself", None),
        (False, 0, "own", "it prunes no visual tokens, and masks nothing by itself", None),
    ],
)
def test_what_a_result_does_is_what_is_shown(
    subject: Subject, pruned: bool, patches: int, scorer: str, why: str, shows: tuple[bool, bool] | None
) -> None:
    settings = subject.model.config.surgery
    settings["visual_defense"] |= {"masked_patches": patches, "scorer": scorer}
    if not pruned:  # of a model that cannot do without the settings, the check must not know
        kept = settings["visual_pruning"] | {"reserve": 1.0}
        settings = {"visual_defense": settings["visual_defense"]}
        model = subject.model
        subject.model = SimpleNamespace(
            config=SimpleNamespace(surgery=settings, vision_config=model.config.vision_config),
            register_forward_hook=model.register_forward_hook,
            generate=lambda **options: model.generate(**options, visual_reserve=kept["reserve"]),
        )
    outcome = visual_sample(subject)
    assert (outcome.status, outcome.detail) == ("skip" if why else "pass", why)
    if shows is None:
        assert subject.sample is None
        return
    assert subject.sample is not None
    assert (subject.sample["kept"] is not None, subject.sample["side"] is not None) == shows


def test_a_refusal_is_the_reason_and_a_defect_is_an_error(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    subject.model.config.surgery["visual_defense"] |= {"tiles": 81 * 81, "side": 81}
    outcome = visual_sample(subject)
    assert outcome.status == "skip"
    assert "does not take the sample image: an image of 64 x 64 pixels has tiles smaller" in outcome.detail
    assert subject.sample is None

    def broken(**_: Any) -> None:
        raise RuntimeError("a tile has no score (nan)")

    monkeypatch.setattr(subject.model, "generate", broken)
    with pytest.raises(RuntimeError, match="no score"):
        visual_sample(subject)


def test_an_unknown_layout_is_the_reason(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.probe.sampled.shown", lambda *_: None)
    assert visual_sample(subject).detail == "how 64 visual tokens lie on an image is not known"


def test_small_prompts_are_shown_a_larger_sample(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    processor, _ = loaded(subject)

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(processor, name)

        def __call__(self, images: list[Image.Image], **options: Any) -> Any:
            sizes.append(images[0].size)
            return processor(images=images, **options)

    monkeypatch.setattr("surgery.probe.sampled.loaded_processor", lambda _: (Watched(), ""))
    for enough, expected in ((64, [(64, 64)]), (65, [(64, 64), (64 * ENLARGED,) * 2])):
        monkeypatch.setattr("surgery.probe.sampled.ENOUGH", enough)
        assert visual_sample(subject).status == "pass"
        assert sizes == expected
        sizes.clear()


def test_why_there_is_no_processor(
    subject: Subject, both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loaded_processor(subject)[0] is not None
    subject.folder = Path(shutil.copytree(both, tmp_path / "bare"))
    for error, said in [
        (ImportError("X requires the\nTorchvision library"), "a package that is not installed: X requires the Torch"),
        (ValueError("unrecognized"), "no processor that loads: unrecognized"),
        (OSError("no file"), "no processor that loads: no file"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, error=error, **__: _raise(error))
            outcome = visual_sample(subject)
        assert outcome.status == "skip"
        assert said in outcome.detail
    (subject.folder / "chat_template.jinja").unlink()
    assert "no processor with a chat template" in visual_sample(subject).detail
    for file in subject.folder.glob("*processor_config.json"):
        file.unlink()
    assert visual_sample(subject).detail == "the folder has no processor, which shows images to the model"


def test_what_a_processor_says_of_itself_is_no_noise(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    load = transformers.AutoProcessor.from_pretrained

    def complaining(*names: Any, **options: Any) -> Any:
        warnings.warn("a slow image processor", stacklevel=1)
        return load(*names, **options)

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", complaining)
    with subject.noise.listening():
        assert visual_sample(subject).status == "pass"
    assert subject.noise.messages == []


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("given", [True, False])
def test_a_job_without_a_sample_has_no_such_check(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    asked: list[set[str]] = []
    monkeypatch.setattr(running, "_outcomes", lambda _, wanted: asked.append(set(wanted)) or {})
    (tmp_path / "job.json").write_text(json.dumps(dict(subject.job) if given else {**subject.job, "sample": None}))
    running.run(tmp_path / "job.json", tmp_path / "result.json")
    assert asked == [set(running.NAMES) - (set() if given else {"visual_sample"})]
    assert json.loads((tmp_path / "result.json").read_text())["sample"] is None


# Drawing


def drawn(place: Path, **changes: Any) -> Image.Image:
    made = sample_png(FULL | changes, place)
    assert len(made) < 150_000
    return Image.open(io.BytesIO(made)).convert("RGB")


@pytest.mark.parametrize("size", [(64, 64), (40, 24), (336, 336), (500, 900)])
def test_pictures_are_small_and_the_same_each_time(size: tuple[int, int], tmp_path: Path) -> None:
    picture(*size).save(tmp_path / "view.png")  # noise, which no PNG makes smaller
    found = drawn(tmp_path / "view.png")
    assert found.tobytes() == drawn(tmp_path / "view.png").tobytes()
    assert SIDE // 2 < max(found.size) <= SIDE
    assert abs(found.width * size[1] - found.height * size[0]) <= max(size)
    assert len(found.getcolors() or ()) <= COLOURS


def test_what_leaves_is_dark_and_what_is_masked_black(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (200, 100, 40)).save(tmp_path / "view.png")
    kept, masks = [0, 1, 9, 30, 63], [0, 5]
    found = drawn(tmp_path / "view.png", kept=kept, masked=masks)
    for token in range(64):
        row, column = divmod(token, 8)
        middle = found.getpixel((column * 48 + 24, row * 48 + 24))
        tile = row // 2 * 4 + column // 2
        expected = (0, 0, 0) if tile in masks else (200, 100, 40) if token in kept else (50, 25, 10)
        assert max(abs(a - b) for a, b in zip(middle, expected, strict=True)) <= 2, token
    plain = drawn(tmp_path / "view.png", kept=None, masked=masks)
    assert plain.getpixel((24 + 48 * 7, 24)) == (200, 100, 40)
    unmasked = drawn(tmp_path / "view.png", kept=kept, masked=None, side=None)
    assert unmasked.getpixel((24, 24)) == (200, 100, 40)


def test_boxes_cover_an_image_that_does_not_divide() -> None:
    assert cuts(10, 4) == [0, 2, 5, 7, 10]
    view = View(picture(10, 7), 3, 4, first=1)
    boxes = [view.box(token) for token in range(1, 13)]
    covered = torch.zeros(7, 10)
    for left, top, right, bottom in filter(None, boxes):
        covered[top:bottom, left:right] += 1
    assert torch.equal(covered, torch.ones(7, 10))
    assert view.box(0) is view.box(13) is None
    assert dimmed(view, range(1, 13)).tobytes() == view.image.tobytes()


# The card


def card(sample: dict[str, Any] | None, *, status: Any = "pass", detail: str = "", name: str = "visual_sample") -> str:
    return sample_text(Verification((Check(name, status, detail),), {}, {}, sample))


def test_the_card_tells_what_the_picture_shows() -> None:
    text = card(FULL)
    assert f"]({PLACE})" in text
    assert "| visual tokens | 16 of 64 kept |" in text
    assert "| tiles | of 16, numbered row by row from 0, black: 0, 5, 9 |" in text
    assert "tokens that leave the prompt are dark and tiles that are masked are black" in text
    assert "| answer to the whole image | `a # b` |" in text  # a model's words stay in their cell
    assert "| answer of this | `'c'` |" in text
    assert r"| question | `what \| <b>?` |" in text
    only = card(FULL | {"side": None, "masked": None, "scores": None})
    assert "tiles" not in only
    assert "black" not in only
    only = card(FULL | {"kept": None})
    assert "visual tokens" not in only
    assert "dark" not in only
    assert "the 64 of the whole image; the others see closer" in card(FULL | {"visual_tokens": 100})
    assert "see closer" not in text


def test_without_a_picture_the_card_says_why_or_nothing() -> None:
    assert card(None, status="skip", detail="there is | no processor") == r"There is no picture: there is \| no processor."
    assert card(None, name="visual_pruning") == ""
    assert sample_text(None) == ""
