#!/usr/bin/env bash
# Gathers what re2tal needs on a GPU machine that has no network, but torch and transformers with all that they need:
# wheels for Python 3.12 on x86-64 Linux, in the versions of requirements.txt.
#
#     bash launch/gather_wheels.sh OUT          on a machine with a network; copy OUT over
#
# Prints the command that installs them there. It installs nothing but these: torch and numpy stay as they are.
# Not among them is matplotlib, for charts alone.
set -euo pipefail

if [[ $# != 1 || "$1" == -* ]]; then
    echo "usage: bash launch/gather_wheels.sh OUT" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
pip=("${PYTHON:-python}" -m pip --disable-pip-version-check --quiet --quiet)

pinned() {
    local name
    for name; do
        grep "^$name==" requirements.txt || { echo "requirements.txt pins no $name" >&2; return 1; }
    done
}

# What each of the pinned ones needs beyond torch, numpy and transformers, line by line.
direct=$(pinned accelerate webdataset decord av pydantic tyro rich tensorboard pytest pytest-timeout)
mapfile -t wheels <<<"$direct"
wheels+=(
    einops hjson msgpack ninja psutil py-cpuinfo # deepspeed
    braceexpand                                  # webdataset
    annotated-types pydantic-core typing-inspection typing-extensions # pydantic
    docstring-parser typeguard # tyro
    markdown-it-py mdurl # rich
    absl-py protobuf # tensorboard, to write its files; what shows them needs more
    iniconfig pluggy pygments # pytest
)
# pydantic and its core fit each other exactly: the one asks for a version of the other.
core=$("${pip[@]}" install --dry-run --ignore-installed --report - "$(pinned pydantic)" |
    "${PYTHON:-python}" -c 'import json, sys
for one in json.load(sys.stdin)["install"]:
    if one["metadata"]["name"].replace("_", "-") == "pydantic-core": print(one["metadata"]["version"])')
wheels=("${wheels[@]/#pydantic-core/pydantic-core==$core}")

platforms=()
for libc in 2_28 2_27 2_24 2_17 2014; do
    platforms+=(--platform "manylinux${libc/#2_/_2_}_x86_64")
done
"${pip[@]}" download --no-deps --only-binary :all: --dest "$out" \
    --implementation cp --python-version 3.12 "${platforms[@]}" "${wheels[@]}"
# deepspeed comes as source. Nothing is compiled now: its CUDA operators are built where they are first used.
DS_BUILD_OPS=0 "${pip[@]}" wheel --no-deps --wheel-dir "$out" "$(pinned deepspeed)"

du -sh "$out" | cut -f 1
printf 'python -m pip install --no-index --no-deps --find-links %q %s\n' "$1" "$(pinned deepspeed) ${wheels[*]}"
