#!/usr/bin/env bash
# Runs a config on GKE hosts with GPUs (--topology h100-16) or without accelerators (cpu-2); as gke_tpu.sh otherwise.
#
#   launch/gke_gpu.sh --config configs/x.yaml --topology h100-16 --bucket BUCKET --image IMG:TAG --name N [--dry-run]
set -euo pipefail

exec "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/gke_tpu.sh" "$@"
