#!/usr/bin/env bash
# Runs a config on a GKE TPU slice; --dry-run prints the manifest and submits nothing.
#
#   launch/gke_tpu.sh --config configs/x.yaml --topology v5p-64 [--num-slices 2] [--spot] [--queue Q] \
#                     --image IMG:TAG --name N [--dry-run] [section.key=value ...]
#
# All options: launch/gke_tpu.sh --help. How runs end and restart: launch/README.md.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${here}/../.venv/bin/python"
[[ -x "${python}" ]] || python=python3

exec "${python}" "${here}/render.py" "$@"
