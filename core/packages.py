"""Installed packages, looked up without importing them."""

import importlib.util


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
