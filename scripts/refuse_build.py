"""Build backend that refuses to build: `pip install .` and `pip install -e .` say one sentence and how to go on."""

from typing import NoReturn

_MESSAGE = (
    "rlt-one-gpu is run from its checkout, not installed, because a wheel would put packages named core, data and "
    "models beside everybody else's: run ./launch_mono.sh in the checkout once, and its .venv/bin/python imports it "
    "from any folder (from rlt import train)."
)


def _refuse(*_: object, **__: object) -> NoReturn:
    raise SystemExit(_MESSAGE)


get_requires_for_build_wheel = get_requires_for_build_editable = get_requires_for_build_sdist = _refuse
prepare_metadata_for_build_wheel = prepare_metadata_for_build_editable = _refuse
build_wheel = build_editable = build_sdist = _refuse
