#!/usr/bin/env bash
# gpudbn and what it needs, in a Python environment of its own.
#
#     docker/steps/gpudbn.sh gpu|cpu [PREFIX [SOURCE]]        by default /opt/gpudbn and the tree that this file is in
set -euo pipefail

steps=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
prefix=${2:-/opt/gpudbn}
source=${3:-$steps/../..}

case ${1:-} in
    # The headers that the kernels include are in no runtime image of CUDA's. MPI is the one of openmpi.sh.
    gpu) packages=("${source}[cuda13]" nvidia-cuda-runtime) ;;
    cpu) packages=("${source}[mpich]") ;;
    *) echo "gpudbn.sh: first argument must be gpu or cpu; got '${1:-}'" >&2; exit 2 ;;
esac

python3 -m venv "$prefix"
"$prefix/bin/pip" install --no-cache-dir --disable-pip-version-check --constraint "$steps/constraints.txt" "${packages[@]}"
"$prefix/bin/python" -m gpudbn.train --help >/dev/null
