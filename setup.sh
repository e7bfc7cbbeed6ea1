#!/usr/bin/env bash
# Make .venv ready for this checkout: the GPU build where the machine has an NVIDIA GPU, else the CPU build. Does nothing if it is ready.
set -euo pipefail
cd "$(dirname "$0")"

fail() { echo "setup: $*" >&2; exit 1; }
python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "no $python found; install Python 3.11 or 3.12, or set PYTHON=/path/to/python"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' ||
    fail "needs Python 3.11 or 3.12, got $("$python" --version); set PYTHON=/path/to/python"
"$python" -c 'import venv, ensurepip' 2>/dev/null || fail "$python has no venv module; install it (on Debian: apt-get install python3-venv)"

extra=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then extra=gpu; fi
ready=.venv/.ready
wanted="$extra $(sha256sum pyproject.toml setup.sh | sha256sum | cut -c1-16)"
[ -f "$ready" ] && [ "$(cat "$ready")" = "$wanted" ] && exit 0

echo "setup: installing the $extra build into .venv"
rm -f "$ready"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
# uv does not read pip's settings: hand it the folders of wheels and the index that pip was given.
links=$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)
links=${PIP_FIND_LINKS:-$links}
if [ -n "$links" ]; then export UV_FIND_LINKS=${links// /,}; fi
index=$(.venv/bin/python -m pip config get global.index-url 2>/dev/null || true)
index=${PIP_INDEX_URL:-$index}
if [ -n "$index" ]; then export UV_DEFAULT_INDEX=$index; fi
if [ "$extra" = gpu ]; then
    export UV_TORCH_BACKEND=${UV_TORCH_BACKEND:-auto}
elif ! compgen -G "${links%% *}/torch-*cpu*.whl" >/dev/null; then
    export UV_TORCH_BACKEND=${UV_TORCH_BACKEND:-cpu}
fi
.venv/bin/uv pip install --quiet --python .venv/bin/python "setuptools>=77" wheel
# Compiled once and now: images often set PYTHONDONTWRITEBYTECODE, and then each role's process would compile torch, vllm ... again.
.venv/bin/uv pip install --compile-bytecode --python .venv/bin/python -e ".[$extra,dev]"
.venv/bin/causalrm-ray doctor
echo "$wanted" >"$ready"
