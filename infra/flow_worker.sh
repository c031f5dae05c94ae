#!/usr/bin/env bash
# A Prefect worker that is a Ray node too, one without cores: what a flow hands to Ray it hands to the node among the
# processes beside it, and Ray looks nowhere else. A node that ends, as when Ray's head was restarted, joins again; the
# worker and its flow runs stay.
#   RAY_ADDRESS=ray-head:6379 infra/flow_worker.sh [options of `ray start`]
# Whether it lives: the worker says so on :8080/health, the node on :52365/api/local_raylet_healthz.
set -euo pipefail

if [[ "${PREFECT_API_URL:-}" == http://* && -z "${PREFECT_API_SSL_CERT_FILE:-}" ]]; then
  # each of Prefect's clients reads this file even where it speaks plain HTTP: with all 140 authorities 0.7 MB that are
  # collected late
  PREFECT_API_SSL_CERT_FILE="$(mktemp)"
  export PREFECT_API_SSL_CERT_FILE
  sed '/-END CERTIFICATE-/q' "$(python -m certifi)" >"$PREFECT_API_SSL_CERT_FILE"
fi

while true; do
  ray start --address="$RAY_ADDRESS" --num-cpus=0 --num-gpus=0 --block --disable-usage-stats "$@" || true
  sleep 2
done &
exec prefect worker start --pool local --type process --name "$HOSTNAME" --limit 4 --install-policy never --with-healthcheck
