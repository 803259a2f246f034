#!/usr/bin/env bash
# Stops a job and removes what was made for it. Its run directory stays.
#
#   launch/delete.sh NAME [options of kubectl, such as --namespace N]
set -euo pipefail

[[ $# -gt 0 ]] || { echo "usage: launch/delete.sh NAME [options of kubectl]" >&2; exit 2; }
name="$1"
shift

exec kubectl delete --ignore-not-found "jobset/${name}" "configmap/${name}" "networkpolicy/${name}" "$@"
