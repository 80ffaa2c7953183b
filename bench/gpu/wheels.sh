#!/usr/bin/env bash
# Collects in bench/gpu/wheels what run.sh needs on a machine without a network (Linux, x86-64). Run it once, with a network.
#   bash bench/gpu/wheels.sh [PYTHON_VERSION]     of that machine's Python; 3.12 if not given
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
version=${1:-3.12}
wheels=bench/gpu/wheels
rm -rf "$wheels"
mkdir -p "$wheels"
pip=("$python" -m pip --disable-pip-version-check)
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux_2_12 manylinux2010 manylinux1; do
  platforms+=(--platform "${tag}_x86_64")
done
"${pip[@]}" download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
  "${platforms[@]}" --constraint constraints.txt --requirement bench/gpu/requirements.txt --dest "$wheels"
DS_BUILD_OPS=0 "${pip[@]}" wheel --quiet --no-deps --constraint constraints.txt deepspeed --wheel-dir "$wheels"
du -sh "$wheels"
