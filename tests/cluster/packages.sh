#!/bin/bash
# What the cluster tests need beyond Python. On Debian as root it is installed; elsewhere the tests are skipped and say
# what is missing, so this ends well in any case.
#
#   packages.sh           for `make test-cluster`
#   packages.sh images    for `make test-image` too
set -u
PACKAGES=(iproute2 openssh-server pdsh munge slurm-wlm openmpi-bin libopenmpi-dev)
if [ "${1:-}" = images ]; then PACKAGES+=(buildah podman runc mmdebstrap); fi

if [ "$(id -u)" -ne 0 ] || [ ! -e /etc/debian_version ]; then
    echo "cluster tests: not root on Debian, nothing is installed"
    exit 0
fi
missing=()
for package in "${PACKAGES[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
echo "cluster tests: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
    echo "cluster tests: apt-get failed; what is missing is skipped"
