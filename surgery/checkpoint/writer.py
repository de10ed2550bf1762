"""Writing shards: byte ranges are copied, rewrites evaluated, hashes taken on the way; memory is bounded.

A shard is written under a temporary name, synced, renamed and then journalled, in this order, so that whatever the
journal names is complete on disk.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Literal

from surgery.checkpoint.expressions import Rewrite, Stored, Value
from surgery.checkpoint.finite import FiniteCheck
from surgery.checkpoint.header import TensorInfo
from surgery.checkpoint.journal import Finished, Journal, sync_folder
from surgery.checkpoint.layout import Shard
from surgery.checkpoint.reader import Checkpoint
from surgery.errors import CorruptCheckpoint, DiskFull, EnvironmentFailure

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4 << 20
Progress = Callable[[int], None]


class _Stopped(Exception):
    """Another shard failed; its error is the one to tell."""


@dataclass(frozen=True, slots=True)
class Job:
    """Where and how shards are written. `prefix` is the folder's name relative to the journal's folder."""

    checkpoint: Checkpoint
    folder: Path
    prefix: str
    journal: Journal
    workers: int = 2
    link: bool = False
    progress: Progress = lambda count: None


def write_shards(job: Job, shards: tuple[Shard, ...]) -> dict[str, Finished]:
    """Write all shards that the journal does not vouch for; returns every shard's size and hash.

    Raises what reading, evaluating and writing raise; DiskFull where the disk ran out.
    """
    stop = Event()
    with ThreadPoolExecutor(max_workers=job.workers, thread_name_prefix="surgery-write") as pool:
        futures = [pool.submit(_shard, job, shard, stop) for shard in shards]
        try:
            done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
            finished = [future.result() for future in done]
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
        finished += [future.result() for future in waiting]
    sync_folder(job.folder)
    return {file.file.removeprefix(job.prefix): file for file in finished}


def write_file(path: Path, content: bytes) -> Finished:
    """Write a small file durably."""
    with environment_errors(path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return Finished(path.name, len(content), hashlib.sha256(content).hexdigest())


def hash_file(path: Path) -> Finished:
    """Size and SHA-256 of a file, read in blocks."""
    digest, count = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        for block in _blocks(file.fileno(), 0, os.fstat(file.fileno()).st_size, path.name):
            digest.update(block)
            count += len(block)
    return Finished(path.name, count, digest.hexdigest())


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
    name = job.prefix + shard.name
    path = job.folder / shard.name
    earlier = job.journal.finished.get(name)
    if earlier is not None and path.is_file() and path.stat().st_size == earlier.bytes:
        found = hash_file(path)
        if found.sha256 == earlier.sha256:
            job.progress(shard.data_bytes)
            return earlier
    temporary = path.with_name(path.name + ".writing")
    temporary.unlink(missing_ok=True)
    linked = shard.unchanged is not None and job.link and _link(job.checkpoint.path(shard.unchanged), temporary)
    digest = _write(job, shard, None if linked else temporary, stop)
    with environment_errors(path):
        size = temporary.stat().st_size
        temporary.replace(path)
    finished = Finished(name, size, digest)
    job.journal.record(finished)
    return finished


def _write(job: Job, shard: Shard, path: Path | None, stop: Event) -> str:
    """Write a shard's bytes to `path`, or only look at them where it is None; returns their SHA-256."""
    digest = hashlib.sha256()
    with environment_errors(job.folder / shard.name), open(path or os.devnull, "wb", buffering=0) as file:
        for block in _content(job.checkpoint, shard):
            if stop.is_set():
                raise _Stopped
            digest.update(block)
            position = 0
            while position < len(block):
                position += file.write(block[position:])
            job.progress(len(block))
        if path is not None:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _content(checkpoint: Checkpoint, shard: Shard) -> Iterator[memoryview]:
    """The bytes of a shard, in blocks."""
    yield memoryview(shard.header if shard.unchanged is None else _original_header(checkpoint, shard.unchanged))
    finite = FiniteCheck()
    waiting: dict[int, tuple[Mapping[str, Tensor], set[str]]] = {}
    for value in shard.tensors.values():
        if isinstance(value, Stored):
            yield from _stored(checkpoint, value.info, finite)
        else:
            yield _computed(checkpoint, value.rewrite, value.key, waiting)


def _original_header(checkpoint: Checkpoint, shard: str) -> bytes:
    with checkpoint.path(shard).open("rb") as file:
        return file.read(checkpoint.shards[shard].tensors[0].offset)


def _stored(checkpoint: Checkpoint, info: TensorInfo, finite: FiniteCheck) -> Iterator[memoryview]:
    with checkpoint.path(info.shard).open("rb", buffering=0) as file:
        for block in _blocks(file.fileno(), info.offset, info.nbytes, info.shard):
            if not finite.all_finite(info.dtype, block):
                raise CorruptCheckpoint(
                    f"tensor {info.name!r} holds NaN or infinity", cause="a model with such weights computes nothing",
                    remedy="download the checkpoint again, or take another base",
                )  # fmt: skip
            yield block


def _computed(
    checkpoint: Checkpoint, rewrite: Rewrite, key: str, waiting: dict[int, tuple[Mapping[str, Tensor], set[str]]]
) -> memoryview:
    """One output of a rewrite; the group is evaluated at its first output and released after its last."""
    from surgery.checkpoint.evaluate import evaluate, to_bytes

    if id(rewrite) not in waiting:
        waiting[id(rewrite)] = evaluate(checkpoint, rewrite), set(rewrite.outputs)
    outputs, left = waiting[id(rewrite)]
    left.discard(key)
    if not left:
        del waiting[id(rewrite)]
    return to_bytes(outputs[key])


def _blocks(descriptor: int, start: int, length: int, name: str) -> Iterator[memoryview]:
    """Consecutive blocks of a byte range; each is overwritten by the next."""
    buffer = memoryview(bytearray(min(BLOCK, length)))
    position = 0
    while position < length:
        wanted = min(BLOCK, length - position)
        filled = 0
        while filled < wanted:
            count = os.preadv(descriptor, [buffer[filled:wanted]], start + position + filled)
            if count == 0:
                raise CorruptCheckpoint(
                    f"{name} became shorter while it was read", cause=f"it ends before byte {start + length}",
                    remedy="do not change the base during a conversion; start again",
                )  # fmt: skip
            filled += count
        yield buffer[:wanted]
        position += wanted


def _link(source: Path, target: Path) -> bool:
    """Make `target` the same bytes without copying: a hard link. False where the file system refuses."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        return False
    return True
