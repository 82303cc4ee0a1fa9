#!/usr/bin/env bash
# Starts webhookd's replicas behind nginx, or scales them to WEBHOOK_API_REPLICAS.
set -euo pipefail

usage="usage: $0 [--pull | --status | --logs | --stop]"
directory=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
wait_s=${WEBHOOK_START_TIMEOUT:-120}

fail() {
  echo "$0: $*" >&2
  exit 1
}

compose() {
  local files=(--file "$directory/docker-compose.yml")
  [[ ! -f $directory/../.env ]] || files+=(--env-file "$directory/../.env")
  docker compose "${files[@]}" "$@"
}

# make_secret NAME: create a random value, unless the file has one. The containers' users must be able to read the
# file; its directory keeps out all others.
make_secret() {
  local file=$directory/secrets/$1
  [[ -s $file ]] || od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$file"
  chmod 644 "$file"
}

make_secrets() {
  mkdir -p "$directory/secrets"
  chmod 700 "$directory/secrets"
  make_secret webhook_secret
  make_secret webhook_token
}

# start OPTION: with an image that was built from this checkout (--build), or pulled (--no-build).
start() {
  make_secrets
  compose up --detach "$1" --wait --wait-timeout "$wait_s" webhook-api nginx ||
    fail "not healthy within $wait_s s: see $0 --logs"
  local address
  address=$(compose port nginx 3000)
  address=${address/#0.0.0.0:/127.0.0.1:}
  echo "$(compose ps --quiet webhook-api | wc -l) replicas accept webhooks on http://$address/webhook/chatwoot"
  echo "If Chatwoot signs: put its signing secret into $directory/secrets/webhook_secret, and restart."
  echo "If not: add ?token=… to the URL, with the token in $directory/secrets/webhook_token."
}

command -v docker >/dev/null || fail "docker is not installed"
docker compose version >/dev/null 2>&1 || fail "docker compose is not installed"

case ${1:-} in
  "") start --build ;;
  --pull) compose pull webhook-api && start --no-build ;;
  --status) compose ps ;;
  --logs) compose logs --follow --tail 100 ;;
  # Events that the replicas cannot drain in time stay in the spool's volume.
  --stop) compose down ;;
  -h | --help) echo "$usage" ;;
  *) fail "$usage" ;;
esac
