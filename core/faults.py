"""What a run meets that is no mistake of its own: no memory left, no disk left. Told by what is raised, in one place.

Libraries raise the same fault in many ways: torch's allocators, CUDA's driver, vLLM, safetensors, torch's zip writer
and pyarrow each have words of their own. No library is imported here: errors are told by kind, number and text.
"""

import errno
from collections.abc import Iterator
from dataclasses import dataclass

from core.errors import UserError
from core.types import Phase

_MEMORY_TEXTS = (
    "out of memory",  # torch, CUDA's driver, vLLM's allocator
    "can't allocate memory",  # torch's CPU allocator
    "cannot allocate memory",
    "_status_alloc_failed",  # cuBLAS, cuDNN
    "no available memory for the cache blocks",  # vLLM as it starts
    "less than desired gpu memory utilization",
)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DISK_FAULTS = {
    "a disk is full": _FULL,
    "a disk is read-only": {errno.EROFS},
    "access is denied": {errno.EACCES, errno.EPERM},
    "a disk does not answer": {errno.EIO, errno.ESTALE, errno.ENODEV},
}
_DISK_TEXTS = {
    "no space left on device": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "file too large": errno.EFBIG,
    "read-only file system": errno.EROFS,
    "pytorchstreamwriter failed": errno.ENOSPC,  # torch.save hides what the system said
    "unexpected pos": errno.ENOSPC,  # the same, as the file is closed
    "input/output error": errno.EIO,
}


@dataclass(frozen=True, slots=True)
class FailedPhase:
    """Where a run was when an error was raised."""

    phase: Phase
    measured_bytes: int
    """Peak of that phase up to the error."""
    num_retries: int
    """How often its work had been repeated with less at once; 0: this is no such work."""


def note_phase(error: BaseException, phase: Phase, measured_bytes: int, num_retries: int = 0) -> None:
    """Let an error remember the phase that it was raised in; the innermost one is kept."""
    if phase_of(error) is None:
        error.__dict__["failed_phase"] = FailedPhase(phase, measured_bytes, num_retries)


def phase_of(error: BaseException) -> FailedPhase | None:
    return error.__dict__.get("failed_phase")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the GPU or of the host, was asked for in vain."""
    for cause in _with_causes(error):
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return True
        if isinstance(cause, OSError) and cause.errno == errno.ENOMEM:
            return True
        is_library = isinstance(cause, RuntimeError | ValueError) and not isinstance(cause, UserError)
        if is_library and any(text in str(cause).lower() for text in _MEMORY_TEXTS):
            return True
    return False


def is_disk_full(error: BaseException) -> bool:
    return _disk_errno(error) in _FULL


def disk_fault(error: BaseException) -> str | None:
    """What is wrong with the disk, in words with the file where it is known; None where the error is another one."""
    number = _disk_errno(error)
    if number is None:
        return None
    what = next(words for words, numbers in _DISK_FAULTS.items() if number in numbers)
    names = (getattr(cause, "filename", None) for cause in _with_causes(error))
    where = next((f" ({name})" for name in names if name), "")
    return f"{what}{where}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of an error, shortened."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."


def _disk_errno(error: BaseException) -> int | None:
    for cause in _with_causes(error):
        if isinstance(cause, UserError):
            continue
        if isinstance(cause, OSError) and cause.errno in set().union(*_DISK_FAULTS.values()):
            return cause.errno
        # tokenizers raises plain `Exception`s
        if isinstance(cause, OSError | RuntimeError) or type(cause).__name__ in ("SafetensorError", "Exception"):
            text = str(cause).lower()
            if (number := next((number for words, number in _DISK_TEXTS.items() if words in text), None)) is not None:
                return number
    return None


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and what it was raised while handling."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
