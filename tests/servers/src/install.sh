# Installs packages on Debian or Ubuntu, as root, such that no service of theirs starts and no
# database of theirs is made. What it changes for that is put back exactly, also after a failure;
# after a power failure the next run does it.
# Usage: sh -c "$(cat install.sh)" install PACKAGE…
set -eu
policy=/usr/sbin/policy-rc.d
cluster=/etc/postgresql-common/createcluster.conf
mark='Put here by handfast for the time of an installation.'

put_back() {
    for file in "$policy" "$cluster"; do
        if [ -e "$file.handfast-kept" ] || [ -L "$file.handfast-kept" ]; then
            mv -f "$file.handfast-kept" "$file"
        elif grep -qs "$mark" "$file"; then
            rm -f "$file"
        fi
    done
}

# Two of these at once would keep each other's changes.
exec 9>/run/handfast-install.lock
flock 9
trap put_back EXIT
trap 'exit 1' HUP INT TERM
put_back

if [ -e "$policy" ] || [ -L "$policy" ]; then
    mv "$policy" "$policy.handfast-kept"
fi
printf '#!/bin/sh\n# %s\nexit 101\n' "$mark" >"$policy"
chmod 755 "$policy"

export DEBIAN_FRONTEND=noninteractive
install() {
    apt-get -o DPkg::Lock::Timeout=300 -q -y install --no-install-recommends "$@"
}
apt-get -q update
case " $* " in
*" postgresql "*)
    install postgresql-common
    cp -p "$cluster" "$cluster.handfast-kept"
    printf '\n# %s\ncreate_main_cluster = false\n' "$mark" >>"$cluster"
    ;;
esac
install "$@"
