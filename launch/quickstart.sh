#!/usr/bin/env bash
# Installs, trains the quick-start config and its supervised-only control, and prints both.
# Arguments are passed on as overrides of both runs: launch/quickstart.sh run.seed=1
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
exec python -m ppo_dist.study.quickstart "$@"
