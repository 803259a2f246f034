#!/usr/bin/env bash
# Runs a config on a Cloud TPU VM (v5litepod-4) or a slice of them (v5p-64), without Kubernetes, by queued resources.
#
#   launch/tpu_vm.sh create NAME --zone Z --type v5litepod-16 --version v2-alpha-tpuv5-lite [--spot]
#   launch/tpu_vm.sh setup  NAME --zone Z                     installs the package on every host
#   launch/tpu_vm.sh run    NAME --zone Z --config C [section.key=value ...]
#   launch/tpu_vm.sh delete NAME --zone Z
#
# --dry-run prints the commands. The config travels with the files that it reaches; run.dir has to be a folder that all
# hosts see. --type and --version are Google's own names (gcloud compute tpus accelerator-types list, ... versions list).
set -euo pipefail

usage() {
  sed -n '2,10p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${here}/../.venv/bin/python"
[[ -x "${python}" ]] || python=python3

[[ $# -ge 2 ]] || usage
action="$1" name="$2"
shift 2
zone="" type="" version="" config="" dry_run="" spot=()
overrides=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    --zone | --type | --version | --config)
      [[ $# -ge 2 ]] || usage
      declare "${1#--}=$2"
      shift
      ;;
    --spot) spot=(--spot) ;;
    --dry-run) dry_run=1 ;;
    *=*) overrides+=("$1") ;;
    *) usage ;;
  esac
  shift
done
[[ -n "${zone}" ]] || usage

do_it() {
  if [[ -n "${dry_run}" ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_all_hosts() {
  do_it gcloud compute tpus tpu-vm ssh "${name}" --zone "${zone}" --worker all --command "$1"
}

copy() { # SOURCE TARGET, which is replaced
  on_all_hosts "rm -rf $2"
  do_it gcloud compute tpus tpu-vm scp --recurse --zone "${zone}" --worker all "$1" "${name}:$2"
}

case "${action}" in
  create)
    [[ -n "${type}" && -n "${version}" ]] || usage
    do_it gcloud compute tpus queued-resources create "${name}" --node-id "${name}" --zone "${zone}" \
      --accelerator-type "${type}" --runtime-version "${version}" "${spot[@]}"
    do_it gcloud compute tpus queued-resources describe "${name}" --zone "${zone}" --format 'value(state.state)'
    ;;
  setup)
    packed="$(mktemp -d)"
    trap 'rm -rf "${packed}"' EXIT
    do_it "${python}" -m pip wheel --quiet --no-deps --wheel-dir "${packed}" "${here}/.."
    do_it cp "${here}/../requirements.txt" "${packed}"
    copy "${packed}" oapl_package
    on_all_hosts "python3 -m venv oapl && oapl/bin/pip install --quiet -c oapl_package/requirements.txt \
\"\$(ls oapl_package/oapl_jax-*.whl)[tpu,data,gcs]\""
    ;;
  run)
    [[ -n "${config}" ]] || usage
    packed="$(mktemp -d)"
    trap 'rm -rf "${packed}"' EXIT
    "${python}" "${here}/bundle.py" --config "${config}" --out "${packed}" --at "oapl_config" "${overrides[@]}"
    copy "${packed}" oapl_config
    on_all_hosts "oapl/bin/oapl-jax train --config oapl_config/config.yaml --coordinator auto"
    ;;
  delete)
    do_it gcloud compute tpus queued-resources delete "${name}" --zone "${zone}" --force --quiet
    ;;
  *) usage ;;
esac
