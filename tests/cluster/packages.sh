#!/bin/bash
# What the cluster tests need beyond Python. On Debian as root it is installed, and no service of it is started; elsewhere
# the tests are skipped and say what is missing, so this ends well in any case.
#
#   packages.sh           for `make test-cluster`
#   packages.sh images    for `make test-image` too
set -u
PACKAGES=(iproute2 openssh-server pdsh munge slurm-wlm openmpi-bin libopenmpi-dev)
if [ "${1:-}" = images ]; then PACKAGES+=(buildah podman runc mmdebstrap); fi
POLICY=/usr/sbin/policy-rc.d
say() { echo "cluster tests: $*"; }

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null || [ ! -e /etc/debian_version ]; then
    say "not root on Debian, nothing is installed"
    exit 0
fi
missing=()
for package in "${PACKAGES[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
say "installing ${missing[*]}"
if [ ! -e $POLICY ]; then # Debian starts what it installs, a server for ssh too, unless this says no
    trap 'rm -f $POLICY' EXIT
    printf '#!/bin/sh\nexit 101\n' >$POLICY && chmod +x $POLICY
fi
export DEBIAN_FRONTEND=noninteractive
get() { timeout 300 apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=60 "$@" 2>&1; }
if ! said=$(get update && get install -y --no-install-recommends "${missing[@]}"); then
    say "apt-get failed, what is missing is skipped:"
    tail -n 3 <<<"$said"
fi
exit 0
