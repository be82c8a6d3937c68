#!/usr/bin/env bash
# The ordinary user whom the containers run as. His home is open to all: `docker run --user` may bring another number.
#
#     docker/steps/user.sh
set -euo pipefail

if id ubuntu >/dev/null 2>&1; then
    userdel --remove ubuntu  # Ubuntu's image has given him the number 1000
fi
useradd --uid 1000 --create-home --shell /bin/bash gpudbn
mkdir /home/gpudbn/runs
chmod 1777 /home/gpudbn /home/gpudbn/runs
