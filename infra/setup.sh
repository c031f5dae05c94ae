#!/usr/bin/env bash
# Builds .venv from the lock and installs the one system package that rendering needs; called by `make setup`.
# pip's own variables (PIP_INDEX_URL, PIP_FIND_LINKS, ...) are honoured: they choose a CPU or a CUDA build of torch.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3.11}"

say() { printf 'setup: %s\n' "$*"; }
fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

apt_install() { # packages...; fails when this user or this machine may not
  command -v apt-get >/dev/null || return 1
  local as_root=()
  if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || return 1
    as_root=(sudo -n)
  fi
  say "installing $* through apt"
  "${as_root[@]}" apt-get update -qq </dev/null >/dev/null || true # an outdated list may still do
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" </dev/null >/dev/null
}

# MuJoCo renders without a display or a GPU through OSMesa; a machine with EGL sets MUJOCO_GL=egl and needs nothing.
if [ "${MUJOCO_GL:-osmesa}" = osmesa ] && ! { PATH="$PATH:/usr/sbin:/sbin" ldconfig -p 2>/dev/null | grep -q 'libOSMesa\.so'; }; then
  apt_install libosmesa6 || fail "libosmesa6 is missing and apt may not be used here; ask an administrator for" \
    "'apt-get install -y --no-install-recommends libosmesa6', or set MUJOCO_GL=egl where there is a GPU driver"
fi
command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || apt_install g++ ||
  fail "no C++ compiler found, DeepSpeed builds one operator with it: install g++ (apt-get install -y g++), or set CXX"
command -v "$python" >/dev/null || fail "$python not found: install Python 3.11, or name it with PYTHON=/path/to/python"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' ||
  fail "$python is $("$python" -V): Python 3.11 or 3.12 is needed, the lock was made with 3.11"

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  say "creating .venv with $("$python" -V)"
  "$python" -m venv --clear .venv || {
    rm -rf .venv
    apt_install "$(basename "$python")-venv" && "$python" -m venv .venv ||
      fail "$python cannot create virtual environments: install its venv package (apt-get install -y python3.11-venv)"
  }
fi
say "installing what constraints.txt locks"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
.venv/bin/python -m pip check
.venv/bin/python infra/check_lock.py constraints.txt
say "building DeepSpeed's operator for this machine, once"
TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.venv/torch_extensions}" DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" \
  PATH="$PWD/.venv/bin:$PATH" .venv/bin/python -c "from upvla.train.zero import build_ops; build_ops()" >/dev/null
