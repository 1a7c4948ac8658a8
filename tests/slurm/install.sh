#!/usr/bin/env bash
# Installs what a private Slurm needs, from Debian's packages; nothing where it is there. Starts no service.
set -euo pipefail

missing=
for tool in slurmctld slurmd sbatch munged ip tc nsenter unshare; do
    command -v "$tool" > /dev/null || missing=yes
done
if [ "$(id -u)" -ne 0 ]; then
    echo "make test-slurm: needs root, for network namespaces, and this user is not root" >&2
    exit 1
fi
[ -n "$missing" ] || exit 0
if ! command -v apt-get > /dev/null; then
    echo "make test-slurm: needs slurmctld, slurmd, sbatch, munged, ip, tc, nsenter and unshare, and there is no apt-get" >&2
    exit 1
fi
apt-get update -qq
RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client munge iproute2 util-linux > /dev/null
