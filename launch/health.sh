#!/usr/bin/env bash
# Whether this container is well: its Ray node answers, or, where there is none, the package can be used.
# PPO_DIST_AGENT_PORT: the node's --dashboard-agent-listen-port, if it is not Ray's default.
set -euo pipefail
if grep --quiet --line-regexp raylet /proc/[0-9]*/comm 2> /dev/null; then
  exec python - "${PPO_DIST_AGENT_PORT:-52365}" <<'END'
import sys, urllib.request
urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/api/local_raylet_healthz", timeout=10)
END
fi
exec python -c 'import ppo_dist.config'
