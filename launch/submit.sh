#!/usr/bin/env bash
# Installs, then sends a run to a Ray cluster: launch/submit.sh CONFIG … is `ppo-dist submit CONFIG …`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec ppo-dist submit "$@"
