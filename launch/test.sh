#!/usr/bin/env bash
# Installs, then runs the checks and the tests. Arguments go to pytest: launch/test.sh -m slow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
