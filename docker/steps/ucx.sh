#!/usr/bin/env bash
# UCX with CUDA: it carries Open MPI's messages, those in device memory too.
#
#     docker/steps/ucx.sh [PREFIX]        by default /opt/ucx
#
#     CUDA                        the toolkit (/usr/local/cuda)
#     SOURCE_URL, SOURCE_SHA256   another tarball, file:// too
set -euo pipefail

version=1.22.0
sha256=258941cddd14ca60d38c0d31b9b09ec1052c901086841011a498da8b55a3cb24  # as in Spack's package
url=https://github.com/openucx/ucx/releases/download/v$version/ucx-$version.tar.gz

steps=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
prefix=${1:-/opt/ucx}
cuda=${CUDA:-/usr/local/cuda}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$steps/fetch.sh" "${SOURCE_URL:-$url}" "${SOURCE_SHA256:-$sha256}" "$work"
cd "$work"
./contrib/configure-release --prefix="$prefix" --with-cuda="$cuda" --enable-mt --disable-static \
    --without-go --without-java --without-rocm --without-gdrcopy --without-knem --without-xpmem
make -j"$(nproc)"
make install

[ -e "$prefix/lib/ucx/libuct_cuda.so" ] || { echo "ucx.sh: UCX must have CUDA; it was built without" >&2; exit 1; }

# Every pointer is asked about anew. UCX's memory of them goes stale where memory is not allocated through it.
mkdir -p "$prefix/etc/ucx"
echo "UCX_MEMTYPE_CACHE=n" >"$prefix/etc/ucx/ucx.conf"
