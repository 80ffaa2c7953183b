#!/usr/bin/env bash
# The whole GPU bench in one call, under 10 minutes on one H200; needs no network and changes nothing on the machine.
#   bash bench/gpu/run.sh [--part checks|speed] [--sizes 125m,350m,1.3b] [--minutes 9.5] [--out FOLDER]
#   bash bench/gpu/run.sh --device cpu --tiny     a dry run without a GPU
# The machine's own Python must have torch. What else is missing comes from bench/gpu/wheels (wheels.sh fills it).
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mapfile -t missing < <("$python" - bench/gpu/wheels <<'PYTHON'
import pathlib, re, sys
from importlib.metadata import distributions

plain = lambda name: re.sub(r"[-_.]+", "-", name).lower()
there = {plain(d.metadata["Name"]) for d in distributions() if d.metadata["Name"]}
for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    if plain(wheel.name.split("-")[0]) not in there:
        print(wheel)
PYTHON
)
if [ "${#missing[@]}" -gt 0 ]; then
  echo "installing for this call only: ${missing[*]##*/}"
  "$python" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-compile --no-cache-dir \
    --target "$site" "${missing[@]}"
fi
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}" DS_BUILD_OPS=0
"$python" -m bench.gpu.run "$@"
