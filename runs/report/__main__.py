"""Make a report of one run, or of several side by side; also while a run is going on. No torch, seconds.

python -m runs.report results/A                     writes results/A/report.html
python -m runs.report results/A results/B           writes report.html here: curves over each other, differences
"""

import argparse
import sys
from pathlib import Path

from core.errors import UserError
from core.log import configure_logging, console, log
from runs.report.page import write_report


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m runs.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the page")
    arguments = parser.parse_args(words)
    configure_logging()
    try:
        output = write_report(arguments.runs, arguments.output)
    except UserError as error:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 2
    log.info("the report is in %s (%.1f MB)", output, output.stat().st_size / 1e6)
    return 0


if __name__ == "__main__":
    sys.exit(main())
