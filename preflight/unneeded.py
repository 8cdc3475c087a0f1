"""Optional packages that the libraries import where they are installed, and that none of a process's runs needs."""

from collections.abc import Iterable, Mapping
from typing import Any

_LOGGERS = ("comet_ml", "mlflow", "trackio", "wandb")


def unneeded_packages(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Loggers that no `report_to` names, vLLM where no run can use it, and what vLLM would trace its requests with.

    For `core.imports.importing`, in a process that has these composed (not yet validated) runs and no others.
    """
    runs = list(runs)
    named = {name for values in runs for name in _names(values.get("report_to"))}
    packages = [logger for logger in _LOGGERS if logger not in named and "all" not in named]
    if not named - {"none"}:
        packages.append("opentelemetry")
    if all(values.get("generator") == "transformers" and not values.get("use_vllm_server") for values in runs):
        packages.append("vllm")
    return packages


def _names(report_to: Any) -> list[str]:
    return report_to if isinstance(report_to, list) else [str(report_to).lower()]
