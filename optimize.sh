#!/usr/bin/env bash
# ./optimize.sh [FLAGS] [RUN] [key=value ...]    what makes a run faster, smaller or sturdier; --help lists the flags.
# The first call makes .venv and installs what this machine can use; later calls start at once.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
"${PYTHON:-python3}" "$root/scripts/setup_env.py"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$root/.venv/bin/python" -m optimization.cli "$@"
