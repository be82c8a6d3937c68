#!/usr/bin/env bash
# The Debian or Ubuntu packages of one stage of the images.
#
#     docker/steps/packages.sh build|gpu|cpu|profile
set -euo pipefail

case ${1:-} in
    # libibverbs and librdmacm are InfiniBand's
    build) packages=(bzip2 ca-certificates curl file g++ libibverbs-dev librdmacm-dev make patch perl pkg-config python3-venv
                     zlib1g-dev) ;;
    gpu) packages=(ca-certificates ibverbs-providers libibverbs1 librdmacm1t64 openssh-client openssh-server python3 tini) ;;
    cpu) packages=(ca-certificates python3-venv tini) ;;
    profile) packages=(cuda-nsight-systems-13-0) ;;  # from NVIDIA's repository, which its images bring along
    *) echo "packages.sh: stage must be build, gpu, cpu or profile; got '${1:-}'" >&2; exit 2 ;;
esac

export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install --yes --no-install-recommends "${packages[@]}"
rm -rf /var/lib/apt/lists/*
