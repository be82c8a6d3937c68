#!/usr/bin/env bash
# A source tarball: brought here, held to its checksum, unpacked.
#
#     docker/steps/fetch.sh URL SHA256 FOLDER
set -euo pipefail

[ $# = 3 ] || { echo "fetch.sh: must have URL SHA256 FOLDER; got $# arguments" >&2; exit 2; }
url=$1 sha256=$2 folder=$3

tarball=$(mktemp)
trap 'rm -f "$tarball"' EXIT
curl --fail --silent --show-error --location --retry 3 --output "$tarball" "$url"
echo "$sha256  $tarball" | sha256sum --check --quiet || { echo "fetch.sh: $url must have the SHA-256 $sha256" >&2; exit 1; }
mkdir -p "$folder"
tar --extract --file "$tarball" --directory "$folder" --strip-components 1
