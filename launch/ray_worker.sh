#!/usr/bin/env bash
# Joins this machine to a Ray cluster, in the foreground: launch/ray_worker.sh --help
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/ray_worker.sh [HEAD:PORT] [--wait SECONDS] [RAY OPTION ...]

Joins this machine to the Ray cluster of launch/ray_head.sh, in the foreground. Ctrl-C or SIGTERM
ends what it started, and nothing else; it ends by itself when the head is gone.

  HEAD:PORT       the head (default: PPO_DIST_HEAD_ADDRESS, port 6379)
  --wait SECONDS  how long to wait for the head (default: 120)
  RAY OPTION      the rest goes to `ray start`: --num-gpus=4 --node-ip-address=10.0.0.6

It needs the head's token: RAY_AUTH_TOKEN, or the file RAY_AUTH_TOKEN_PATH (default
~/.ray/auth_token). The environment is that of launch/setup.sh.

example: launch/ray_worker.sh 10.0.0.5:6379
END
}

head=${PPO_DIST_HEAD_ADDRESS:-} wait=120 rest=()
case "${1:--}" in
  -*) ;;
  *) head=$1; shift ;;
esac
while [ $# -gt 0 ]; do
  case "$1" in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --wait)
      [ $# -gt 1 ] || { usage >&2; exit 2; }
      wait=$2
      shift ;;
    *) rest+=("$1") ;;
  esac
  shift
done
[ -n "$head" ] || { usage >&2; exit 2; }
case "$head" in *:*) ;; *) head=$head:6379 ;; esac

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
source "$root/launch/ray.sh"
use_token find
listen_on "${head%:*}"
SECONDS=0 # an installation does not count
until ray health-check --address "$head" > /dev/null 2>&1; do
  [ "$SECONDS" -lt "$wait" ] || die "$head: no Ray head answers after $wait s, or the token is not its own (RAY_AUTH_TOKEN)"
  sleep 1
done
exec ray start --block --address "$head" "${resources[@]}" "${rest[@]}"
