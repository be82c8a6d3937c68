#!/usr/bin/env bash
# Open MPI with CUDA, over UCX.
#
#     docker/steps/openmpi.sh [PREFIX [UCX]]        by default /opt/openmpi /opt/ucx
#
#     CUDA                        the toolkit (/usr/local/cuda)
#     SOURCE_URL, SOURCE_SHA256   another tarball, file:// too
set -euo pipefail

version=5.0.10
sha256=0acecc4fc218e5debdbcb8a41d182c6b0f1d29393015ed763b2a91d5d7374cc6  # as in Spack's package
url=https://download.open-mpi.org/release/open-mpi/v5.0/openmpi-$version.tar.bz2

steps=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
prefix=${1:-/opt/openmpi}
ucx=${2:-/opt/ucx}
cuda=${CUDA:-/usr/local/cuda}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$steps/fetch.sh" "${SOURCE_URL:-$url}" "${SOURCE_SHA256:-$sha256}" "$work"
cd "$work"
# --with-cuda-libdir: configure does not look behind the link /usr/local/cuda, and goes on without CUDA (ompi #12509).
# --enable-mca-dso: what needs the driver is loaded if there is one, so that the image runs without a GPU, too.
./configure --prefix="$prefix" --enable-prte-prefix-by-default \
    --with-cuda="$cuda" --with-cuda-libdir="$cuda/lib64/stubs" --with-ucx="$ucx" \
    --with-hwloc=internal --with-libevent=internal --with-pmix=internal --with-prrte=internal \
    --enable-mca-dso=accelerator-cuda,btl-smcuda,rcache-gpusm,rcache-rgpusm --enable-mca-no-build=btl-uct \
    --enable-mpi-fortran=no --disable-oshmem --disable-io-romio --disable-libompitrace --disable-sphinx \
    --disable-opencl --disable-nvml --disable-libxml2
make -j"$(nproc)"
make install

[ -e "$prefix/lib/openmpi/mca_accelerator_cuda.so" ] \
    || { echo "openmpi.sh: Open MPI must have CUDA; it was built without" >&2; exit 1; }

# All messages go through UCX, on machines without InfiniBand, too; windows do not: UCX's have hung. What needs the driver
# is missing without a GPU, silently.
cat >"$prefix/etc/openmpi-mca-params.conf" <<'END'
pml = ucx
osc = ^ucx
opal_common_ucx_tls = any
opal_common_ucx_devices = any
mca_base_component_show_load_errors = ^accelerator/cuda,btl/smcuda,rcache/gpusm,rcache/rgpusm
END
# gpudbn divides a node's cores among its ranks itself, and the server's rank needs none of its own.
cat >"$prefix/etc/prte-mca-params.conf" <<'END'
hwloc_default_binding_policy = none
rmaps_default_mapping_policy = :oversubscribe
END
