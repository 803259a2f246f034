#!/usr/bin/env bash
# The processes of a JobSet on this machine's CPU: two trainers and two detached samplers of the toy model. A sampler is
# killed and a trainer gets SIGTERM; the manifest's rules decide what is started again; the finished run is audited.
#
#   launch/local_sim.sh [--out FOLDER] [section.key=value ...]
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${here}/../.venv/bin/python"
[[ -x "${python}" ]] || python=python3

exec "${python}" "${here}/local_sim.py" "$@"
