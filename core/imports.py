"""Imports of large packages: without garbage collection meanwhile, and without packages that they look for in vain.

torch, transformers, TRL and vLLM make some million objects while they are imported. Python's collector walks through
all of them time and again and finds nothing: a fifth of the seconds.
"""

import atexit
import functools
import gc
import importlib.metadata
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager


@contextmanager
def importing(without: Collection[str] = ()) -> Iterator[None]:
    """Within it large packages are imported; afterwards the collector passes over what they made, which stays anyhow.

    Packages `without` count as not installed meanwhile, unless they are loaded already: for optional ones alone, that
    nothing in this process needs later.
    """
    num_modules, was_enabled = len(sys.modules), gc.isenabled()
    list_distributions = importlib.metadata.packages_distributions
    hidden = [name for name in without if name not in sys.modules]
    gc.disable()
    # Every file of the environment is looked at: transformers does that, and TRL again.
    importlib.metadata.packages_distributions = functools.cache(list_distributions)
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # None: the import system's mark for "not there"
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        importlib.metadata.packages_distributions = list_distributions
        if len(sys.modules) > num_modules:
            gc.freeze()
            atexit.register(gc.unfreeze)  # else nanobind takes what is still there at the exit for leaks, and says so
        if was_enabled:
            gc.enable()
