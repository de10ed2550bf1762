"""Writing shards: byte ranges are copied, rewrites evaluated, hashes taken on the way; memory is bounded.

A shard is written under a temporary name, synced, renamed and then journalled, in this order, so that whatever the
journal names is complete on disk. Its pages are sent to the disk while the next ones are made, and then let go: this
spares the final sync its wait, and the kernel the search for fresh pages (twice as fast as leaving it all to fsync).
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Literal

from surgery.checkpoint.expressions import Computed, Rows, Stored
from surgery.checkpoint.finite import FiniteCheck
from surgery.checkpoint.header import TensorInfo
from surgery.checkpoint.journal import Finished, Journal, sync_folder
from surgery.checkpoint.layout import Shard
from surgery.checkpoint.reader import Checkpoint, read_into, reading_errors
from surgery.errors import CorruptCheckpoint, DiskFull, EnvironmentFailure

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4 << 20
WRITEBACK = 64 << 20
Progress = Callable[[int], None]


class _StoppedError(Exception):
    """Another shard failed; its error is the one to tell."""


def _untold(_count: int) -> None:
    """The progress that tells nobody."""


@dataclass(frozen=True, slots=True)
class Job:
    """Where and how shards are written.

    `prefix` is the folder's name relative to the journal's folder; `recipe` names what the shards are made by, beyond
    what is equal for all runs that share a journal: a file that was made by another recipe is made anew.
    """

    checkpoint: Checkpoint
    folder: Path
    prefix: str
    journal: Journal
    workers: int = 2
    link: bool = False
    progress: Progress = _untold
    recipe: str = ""


def write_shards(job: Job, shards: tuple[Shard, ...]) -> dict[str, Finished]:
    """Write all shards that the journal does not vouch for; returns every shard's size and hash, by its name.

    Raises what reading, evaluating and writing raise, of the first shard that failed; DiskFull where the disk ran out.
    """
    stop = Event()
    with ThreadPoolExecutor(max_workers=job.workers, thread_name_prefix="surgery-write") as pool:
        futures = [pool.submit(_shard, job, shard, stop) for shard in shards]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finished = [future.result() for future in futures if future in done]
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
    with environment_errors(job.folder):
        sync_folder(job.folder)
    return {file.file: file for file in finished}


def write_file(path: Path, content: bytes) -> Finished:
    """Write a small file durably."""
    with environment_errors(path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return Finished(path.name, len(content), hashlib.sha256(content).hexdigest())


def copy_file(source: Path, target: Path) -> Finished:
    """Copy a file durably, byte for byte."""
    size = 0
    digest = hashlib.sha256()
    with environment_errors(target), target.open("wb", buffering=0) as file:
        for block in _file_blocks(source):
            digest.update(block)
            size += len(block)
            _write_all(file, block)
        os.fsync(file.fileno())
    return Finished(target.name, size, digest.hexdigest())


def hash_file(path: Path) -> Finished:
    """Size and SHA-256 of a file, read in blocks."""
    digest, size = hashlib.sha256(), 0
    for block in _file_blocks(path):
        digest.update(block)
        size += len(block)
    return Finished(path.name, size, digest.hexdigest())


def hash_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the stored bytes of each tensor."""
    return {name: hash_value(checkpoint, Stored(checkpoint.tensors[name])) for name in names}


def hash_value(checkpoint: Checkpoint, value: Stored | Rows) -> str:
    """SHA-256 of the bytes of a stored tensor, or of slices of it."""
    info, digest = value.info, hashlib.sha256()
    path = checkpoint.path(info.shard)
    runs = value.runs() if isinstance(value, Rows) else [(info.offset, info.nbytes)]
    with reading_errors(path), path.open("rb", buffering=0) as file:
        for start, length in runs:
            for block in _blocks(file.fileno(), start, length, info.shard):
                digest.update(block)
    return digest.hexdigest()


class environment_errors:  # noqa: N801 - reads as a statement: `with environment_errors(path):`
    """Turns operating-system errors of writing into typed ones."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> Literal[False]:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskFull(
                f"the disk is full while writing {self.path.name}", cause=str(error.strerror),
                remedy="free space and run the same command again; finished files are kept in OUT.partial",
            ) from error  # fmt: skip
        if isinstance(error, OSError):
            raise EnvironmentFailure(
                f"{self.path.name} cannot be written", cause=f"{type(error).__name__}: {error.strerror}",
                remedy="check the disk and the permissions of OUT's folder, then run the same command again",
            ) from error  # fmt: skip
        return False


def _shard(job: Job, shard: Shard, stop: Event) -> Finished:
    name = job.prefix + shard.name + (f"@{job.recipe}" if job.recipe else "")
    path = job.folder / shard.name
    earlier = job.journal.finished.get(name)
    if earlier is not None and path.is_file() and path.stat().st_size == earlier.bytes:
        found = hash_file(path)
        if found.sha256 == earlier.sha256:
            job.progress(shard.data_bytes)
            return found
    temporary = path.with_name(path.name + ".writing")
    with environment_errors(path):
        temporary.unlink(missing_ok=True)
        try:
            linked = shard.unchanged is not None and job.link and _link(job.checkpoint.path(shard.unchanged), temporary)
            digest = _write(job, shard, None if linked else temporary, stop)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        size = temporary.stat().st_size
        temporary.replace(path)
        job.journal.record(Finished(name, size, digest))
    return Finished(shard.name, size, digest)


def _write(job: Job, shard: Shard, path: Path | None, stop: Event) -> str:
    """Write a shard's bytes to `path`, or only look at them where it is None; returns their SHA-256."""
    digest = hashlib.sha256()
    with Path(path or os.devnull).open("wb", buffering=0) as file:
        unsent = 0
        for block in _content(job.checkpoint, shard):
            if stop.is_set():
                raise _StoppedError
            digest.update(block)
            _write_all(file, block)
            unsent += len(block)
            if unsent >= WRITEBACK:
                _send_to_disk(file)
                unsent = 0
            job.progress(len(block))
        if path is not None:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _write_all(file: FileIO, block: memoryview) -> None:
    position = 0
    while position < len(block):
        position += file.write(block[position:])


def _send_to_disk(file: FileIO) -> None:
    """Start writing back what is dirty, and drop what is clean. A hint, which not every system has."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _content(checkpoint: Checkpoint, shard: Shard) -> Iterator[memoryview]:
    """The bytes of a shard, in blocks."""
    yield memoryview(shard.header if shard.unchanged is None else _original_header(checkpoint, shard.unchanged))
    finite = FiniteCheck()
    waiting: dict[int, dict[str, Tensor]] = {}
    uses = Counter((id(v.rewrite), v.key) for v in shard.tensors.values() if isinstance(v, Computed))
    for value in shard.tensors.values():
        if isinstance(value, Stored):
            yield from _stored(checkpoint, value.info, [(value.info.offset, value.info.nbytes)], finite)
        elif isinstance(value, Rows):
            yield from _stored(checkpoint, value.info, value.runs(), finite)
        else:
            block = _computed(checkpoint, value, waiting, uses)
            yield from (block[start : start + BLOCK] for start in range(0, len(block), BLOCK))


def _original_header(checkpoint: Checkpoint, shard: str) -> bytes:
    with reading_errors(checkpoint.path(shard)), checkpoint.path(shard).open("rb") as file:
        return file.read(checkpoint.shards[shard].tensors[0].offset)


def _stored(
    checkpoint: Checkpoint, info: TensorInfo, runs: Iterable[tuple[int, int]], finite: FiniteCheck
) -> Iterator[memoryview]:
    """Byte ranges of a stored tensor, in blocks. Raises CorruptCheckpoint where they hold NaN or infinity."""
    path = checkpoint.path(info.shard)
    with reading_errors(path), path.open("rb", buffering=0) as file:
        for start, length in runs:
            for block in _blocks(file.fileno(), start, length, info.shard):
                if not finite.all_finite(info.dtype, block):
                    raise CorruptCheckpoint(
                        f"tensor {info.name!r} holds NaN or infinity",
                        cause="a model with such weights computes nothing",
                        remedy="download the checkpoint again, or take another base",
                    )
                yield block


def _computed(
    checkpoint: Checkpoint, value: Computed, waiting: dict[int, dict[str, Tensor]], uses: Counter[tuple[int, str]]
) -> memoryview:
    """One output of a rewrite; the group is evaluated at its first use, and each output released after its last."""
    from surgery.checkpoint.evaluate import evaluate, to_bytes

    group, key = id(value.rewrite), value.key
    if group not in waiting:
        waiting[group] = {name: made for name, made in evaluate(checkpoint, value.rewrite).items() if uses[group, name]}
    uses[group, key] -= 1
    held = waiting[group]
    return to_bytes(held[key] if uses[group, key] else held.pop(key))


def _file_blocks(path: Path) -> Iterator[memoryview]:
    """A whole file in blocks; each is overwritten by the next."""
    with reading_errors(path), path.open("rb", buffering=0) as file:
        yield from _blocks(file.fileno(), 0, os.fstat(file.fileno()).st_size, path.name)


def _blocks(descriptor: int, start: int, length: int, name: str) -> Iterator[memoryview]:
    """Consecutive blocks of a byte range; each is overwritten by the next."""
    buffer = memoryview(bytearray(min(BLOCK, length)))
    for position in range(0, length, BLOCK):
        block = buffer[: length - position]
        read_into(descriptor, block, start + position, name)
        yield block


def _link(source: Path, target: Path) -> bool:
    """Make `target` the same bytes without copying: a hard link. False where the file system refuses."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        return False
    return True
