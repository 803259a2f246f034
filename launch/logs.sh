#!/usr/bin/env bash
# Follows the logs of a job's pods: those of the trainer, or of the samplers.
#
#   launch/logs.sh NAME [trainer|sampler] [options of kubectl, such as --namespace N]
set -euo pipefail

[[ $# -gt 0 ]] || { echo "usage: launch/logs.sh NAME [trainer|sampler] [options of kubectl]" >&2; exit 2; }
name="$1"
shift
role=trainer
case "${1:-}" in trainer | sampler) role="$1" && shift ;; esac

labels="jobset.sigs.k8s.io/jobset-name=${name},jobset.sigs.k8s.io/replicatedjob-name=${role}"
exec kubectl logs --follow --prefix --max-log-requests 100 --container main --selector "${labels}" "$@"
