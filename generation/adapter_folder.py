"""AdapterFolder: where the adapter lies on its way to vLLM."""

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from core.faults import is_disk_full
from core.locks import is_held, try_lock
from core.log import log
from core.units import format_gb

SHARED_MEMORY = Path("/dev/shm")
ADAPTER_FILE = "adapter_model.safetensors"
_PREFIX, _LOCK_FILE = "rlt-adapter-", "lock"
_ROOM = 1.05
"""Of the tensors' bytes: the file's header, the adapter's configuration, blocks that are not full."""


class AdapterFolder:
    """A folder of this process for one adapter: in shared memory while that has room, else in the temporary folder.

    A container's shared memory is often small: Docker's default is 64 MB, and an adapter of rank 32 of a 7B takes 320.
    Folders of processes that were killed are removed as a new one is made: those whose lock nobody holds.
    """

    def __init__(self) -> None:
        try:
            self._open(SHARED_MEMORY)
        except OSError as error:
            self._open(Path(tempfile.gettempdir()))
            log.info("the adapter for vLLM goes to %s (%s: %s)", self.path, SHARED_MEMORY, error.strerror)

    def save(self, tensors: Mapping[str, Tensor]) -> Path:
        """Write the adapter's tensors over the earlier ones; the folder that they now lie in.

        Raises:
            OSError, SafetensorError: the temporary folder has no room either.
        """
        num_bytes = int(_ROOM * sum(tensor.nbytes for tensor in tensors.values()))
        if self._is_in_shared_memory and num_bytes > (room := self._room_bytes()):
            self._leave_shared_memory(f"needs {format_gb(num_bytes)}, and {format_gb(room)} are free there")
        try:
            save_file(dict(tensors), self.path / ADAPTER_FILE)
        except Exception as error:
            if not (self._is_in_shared_memory and is_disk_full(error)):
                raise
            self._leave_shared_memory("found it full")
            save_file(dict(tensors), self.path / ADAPTER_FILE)
        return self.path

    def cleanup(self) -> None:
        """Remove the folder and give its lock back; at the end of the process at the latest."""
        self._remove()
        self._lock.close()

    @property
    def _is_in_shared_memory(self) -> bool:
        return self.path.parent == SHARED_MEMORY

    def _room_bytes(self) -> int:
        """What is free, and what the adapter that is written over takes."""
        earlier = self.path / ADAPTER_FILE
        return shutil.disk_usage(SHARED_MEMORY).free + (earlier.stat().st_size if earlier.exists() else 0)

    def _leave_shared_memory(self, why: str) -> None:
        self.cleanup()
        self._open(Path(tempfile.gettempdir()))
        log.info("the adapter for vLLM %s (%s): it goes to %s", why, SHARED_MEMORY, self.path)

    def _open(self, parent: Path) -> None:
        """Under a name that nobody looks for until the lock is held."""
        remove_leftovers(parent)
        unlocked = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))
        lock = try_lock(unlocked / _LOCK_FILE)
        assert lock is not None, "the folder is new"
        self._lock, self.path = lock, parent / unlocked.name.removeprefix(".")
        unlocked.rename(self.path)
        self._remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Remove what killed processes left in `parent`; what has no lock file is not ours and stays."""
    for lock_file in parent.glob(f"{_PREFIX}*/{_LOCK_FILE}"):
        if not is_held(lock_file):
            shutil.rmtree(lock_file.parent, ignore_errors=True)
