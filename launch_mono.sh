#!/usr/bin/env bash
# ./launch_mono.sh [RUN] [key=value ...]
#   RUN: a run configuration or a pipeline, as NAME, NAME.yaml, NAME.yml or a path; without one the embedded teacher_rlt_tiny.
# The first call makes .venv and installs what this machine can use; later calls start at once.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

usage() {
    sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    echo "Run configurations and pipelines:"
    for file in "$root"/cfgs/run_cfg/*.yaml "$root"/cfgs/pipeline_cfg/*.yaml; do
        printf '  %-36s %s\n' "$(basename "$file" .yaml)" "$(sed -n 's/^# \.\/launch_mono.sh[^ ]* *[a-z0-9_]*  *//p' "$file" | head -n 1)"
    done
}

run=teacher_rlt_tiny
case "${1-}" in
    -h | --help) usage; exit 0 ;;
    "" | *=* | -*) ;;
    *) run="$(basename "$1")"; run="${run%.yaml}"; run="${run%.yml}"; shift ;;
esac
if [ ! -f "$root/cfgs/run_cfg/$run.yaml" ] && [ ! -f "$root/cfgs/pipeline_cfg/$run.yaml" ]; then
    { echo "'$run' is neither a run configuration nor a pipeline."; usage; } >&2
    exit 2
fi
"${PYTHON:-python3}" "$root/scripts/setup_env.py"
exec "$root/.venv/bin/python" "$root/train.py" --config-name="$run" "$@"
