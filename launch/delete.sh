#!/usr/bin/env bash
# Stops a job and removes what was made for it. Its run directory stays.
#
#   launch/delete.sh NAME [options of kubectl, such as --namespace N]
set -euo pipefail

name="${1:?usage: launch/delete.sh NAME [options of kubectl]}"
shift

exec kubectl delete --ignore-not-found "jobset/${name}" "configmap/${name}" "networkpolicy/${name}" "$@"
