#!/usr/bin/env bash
# A CUDA-aware Open MPI and mpi4py in one folder, to be carried to a machine with a GPU and no network (20 MB, packed 4).
#
#     benchmarks/cuda_mpi.sh FOLDER               builds it there, in five minutes on two cores; then, wherever it is:
#     FOLDER/mpirun -n 3 python3 -m gpudbn.train
#
# Nothing is installed. Open MPI 4.1 itself moves what is on a GPU (BTL smcuda: CUDA IPC between processes of a machine), so
# it needs no UCX, and the driver only when it runs. It does not reach other machines: for those there is docker/.
#
#     CUDA                        the toolkit: only its headers are used (/usr/local/cuda)
#     PYTHONS                     the versions of Python that mpi4py is brought for ("3.11 3.12 3.13")
#     SOURCE_URL, SOURCE_SHA256   another tarball, file:// too
#     PYTHON                      the interpreter whose pip brings mpi4py (python3)
#     JOBS                        of make (all cores)
set -euo pipefail

[ $# = 1 ] || { echo "cuda_mpi.sh: must have FOLDER; got $# arguments" >&2; exit 2; }
url=http://deb.debian.org/debian/pool/main/o/openmpi/openmpi_4.1.4.orig.tar.xz
sha256=ddaee7dbdb01eb4fab1fda5b5e03e8bbff026711806c095c1f39bb410f99f263

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$top/docker/steps/fetch.sh" "${SOURCE_URL:-$url}" "${SOURCE_SHA256:-$sha256}" "$work/source"
cd "$work/source"
./configure --prefix="$work/prefix" --with-cuda="${CUDA:-/usr/local/cuda}" CFLAGS="-O2 -w" \
    --with-hwloc=internal --with-libevent=internal --with-pmix=internal --with-zlib=no \
    --without-ucx --without-ofi --without-verbs --without-psm --without-psm2 --without-libnl --without-cma \
    --without-xpmem --without-knem --without-slurm --without-lsf --without-tm --without-sge \
    --enable-mpi-fortran=no --disable-mpi-java --disable-mpi-cxx --disable-oshmem --disable-io-romio \
    --disable-libompitrace --disable-man-pages --disable-dependency-tracking \
    --enable-mca-no-build=coll-hcoll,btl-usnic,btl-uct,common-ofi,vprotocol,crs,op-avx
make -j"${JOBS:-$(nproc)}"
make install

# what runs, without what compiles against it
mkdir -p "$folder/bin"
cp -a "$work/prefix/bin"/{mpirun,mpiexec,orterun,orted,ompi_info} "$folder/bin/"
cp -a "$work/prefix/lib" "$work/prefix/share" "$work/prefix/etc" "$folder/"
rm -rf "$folder/lib/pkgconfig" "$folder/share/man"
find "$folder/lib" -name '*.la' -delete
find "$folder/bin" "$folder/lib" -type f -exec strip --strip-unneeded {} + 2>/dev/null || true

# gpudbn divides a node's cores among its ranks itself, and the server's rank needs none of its own
cat >"$folder/etc/openmpi-mca-params.conf" <<'END'
pml = ob1
btl = self,smcuda
plm = isolated
opal_warn_on_missing_libcuda = 0
hwloc_base_binding_policy = none
rmaps_base_oversubscribe = 1
END

for version in ${PYTHONS:-3.11 3.12 3.13}; do
    "${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary :all: --python-version "$version" \
        --dest "$work/wheels" mpi4py==4.1.2
done
for wheel in "$work/wheels"/*.whl; do "${PYTHON:-python3}" -m zipfile -e "$wheel" "$folder/python"; done

cat >"$folder/mpirun" <<'END'
#!/usr/bin/env bash
# mpirun of this folder, wherever it lies; programs find its MPI and its mpi4py first
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
export OPAL_PREFIX=$here LD_LIBRARY_PATH=$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PYTHONPATH=$here/python${PYTHONPATH:+:$PYTHONPATH} MPI4PY_MPIABI=openmpi MPI4PY_LIBMPI=$here/lib/libmpi.so.40
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
exec "$here/bin/mpirun" "$@"
END
chmod +x "$folder/mpirun"
OPAL_PREFIX=$folder "$folder/bin/ompi_info" --parsable --all | grep mpi_built_with_cuda_support:value:true \
    || { echo "cuda_mpi.sh: Open MPI must have CUDA; it was built without" >&2; exit 1; }
du -sh "$folder"
