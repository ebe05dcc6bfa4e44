# shellcheck shell=bash
# Sourced by the scripts that start a part of a Ray cluster, after setup.sh.

die() { echo "${0##*/}: $*" >&2; exit 2; }

# What is common to every node: token authentication, nothing reported to anybody, no environment in logs (at level
# info Ray's runtime-env agent writes down the environment of every job, values included).
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_LOGGER_LEVEL=${RAY_LOGGER_LEVEL:-warning}
# of calls the head keeps 3 KB each for its dashboard, of actors and processes that ended hundreds, 100,000 of each if
# nobody says so
export RAY_task_events_max_num_task_in_gcs=${RAY_task_events_max_num_task_in_gcs:-10000}
export RAY_maximum_gcs_destroyed_actor_cached_count=${RAY_maximum_gcs_destroyed_actor_cached_count:-100}
export RAY_maximum_gcs_dead_worker_cached_count=${RAY_maximum_gcs_dead_worker_cached_count:-100}

# use_token make|find: the token of RAY_AUTH_TOKEN, or of a file that only its owner reads; `make` writes the file
# where there is none.
use_token() {
  [ -z "${RAY_AUTH_TOKEN:-}" ] || return 0
  export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
  if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
    [ "$1" = make ] || die "no token: set RAY_AUTH_TOKEN, or copy the head's token file to $RAY_AUTH_TOKEN_PATH"
    mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
    rm -f "$RAY_AUTH_TOKEN_PATH"
    (umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH")
  fi
  chmod 600 "$RAY_AUTH_TOKEN_PATH" 2> /dev/null || true # where it is mounted it is as it is
}

# listen_on IP: Ray's own processes listen on this machine alone, if that is what IP is. They take 127.0.0.1 for the
# machine's outer address unless they are told that there are no other machines.
listen_on() {
  case "$1" in
    127.0.0.1 | localhost) export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 ;;
  esac
}

# Within a step of Slurm a node has what the step was given (Ray itself sees the GPUs): of the memory 3/10 for Ray's
# objects, as much as /dev/shm has for them, like Ray does with a whole machine's.
resources=()
if [ -n "${SLURM_STEP_ID:-}" ]; then
  resources+=(--num-cpus "$SLURM_CPUS_ON_NODE")
  memory_mb=${SLURM_MEM_PER_NODE:-$((${SLURM_MEM_PER_CPU:-0} * SLURM_CPUS_ON_NODE))}
  if [ "$memory_mb" -gt 0 ]; then
    objects_mb=$((memory_mb * 3 / 10)) shm_mb=$(($(df --output=avail --block-size=1M /dev/shm | tail -n 1) * 9 / 10))
    [ "$objects_mb" -le "$shm_mb" ] || objects_mb=$shm_mb
    [ "$objects_mb" -lt 75 ] || # Ray takes no less
      resources+=(--memory $(((memory_mb - objects_mb) << 20)) --object-store-memory $((objects_mb << 20)))
  fi
fi
