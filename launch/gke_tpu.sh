#!/usr/bin/env bash
# Runs a config on GKE TPU slices, with detached samplers beside them; --dry-run prints the manifests and submits nothing.
#
#   launch/gke_tpu.sh --config configs/x.yaml --topology v5p-64 [--num-slices 2] [--samplers 4 --sampler-topology v5e-4] \
#                     --bucket BUCKET --image IMG:TAG --name N [--spot] [--queue Q] [--dry-run] [section.key=value ...]
#
# All options: launch/gke_tpu.sh --help. How runs end and restart: launch/README.md.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${here}/../.venv/bin/python"
[[ -x "${python}" ]] || python=python3

exec "${python}" "${here}/render.py" "$@"
