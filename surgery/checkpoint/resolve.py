"""Finding the base that a user named, on this machine or on the Hub.

    builtin:NAME                           a model that ships with this package
    FOLDER                                 a checkpoint folder
    OWNER/NAME[@REVISION][:SUBFOLDER]      a repository of the Hub

A branch or tag is turned into its commit first, and everything is then read from that commit.
"""

from __future__ import annotations

import errno
import glob
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from surgery.checkpoint.header import MAX_HEADER_BYTES
from surgery.checkpoint.pickles import PICKLE, PICKLE_INDEX, as_safetensors, has_only_pickles, pickle_names
from surgery.checkpoint.private import copy_small_files, private_folder
from surgery.checkpoint.reader import (
    CARRIED_FOLDER,
    INDEX,
    OTHER_WEIGHTS,
    PICKLES,
    SINGLE,
    Checkpoint,
    is_commit,
    open_checkpoint,
    read_json,
    reading_errors,
    refused_pickle,
    unpinned,
    uses_remote_code,
)
from surgery.checkpoint.writer import environment_errors
from surgery.errors import DiskFull, SourceUnavailable, SurgeryError
from surgery.suggestions import did_you_mean

if TYPE_CHECKING:
    from huggingface_hub import HfApi

BUILTIN = "builtin:"
BUILTIN_FOLDER = Path(__file__).parents[1] / "builtin"
HEAD_BYTES = 1 << 16
TIMEOUT = 30

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_HUB_NAME = re.compile(rf"(?P<id>{_PART}/{_PART})(@(?P<revision>[^:@\s]+))?(:(?P<subfolder>{_PART}(/{_PART})*))?")
_Answer = TypeVar("_Answer")


def open_base(
    base: str, *, trust_remote_code: bool = False, allow_pickle: bool = False, headers_only: bool = False
) -> Checkpoint:
    """Open what `base` names (see this module).

    `headers_only` reads no weights from the Hub: its weight files become sparse stand-ins with the true headers, good
    for planning. `allow_pickle` converts pickled weights, privately and without running them.

    Raises SourceUnavailable (not found, gated, offline) and what `open_checkpoint` raises.
    """
    if base.startswith(BUILTIN):
        return open_checkpoint(_builtin(base.removeprefix(BUILTIN)), source=base)
    folder = Path(base).expanduser()
    with reading_errors(folder):
        local = "\0" not in base and folder.exists()
    if local:
        return _open(folder, base, None, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    name = _HUB_NAME.fullmatch(base)
    if name is None:
        raise SourceUnavailable(
            f"there is no folder {base[:200]}{_near(folder)}",
            cause="it is no name on the Hub either, which would be OWNER/NAME, OWNER/NAME@REVISION or with :SUBFOLDER",
            remedy="check the path, or run: surgery inspect builtin:llama",
        )
    hub = _Hub(_api(), base, name["id"], name["revision"], name["subfolder"] or "")
    folder, commit = _fetch(hub, trusted=trust_remote_code, allow_pickle=allow_pickle, headers_only=headers_only)
    return _open(folder, base, commit, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)


def _open(
    folder: Path, source: str, revision: str | None, *, trust_remote_code: bool, allow_pickle: bool
) -> Checkpoint:
    with reading_errors(folder):
        if allow_pickle and has_only_pickles(folder):
            uses_remote_code(folder, revision=revision, trusted=trust_remote_code)
            folder = as_safetensors(folder)
    return open_checkpoint(folder, source=source, revision=revision, trust_remote_code=trust_remote_code)


def _builtin(name: str) -> Path:
    known = sorted(path.parent.name for path in BUILTIN_FOLDER.glob("*/config.json"))
    if name not in known:
        raise SourceUnavailable(
            f"there is no built-in model {name[:80]!r}{did_you_mean(name, known)}",
            cause=f"this package has {', '.join(known) or 'none'}",
            remedy=f"name one of them, for instance builtin:{next(iter(known), 'llama')}",
        )
    return BUILTIN_FOLDER / name


def _near(folder: Path) -> str:
    """A folder of nearly the same name beside where this one was looked for."""
    if "\0" in str(folder) or len(str(folder)) > 4000 or not folder.parent.is_dir():
        return ""
    return did_you_mean(folder.name, (path.name for path in folder.parent.iterdir() if path.is_dir()))


@dataclass(frozen=True, slots=True)
class _Hub:
    """A name on the Hub: `base` is what the user wrote."""

    api: HfApi
    base: str
    id: str
    revision: str | None
    subfolder: str

    def within(self, name: str) -> str:
        """The name in the repository of a file of the checkpoint."""
        return f"{self.subfolder}/{name}" if self.subfolder else name


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi()


def _fetch(hub: _Hub, *, trusted: bool, allow_pickle: bool, headers_only: bool) -> tuple[Path, str]:
    """Bring a checkpoint here: first what is small, then, if nothing speaks against it, the weights."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        info = hub.api.model_info(hub.id, revision=hub.revision, timeout=TIMEOUT)
    except OfflineModeIsEnabled:
        return _cached(hub, trusted=trusted)
    except Exception as error:
        raise _unavailable(hub, error) from error
    commit = str(info.sha)
    prefix = hub.within("")
    names = [file.rfilename.removeprefix(prefix) for file in info.siblings or () if file.rfilename.startswith(prefix)]
    folder = _download(hub, commit, [name for name in names if _is_small(name)])
    _refuse_code(folder, hub, commit, trusted=trusted)
    pickles = [name for name in (PICKLE, PICKLE_INDEX) if name in names and not {SINGLE, INDEX} & set(names)]
    if pickles:
        if not allow_pickle:
            raise refused_pickle(pickles[0])
        return _download(hub, commit, pickle_names(folder) if PICKLE not in pickles else [PICKLE]), commit
    weights = [name for name in _weights(folder, names) if name in names]
    if headers_only:
        return _stand_ins(hub, commit, folder, weights), commit
    return _download(hub, commit, weights) if weights else folder, commit


def _is_small(name: str) -> bool:
    """Whether a file of the repository belongs to the checkpoint and is no weight."""
    own = "/" not in name or (name.startswith(f"{CARRIED_FOLDER}/") and name.count("/") == 1)
    return own and not name.endswith((*PICKLES, *OTHER_WEIGHTS))


def _weights(folder: Path, names: Iterable[str]) -> list[str]:
    """The weight files that an index names, or the single one; what is wrong with them is told when opening."""
    if INDEX not in names:
        return [SINGLE]
    index = read_json(folder, INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    return (
        sorted({name for name in weight_map.values() if isinstance(name, str)}) if isinstance(weight_map, dict) else []
    )


def _refuse_code(folder: Path, hub: _Hub, commit: str, *, trusted: bool) -> None:
    """Refuse remote code before its weights are fetched, and at a branch's or tag's commit even when trusted."""
    if uses_remote_code(folder, revision=commit, trusted=trusted) and not is_commit(hub.revision):
        raise unpinned()


def _cached(hub: _Hub, *, trusted: bool) -> tuple[Path, str]:
    """What an earlier run left in the Hub's cache; opening tells whether it is complete."""
    snapshot = _asked(
        hub,
        lambda: hub.api.snapshot_download(
            hub.id, revision=hub.revision, local_files_only=True, allow_patterns=[hub.within("config.json")]
        ),
    )
    folder, commit = Path(snapshot) / hub.subfolder, Path(snapshot).name
    _refuse_code(folder, hub, commit, trusted=trusted)
    return folder, commit


def _download(hub: _Hub, commit: str, names: Iterable[str]) -> Path:
    patterns = [glob.escape(hub.within(name)) for name in names]
    if not patterns:
        raise SourceUnavailable(
            f"{hub.base} has no files", cause="there is nothing at this name of the repository",
            remedy="check the subfolder (id@revision:subfolder)",
        )  # fmt: skip
    snapshot = _asked(hub, lambda: hub.api.snapshot_download(hub.id, revision=commit, allow_patterns=patterns))
    return Path(snapshot) / hub.subfolder


def _stand_ins(hub: _Hub, commit: str, folder: Path, names: list[str]) -> Path:
    """A private copy of the small files, with weight files that have the true headers and sizes and no data."""
    target = private_folder()
    with reading_errors(folder):
        copy_small_files(folder, target)
        if (folder / INDEX).exists():
            (target / INDEX).write_bytes((folder / INDEX).resolve().read_bytes())

    def stand_in(name: str) -> None:
        head, size = _read_range(hub, commit, name, 0, HEAD_BYTES)
        end = min(8 + int.from_bytes(head[:8], "little"), size)
        if len(head) < end <= MAX_HEADER_BYTES:
            head += _read_range(hub, commit, name, len(head), end)[0]
        path = target / name
        with environment_errors(path), path.open("wb") as file:
            file.write(head[:end])
            file.truncate(size)

    safe = [name for name in names if name.isprintable() and "/" not in name and "\\" not in name]
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(stand_in, safe))
    return target


def _read_range(hub: _Hub, commit: str, name: str, start: int, stop: int) -> tuple[bytes, int]:
    """Bytes `start` to `stop` (or the end) of a file of the repository, and the size of the whole."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, though not marked as exported
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    def ask() -> tuple[bytes, str]:
        url = hf_hub_url(hub.id, hub.within(name), revision=commit, endpoint=hub.api.endpoint)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        answer = get_session().get(url, headers=headers, timeout=TIMEOUT)
        hf_raise_for_status(answer)
        return answer.content, answer.headers.get("Content-Range", "")

    content, told = _asked(hub, ask)
    size = re.fullmatch(rf"bytes {start}-\d+/(\d+)", told)
    if size is None or len(content) != min(stop, int(size[1])) - start:
        raise SourceUnavailable(
            f"the header of {name[:200]} cannot be read", cause="the server did not send the bytes that were asked for",
            remedy="try again later, or download the checkpoint and name its folder",
        )  # fmt: skip
    return content, int(size[1])


def _asked(hub: _Hub, question: Callable[[], _Answer]) -> _Answer:
    """The Hub's answer; whatever its client raises becomes a typed error."""
    try:
        return question()
    except Exception as error:
        raise _unavailable(hub, error) from error


def _unavailable(hub: _Hub, error: Exception) -> SurgeryError:
    """Any failure of the Hub's client; its releases raise classes of different HTTP libraries."""
    from huggingface_hub import errors

    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DiskFull(
            f"the disk is full while downloading {hub.id}", cause=str(error.strerror),
            remedy="free space, or set HF_HOME to a folder on another disk",
        )  # fmt: skip
    known: tuple[tuple[type[Exception], str, str, str], ...] = (
        (
            errors.GatedRepoError,
            f"{hub.id} is gated",
            "its owners ask to agree to their terms first",
            f"agree at https://huggingface.co/{hub.id} and run: hf auth login",
        ),
        (
            errors.RepositoryNotFoundError,
            f"there is no repository {hub.id} on the Hub that you can see",
            f"and no folder {hub.base}{_near(Path(hub.base))} here",
            "check the name, or run: hf auth login (for a private one)",
        ),
        (
            errors.RevisionNotFoundError,
            f"{hub.id} has no revision {hub.revision!r}",
            "no branch, tag or commit has this name",
            f"look at https://huggingface.co/{hub.id}/commits/main",
        ),
        (
            errors.LocalEntryNotFoundError,
            f"{hub.base} is not in the cache",
            "the Hub cannot be reached or is switched off",
            "unset HF_HUB_OFFLINE, or name the commit that an earlier run cached (id@40-digit-commit)",
        ),
        (
            Exception,
            f"{hub.base} cannot be fetched",
            f"{type(error).__name__}: {_first_line(error)}",
            "check the connection and try again; HF_HUB_OFFLINE=1 uses only what is cached",
        ),
    )
    problem, cause, remedy = next(texts for kind, *texts in known if isinstance(error, kind))
    return SourceUnavailable(problem, cause=cause, remedy=remedy)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
