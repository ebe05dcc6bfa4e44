#!/usr/bin/env bash
# Installs, then measures whole iterations: launch/bench.sh [W1 W2 W3 W4 W5] [--model FOLDER]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
exec python -m tests.bench "$@"
