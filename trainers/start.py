"""Start of runs: from composed values to results, for the command line and for Python alike."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from core.imports import importing
from core.log import console, log
from preflight.hardware import check_hardware_and_plan, load_for_this_machine
from schemas.methods import method_of
from schemas.run import resolved_values

if TYPE_CHECKING:
    from runs.summary import FinishedRun


def train_runs(
    composed: Sequence[Mapping[str, Any]],
    on_results: "Callable[[FinishedRun], None]" = lambda finished: None,
    without: Collection[str] = (),
) -> "Iterator[FinishedRun]":
    """Train one run after the other. All are validated, and their `auto` resolved, before the first one starts.

    `on_results` is called as soon as a run's results are written, before its engine is closed: what vLLM does as it
    ends can no longer cost them. `without`: optional packages that no run of this process needs (preflight.unneeded).

    Raises:
        ConfigError, UserError: a run cannot work; nothing of it was loaded or written.
        StoppedError: no memory or no disk was left; the message says what to do and where the run goes on.
        NonFiniteError: a log-prob, reward or loss was not finite.
        KeyboardInterrupt: training was stopped; the message says where it goes on from.
    """
    runs = [(load_for_this_machine(values), values) for values in composed]

    with importing(without):  # takes seconds: not before the settings are checked
        from optimization import optimized
        from trainers.stops import with_faults_explained

    for config, composed_values in runs:
        values = resolved_values(config, dict(composed_values))
        with optimized(config) as config:
            plan, device = check_hardware_and_plan(config)
            with importing(without):  # TRL and vLLM take seconds more, and most mistakes are found without them
                train = method_of(config).train.object
            on_finish = partial(_tell, on_results=on_results)
            run = partial(train, config, values, plan, device, on_finish)
            finished = with_faults_explained(run, config, values, plan)
        yield finished
        console.end_copy()


def _tell(finished: "FinishedRun", on_results: "Callable[[FinishedRun], None]") -> None:
    """Pass the results on, and make the report; a run whose report cannot be made is a finished run all the same."""
    from runs.report.page import write_report

    on_results(finished)
    if not finished.report.has_page:
        return
    try:
        log.info("the report is in %s", write_report([finished.folder]))
    except Exception as error:
        log.warning("no report was made (%s); to make it: python -m runs.report %s", error, finished.folder)
