"""Which visual tokens stay for a question: figures that hold, a picture that shows them, and what is refused."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import surgery
from surgery import cli
from surgery.emission.pictures import DIMMED, View, dimmed
from surgery.errors import (
    CorruptCheckpoint,
    EnvironmentFailure,
    MissingPackage,
    OutputExists,
    SourceUnavailable,
    UnsafeCheckpoint,
    UnsupportedModel,
    UsageError,
)
from surgery.pruning_picture import seen
from tests.picture_cases import SIDE, apart, cropper, image_processor, patcher, picture
from tests.tiny_vision import IMAGE, config_of, write_tiny_vision

PNG = b"\x89PNG\r\n\x1a\n"
SPECIAL = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>", IMAGE: "<image>"}
WORDS = ["what", "is", "red", "where", "it", "?"]
TOKENS = 16
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else ' ' + part.text }}{% endfor %}{% endfor %}"
)


def write_processor(folder: Path) -> Path:
    """Words and an image of 16 x 16 pixels, of which 4 x 4 are a token; any other size is cut."""
    words = [SPECIAL.get(at, f"w{at}") for at in range(128)]
    words[10 : 10 + len(WORDS)] = WORDS
    inner = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    inner.add_special_tokens(list(SPECIAL.values()))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    images = image_processor("CLIPImageProcessor", size={"shortest_edge": SIDE}, crop_size=SIDE)
    transformers.LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def convert(base: Path, out: Path, *operations: str) -> Path:
    surgery.convert(str(base), out, surgery.load_manifest(operations=operations, overrides=["verify=false"]))
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_processor(write_tiny_vision(tmp_path_factory.mktemp("base") / "base", "llava"))


@pytest.fixture(scope="module")
def pruned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(base, tmp_path_factory.mktemp("pruned") / "pruned", "visual_pruning")


@pytest.fixture
def copy(pruned: Path, tmp_path: Path) -> Path:
    """One that a test may deface."""
    return Path(shutil.copytree(pruned, tmp_path / "copied"))


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    picture().save(tmp_path / "shown.png")
    return tmp_path / "shown.png"


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.run(["inspect", *map(str, arguments)])
    return code, *capsys.readouterr()


def ask(folder: Path, shown: Path, **options: Any) -> surgery.PruningReport:
    return surgery.pruning_report(folder, image=shown, question="what is red ?", **options)


def test_figures_are_those_of_the_model(pruned: Path, shown: Path) -> None:
    found = ask(pruned, shown)
    assert isinstance(found, surgery.PruningReport)
    assert (found.image, found.question, found.reserve) == ("shown.png", "what is red ?", 0.25)
    assert (found.visual_tokens, found.kept_tokens, found.share) == (TOKENS, 4, 0.25)
    assert (found.prompt_tokens_before, found.prompt_tokens_after) == (1 + TOKENS + 4, 1 + 4 + 4)
    token = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, width, float32
    assert (found.cache_bytes_before, found.cache_bytes_after) == (21 * token, 9 * token)
    assert not found.notes
    assert list(found.kept) == sorted(set(found.kept))
    model = transformers.AutoModelForImageTextToText.from_pretrained(pruned, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(pruned)
    inputs = processor(images=[picture()], text=["<image> what is red ?"], return_tensors="pt")
    with torch.no_grad():
        columns = model(**inputs).kept_indices[0].tolist()
        written = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, 21:]
    assert columns == [0, *(1 + number for number in found.kept), 17, 18, 19, 20]
    assert processor.tokenizer.decode(written, skip_special_tokens=True).strip() == found.answer
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["kept"] == list(found.kept)
    assert "view" not in plain


def test_with_everything_both_answers_are_one(pruned: Path, shown: Path) -> None:
    found = ask(pruned, shown, reserve=1.0)
    assert found.kept == tuple(range(TOKENS))
    assert found.answer == found.answer_with_all
    assert found.prompt_tokens_before == found.prompt_tokens_after
    assert found.cache_bytes_before == found.cache_bytes_after
    half = ask(pruned, shown, reserve=0.5)
    assert (half.kept_tokens, half.share, half.answer_with_all) == (8, 0.5, found.answer)


def test_a_coded_cache_counts_itself(base: Path, tmp_path: Path, shown: Path) -> None:
    found = ask(convert(base, tmp_path / "coded", "codebook_kv:min_prompt=1", "visual_pruning"), shown)
    assert found.kept_tokens == 4
    assert 0 < found.cache_bytes_after < found.cache_bytes_before


def test_the_view_is_what_the_tower_sees(pruned: Path, shown: Path, tmp_path: Path) -> None:
    found = ask(pruned, shown)
    assert (found.view.rows, found.view.columns, found.view.first) == (4, 4, 0)
    assert apart(found.view.image, picture()) <= 1
    wide = picture(32, 16)
    wide.save(tmp_path / "wide.png")
    assert apart(ask(pruned, tmp_path / "wide.png").view.image, wide.crop((8, 0, 24, 16))) <= 1
    clear = tmp_path / "clear.png"
    Image.new("P", (4, 4)).save(clear, transparency=b"\0")  # of which Pillow would warn
    assert ask(pruned, clear).view.image.size == (SIDE, SIDE)


def test_what_leaves_is_dimmed() -> None:
    image = picture(12, 8)
    drawn = dimmed(View(image, 2, 3, first=1), (0, 1, 6, 7))  # the first shows nothing, nor does what is beyond
    for token in range(1, 7):
        row, column = divmod(token - 1, 3)
        box = (4 * column, 4 * row, 4 * column + 4, 4 * row + 4)
        expected = image.crop(box).point(lambda value, part=1 if token in {1, 6} else DIMMED: value * part)
        assert apart(drawn.crop(box), expected) <= 1


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_patches_are_joined(family: str) -> None:
    images = patcher()
    made = images(images=[picture(24, 40)], return_tensors="pt")
    view = seen(made, config_of(family), SimpleNamespace(image_processor=images), 15)
    assert (view.rows, view.columns, view.first) == (5, 3, 0)
    assert apart(view.image, picture(24, 40)) <= 1


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_of_crops_the_base_view_is_shown(family: str) -> None:
    images = cropper(family)
    made = images(images=[picture(32, 16)], return_tensors="pt")
    assert made["pixel_values"].shape[1] == 3
    view = seen(made, config_of(family), SimpleNamespace(image_processor=images), 16 + 32 + 4)
    assert (view.rows, view.columns, view.first) == (4, 4, 0)
    assert apart(view.image, picture(32, 16).resize((SIDE, SIDE), images.resample)) <= 1


class Stand:
    """In place of a processor that wants torchvision: a prompt of one image, which becomes so many tokens."""

    chat_template = "the question alone"

    def __init__(self, images: Any, tokens: int) -> None:
        self.image_processor, self.tokens, self.tokenizer = images, tokens, self

    def apply_chat_template(self, turn: Any, **_: Any) -> str:
        return str(turn[0]["content"][1]["text"])

    def __call__(self, images: list[Image.Image], text: list[str], **_: Any) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[1, 7, *[IMAGE] * self.tokens, 8, *(20 + at for at in range(len(text[0].split())))]])
        made = dict(self.image_processor(images=images, return_tensors="pt"))
        more = {"mm_token_type_ids": (ids == IMAGE).long()} if "image_grid_thw" in made else {}
        return {**made, **more, "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, ids: torch.Tensor, **_: Any) -> str:
        return " ".join(map(str, ids.tolist()))


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "qwen2_vl", "qwen3_vl"])
def test_other_families(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = convert(write_tiny_vision(tmp_path / f"base_{family}", family), tmp_path / family, "visual_pruning")
    picture(32, 16).save(tmp_path / "wide.png")
    crops = family.startswith("llava")
    stand = Stand(cropper(family), 16 + 32 + 4) if crops else Stand(patcher(), 8)
    monkeypatch.setattr("surgery.asking.processor_of", lambda _: stand)
    found = ask(folder, tmp_path / "wide.png")
    assert (found.visual_tokens, found.kept_tokens) == ((52, 13) if crops else (8, 2))
    assert found.prompt_tokens_before - found.prompt_tokens_after == found.visual_tokens - found.kept_tokens
    assert found.cache_bytes_before * found.prompt_tokens_after == found.cache_bytes_after * found.prompt_tokens_before
    assert (found.view.rows, found.view.columns) == ((4, 4) if crops else (2, 4))
    assert [note[:33] for note in found.notes] == ["a picture shows the base view, 16"] * crops
    assert found.answer
    found.draw(tmp_path / "stays.png")


def test_a_grid_that_does_not_fit_is_refused() -> None:
    images = SimpleNamespace(do_normalize=False, do_rescale=False)
    inputs = {"pixel_values": torch.full((1, 3, 18, 16), 7.0)}
    config = config_of("llava")
    for count in (15, 17):
        with pytest.raises(UnsupportedModel, match="do not lie"):
            seen(inputs, config, SimpleNamespace(image_processor=images), count)
    more = SimpleNamespace(image_processor=images, vision_feature_select_strategy="full", num_additional_image_tokens=1)
    view = seen(inputs, config, more, 17)  # a token of the whole image is first; 2 rows of pixels are in no patch
    assert (view.first, view.box(0), view.box(1), view.box(16)) == (1, None, (0, 0, 4, 4), (12, 12, 16, 16))
    assert view.image.getpixel((3, 3)) == (7, 7, 7)


def test_the_command_says_what_the_function_does(pruned: Path, shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (pruned, "--image", shown, "--question", "where is it ?", "--reserve", 0.5)
    place = shown.with_name("stays.png")
    code, out, err = answer(capsys, *options, "--json", "--picture", place)
    assert (code, err) == (0, "")
    found = json.loads(out)
    again = surgery.pruning_report(pruned, image=shown, question="where is it ?", reserve=0.5)
    assert found == {**again.to_json(), "picture": str(place)}
    assert place.read_bytes().startswith(PNG)
    assert struct.unpack(">II", place.read_bytes()[16:24]) > (600, 600)
    assert sorted(path.name for path in place.parent.iterdir()) == ["shown.png", "stays.png"]
    assert answer(capsys, *options, "-q") == (0, f"{found['answer']}\n", "")
    code, out, err = answer(capsys, *options)
    assert code == 0
    assert err.split() == ["hash", "...", "load", "...", "answer", "..."]  # no bar and no warning of transformers
    assert "8 of 16 stay, 50.0%" in out
    assert "13 of 21 tokens" in out
    assert ", ".join(map(str, found["kept"])) in out


def test_a_question_is_drawn_as_it_is(pruned: Path, tmp_path: Path, shown: Path) -> None:
    words = "what is $red_ {? \u4ec0\u4e48 \\frac\n" + "it " * 400
    found = surgery.pruning_report(pruned, image=str(shown), question=words)
    found.draw(tmp_path / "a.png")
    found.draw(str(tmp_path / "b.PNG"))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.PNG").read_bytes()
    with pytest.raises(OutputExists):
        found.draw(tmp_path / "a.png")


@pytest.mark.usefixtures("never")
def test_options_that_want_each_other(pruned: Path, shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, said in [
        (("--image", shown), "--image is given without --question"),
        (("--question", "what ?"), "--question is given without --image"),
        (("--picture", shown.with_name("p.png")), "--picture is given without --image"),
        (("--reserve", "0.5"), "--reserve is given without --image"),
        (("--device", "cpu"), "--device is given without --image"),
        (("--image", shown, "--question", "what ?", "--picture", shown), "exists"),
        (("--image", shown, "--question", "what ?", "--picture", shown.with_name("p.pdf")), "PNG"),
        (("--image", shown, "--question", "what ?", "--reserve", "0"), "--reserve"),
        (("--image", shown, "--question", "what ?", "--reserve", "nan"), "reserve is nan"),
    ]:
        code, out, err = answer(capsys, pruned, *options)
        assert (code, out) == (2, "")
        assert said in err
    for reserve in (0, -1, 1.5, True, "half", float("nan")):
        with pytest.raises(UsageError, match="reserve is"):
            ask(pruned, shown, reserve=reserve)


@pytest.mark.usefixtures("never")
def test_other_folders_are_refused(base: Path, shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = ("--image", shown, "--question", "what ?")
    code, _, err = answer(capsys, base, *about)
    assert code == 2
    assert "prunes no visual tokens" in err
    assert f"surgery convert {base} OUT -o visual_pruning" in err
    for place in (base / "absent", base / "config.json", "builtin:llama"):
        code, _, err = answer(capsys, place, *about)
        assert code == SourceUnavailable.exit_code
        assert "is not a folder" in err


@pytest.mark.usefixtures("never")
def test_images_that_are_none_are_refused(
    pruned: Path, shown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (tmp_path / "absent.png", tmp_path):
        with pytest.raises(SourceUnavailable, match="there is no image"):
            ask(pruned, place)
    whole = shown.read_bytes()
    for broken in (b"", b"no image", whole[:60], whole[: len(whole) // 2]):
        shown.write_bytes(broken)
        with pytest.raises(SourceUnavailable, match="no image that can be read"):
            ask(pruned, shown)
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(MissingPackage, match="Pillow"):
        ask(pruned, shown)


def test_a_question_that_cannot_be_put_is_refused(pruned: Path, shown: Path) -> None:
    with pytest.raises(UsageError, match="'<image>'"):
        surgery.pruning_report(pruned, image=shown, question="what is <image> ?")
    with pytest.raises(EnvironmentFailure, match="device"):
        ask(pruned, shown, device="nowhere")


def test_a_processor_is_wanted(copy: Path, shown: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(UnsafeCheckpoint, match="not what"):
        ask(copy, shown)
    with pytest.raises(UsageError, match="no processor with a chat template"):
        ask(copy, shown, trust_remote_code=True)
    for file in copy.glob("*processor_config.json"):
        file.write_text("{")
    with pytest.raises(CorruptCheckpoint, match="processor"):
        ask(copy, shown, trust_remote_code=True)


def test_what_cannot_be_asked_is_said(copy: Path, shown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = copy / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "cache_implementation": "static"}))
    with pytest.raises(UsageError, match="does not take") as caught:
        ask(copy, shown, trust_remote_code=True)
    assert "visual_reserve=1.0" in caught.value.cause
    (copy / "chat_template.jinja").write_text("{{ messages[0].content[1].text }}")
    with pytest.raises(UsageError, match="makes no prompt"):
        ask(copy, shown, trust_remote_code=True)
    monkeypatch.setattr("surgery.asking.processor_of", lambda _: Stand(patcher(), 0))
    with pytest.raises(CorruptCheckpoint, match="no visual token"):
        ask(copy, shown, trust_remote_code=True)


@pytest.mark.usefixtures("never")
def test_changed_code_does_not_run(copy: Path, shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = copy / "surgery_visual_pruning.py"
    code.write_text(code.read_text() + "\n# a line more\n")
    status, out, err = answer(capsys, copy, "--image", shown, "--question", "what ?")
    assert (status, out) == (UnsafeCheckpoint.exit_code, "")
    assert "surgery_visual_pruning.py has another size" in err
    assert "--trust-remote-code" in err


def test_changed_code_runs_where_it_is_trusted(copy: Path, shown: Path) -> None:
    # In one process transformers keeps the classes of a folder's name, so each load here has a name of its own.
    trusted, native = copy.rename(copy.with_name("trusted")), copy.with_name("native")
    code = trusted / "surgery_visual_pruning.py"
    code.write_text(code.read_text() + "\n# a line more\n")
    assert ask(trusted, shown, trust_remote_code=True).kept_tokens == 4
    config = json.loads((trusted / "config.json").read_text())
    del config["auto_map"]
    (trusted / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    with pytest.raises(CorruptCheckpoint, match="does not prune"):
        ask(trusted.rename(native), shown, trust_remote_code=True)
