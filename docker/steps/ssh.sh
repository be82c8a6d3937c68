#!/usr/bin/env bash
# What the MPI Operator of Kubernetes needs: mpirun reaches the other pods of its job by ssh, without root, on port 2222.
# The operator makes a key for each job and mounts it as ~/.ssh; it is the host key, too.
#
#     docker/steps/ssh.sh
set -euo pipefail

cat >/etc/ssh/ssh_config.d/gpudbn.conf <<'END'
Host *
    Port 2222
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
END

mkdir -p /etc/gpudbn
cat >/etc/gpudbn/sshd_config <<END
Port 2222
HostKey /home/gpudbn/.ssh/id_rsa
PidFile none
StrictModes no
SetEnv PATH=$PATH
END
