"""Cache folder of everything that is made once on a machine and used by all runs."""

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """`$RLT_CACHE`, else `$XDG_CACHE_HOME/rlt`, else `~/.cache/rlt`."""
    if "RLT_CACHE" in os.environ:
        return Path(os.environ["RLT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rlt"
