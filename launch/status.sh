#!/usr/bin/env bash
# Shows a job, its restarts, and its pods with their exit codes.
#
#   launch/status.sh NAME [options of kubectl, such as --namespace N]
set -euo pipefail

[[ $# -gt 0 ]] || { echo "usage: launch/status.sh NAME [options of kubectl]" >&2; exit 2; }
name="$1"
shift

columns="POD:.metadata.name,PHASE:.status.phase,NODE:.spec.nodeName"
columns+=",EXIT:.status.containerStatuses[?(@.name=='main')].state.terminated.exitCode"
kubectl get jobset "${name}" "$@"
exec kubectl get pods --selector "jobset.sigs.k8s.io/jobset-name=${name}" --output "custom-columns=${columns}" "$@"
