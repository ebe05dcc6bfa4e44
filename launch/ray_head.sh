#!/usr/bin/env bash
# Starts the head of a Ray cluster in the foreground, with token authentication: launch/ray_head.sh --help
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/ray_head.sh [--address IP] [--port N] [--dashboard-port N] [RAY OPTION ...]

Starts the head of a Ray cluster, with its job server and dashboard, in the foreground. Ctrl-C or
SIGTERM ends it and what it started, and nothing else.

  --address IP        where it can be reached (default: PPO_DIST_HEAD_ADDRESS, else 127.0.0.1: from
                      this machine alone). With any other address Ray listens on all interfaces, the
                      job server and dashboard on this one.
  --port N            of the cluster (default: 6379)
  --dashboard-port N  of job server and dashboard (default: 8265)
  RAY OPTION          the rest goes to `ray start`: --num-gpus=4 --temp-dir=/scratch/ray

Whoever joins or submits needs the token: RAY_AUTH_TOKEN, or the file RAY_AUTH_TOKEN_PATH (default
~/.ray/auth_token). A file that is missing is made, for its owner's eyes alone. The environment is
that of launch/setup.sh.

example: launch/ray_head.sh --address 10.0.0.5
END
}

address=${PPO_DIST_HEAD_ADDRESS:-127.0.0.1} port=6379 dashboard_port=8265 rest=()
while [ $# -gt 0 ]; do
  case "$1" in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --address | --port | --dashboard-port)
      [ $# -gt 1 ] || { usage >&2; exit 2; }
      printf -v "$(tr - _ <<< "${1#--}")" %s "$2"
      shift ;;
    *) rest+=("$1") ;;
  esac
  shift
done

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
source "$root/launch/ray.sh"
use_token make
listen_on "$address"
token=${RAY_AUTH_TOKEN_PATH:-}
[ -z "${RAY_AUTH_TOKEN:-}" ] || token="in RAY_AUTH_TOKEN"
cat <<END
ray head      $address:$port
job server    http://$address:$dashboard_port
token         $token
more nodes    launch/ray_worker.sh $address:$port
a run         ppo-dist submit CONFIG --address http://$address:$dashboard_port --follow
END
exec ray start --head --block --node-ip-address "$address" --port "$port" \
  --dashboard-host "$address" --dashboard-port "$dashboard_port" "${resources[@]}" "${rest[@]}"
