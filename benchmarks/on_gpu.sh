#!/usr/bin/env bash
# What is to be known from a machine with a GPU, in under 10 minutes and without a network.
#
#     benchmarks/on_gpu.sh [OUT]        OUT: a folder, by default benchmarks/results/gpu-DATE
#
# In this order, the most valuable first, each with a time limit of its own; one that fails does not stop the others:
#     environment   GPU, driver, versions, commit             OUT/environment.json
#     tests         pytest -m gpu                             OUT/tests.log
#     updates       an update by every path, beside PyTorch and rbms; launches, barriers        OUT/updates.json
#     training      test error and time                       OUT/run/, OUT/training.log
#     mpi           a server and two replicas, by way of the host and from GPU to GPU           OUT/mpi.json
#     kernels       each kernel beside plain CuPy and PyTorch OUT/kernels.json
#     large         wgmma kernels beside cuBLAS, on Hopper    OUT/large.json
#     sanitizer     memcheck and racecheck at toy sizes, where compute-sanitizer is there and allowed
# After each step OUT/table.md and OUT/results.json, which holds everything, are written anew; at the end the table is
# printed. The exit code is 0 if everything passed, else 1.
#
#     GPUDBN_WHEELS    a folder of wheels that the machine lacks; put first on Python's path, not installed
#     GPUDBN_MNIST     a folder with MNIST's four IDX files; without it the built-in digits are trained on
#     GPUDBN_CUDA_MPI  a folder with a CUDA-aware MPI, made by cuda_mpi.sh; without it the step mpi is skipped
#     GPUDBN_STEPS     which steps, for instance "environment tests"; all of them. The others may come in a later call
#     GPUDBN_PATIENCE  a whole number by which time limits are multiplied (1)
#     GPUDBN_COMMIT    what to note as the commit, where this is no checkout
#     GPUDBN_REHEARSE  1: the same steps at toy sizes on a machine without a GPU
#     PYTHON           the interpreter (python3)
set -uo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-$top/benchmarks/results/gpu-$(date -u +%Y%m%d-%H%M%S)}
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
rehearse=${GPUDBN_REHEARSE:-}
failed=0
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
cd "$top" || exit 1
export PYTHONPATH="$wheels:$top" PYTHONUNBUFFERED=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 CUPY_TF32=0
[ -n "${GPUDBN_STEPS:-}" ] || : >"$out/steps.tsv"

# step NAME SECONDS COMMAND...: run it, show it, keep what it said and how it ended
step() {
    local name=$1 limit=$(($2 * ${GPUDBN_PATIENCE:-1})) begun=$SECONDS code
    shift 2
    case " ${GPUDBN_STEPS:-$name} " in *" $name "*) ;; *) return ;; esac
    echo "== $name"
    timeout -k 5 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    printf '%s\t%s\t%s\n' "$name" "$code" $((SECONDS - begun)) >>"$out/steps.tsv"
    if [ "$code" != 0 ]; then
        echo "== $name failed: exit $code"
        failed=1
    fi
    "$python" -m benchmarks.kernels --table "$out" >"$out/table.md"
}

# Wheels are zip files, and unpacking them needs no pip; but pip refuses those for another Python.
unpack() {
    shopt -s nullglob
    local found=("$1"/*.whl)
    [ ${#found[@]} -gt 0 ] || { echo "GPUDBN_WHEELS: must be a folder of wheels; got $1"; return 1; }
    if "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m pip install --no-index --no-deps --quiet --target "$wheels" "${found[@]}"
    else
        for wheel in "${found[@]}"; do "$python" -m zipfile -e "$wheel" "$wheels" || return 1; done
    fi
}
# Skipped where the tool is not there, or cannot even watch a program that does nothing: containers may forbid it.
sanitize() {
    local tool check code=0
    tool=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer) ||
        { echo "skipped: no compute-sanitizer here"; return 0; }
    "$tool" --error-exitcode 9 "$python" -c 'import cupy; cupy.zeros(1)' ||
        { echo "skipped: compute-sanitizer is not allowed to watch here"; return 0; }
    for check in memcheck racecheck; do
        "$tool" --tool "$check" --error-exitcode 9 "$python" -m benchmarks.kernels --small --out "$out/$check.json" || code=1
    done
    return "$code"
}
# A rehearsal takes the MPI of this Python, and arrays whose memory is the host's in truth.
move() {
    local launcher=${GPUDBN_CUDA_MPI:+$GPUDBN_CUDA_MPI/mpirun}
    if [ -n "$rehearse" ]; then
        launcher=${launcher:-$(command -v "$(dirname "$(command -v "$python")")/mpirun" || command -v mpirun)}
        export PYTHONPATH="$top/tests/mpi/pretend_driver:$PYTHONPATH" GPUDBN_CUDA_AWARE=1
    fi
    [ -n "$launcher" ] || { echo "skipped: GPUDBN_CUDA_MPI names no folder with a CUDA-aware MPI"; return 0; }
    "$python" -m benchmarks.transports ${rehearse:+--rehearse} --mpirun "$launcher" --out "$out/mpi.json"
}
export -f unpack sanitize move
export python wheels out top rehearse

[ -z "${GPUDBN_WHEELS:-}" ] || GPUDBN_STEPS= step wheels 20 bash -c 'unpack "$1"' bash "$GPUDBN_WHEELS"

toy=()
# only files with such tests: the others may want packages that are not here
mapfile -t files < <(grep -lrE --include='test_*.py' 'mark\.gpu|tests\.cuda\.checks' tests | grep -v /test_wgmma.py)
files+=(tests/cuda/test_wgmma.py)  # last: barriers that were wrong would wait without end
tests=(-m pytest -v -m gpu --durations=5 -p no:cacheprovider -W default "${files[@]}")  # their warnings are not ours
if [ -n "$rehearse" ]; then
    toy=(--rehearse)
    training=(--device cpu --layers 16 8 --epochs 1 --finetune-epochs 1 --batch 100 --data digits)
else
    tests+=(--gpu)
    training=(--device gpu --data digits)
    [ -z "${GPUDBN_MNIST:-}" ] || training=(--device gpu --config benchmarks/mnist.toml --data "$GPUDBN_MNIST")
fi

step environment 20 "$python" -m benchmarks.kernels ${toy[@]+"${toy[@]}"} --environment "$out/environment.json"
step tests 140 "$python" "${tests[@]}"
step updates 115 "$python" -m benchmarks.updates ${toy[@]+"${toy[@]}"} --out "$out/updates.json"
case " ${GPUDBN_STEPS:-training} " in *" training "*) rm -rf "$out/run" ;; esac
step training 70 "$python" -m gpudbn.train "${training[@]}" --plots off --out "$out/run"
step mpi 40 bash -c move
step kernels 100 "$python" -m benchmarks.kernels ${toy[@]+"${toy[@]}"} --out "$out/kernels.json"
step large 40 "$python" -m benchmarks.large ${toy[@]+"${toy[@]}"} --cases 1 --out "$out/large.json"
step sanitizer 50 bash -c sanitize

echo
cat "$out/table.md"
exit $failed
