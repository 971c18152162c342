# Hosts for tests: each is a Debian with a real systemd as PID 1, libvirt and QEMU, in namespaces of this machine (ci/host-boot), with a
# network and a root file system of its own. Source it after ci/boot.sh.
# shellcheck shell=bash

declare -A HOSTS=() # of each host that is up: the PID of its systemd

# host_up NAME: boots a host, and waits until all of its units are up. /sealblk there is the directory of the binaries under test.
host_up() {
    local name=$1 dir=$WORK/$1 boot
    mkdir -p "$dir"
    "$REPO/ci/host-boot" "$dir" "$name" </dev/null >>"$dir.log" 2>&1 &
    boot=$!
    HOSTS[$name]=
    wait_until 30 host_has_systemd "$name" "$boot" || host_failed "$name" "systemd does not start"
    wait_until 60 host_is_up "$name" || host_failed "$name" "it is '$(on "$name" systemctl is-system-running || true)'"
}

# The outer unshare becomes the inner one, whose one child is systemd.
host_has_systemd() {
    local pid
    pid=$(cat "/proc/$2/task/$2/children" 2>/dev/null) && [ -n "$pid" ] || return 1
    [ "$(cat "/proc/${pid% }/comm" 2>/dev/null)" = systemd ] || return 1
    HOSTS[$1]=${pid% }
}

host_is_up() {
    case $(on "$1" systemctl is-system-running 2>/dev/null) in
    running | degraded) ;;
    *) return 1 ;;
    esac
}

host_failed() {
    tail -n 20 "$WORK/$1.log" >&2
    [ -z "${HOSTS[$1]}" ] || on "$1" systemctl --no-pager --failed >&2 || true
    die "host $1: $2"
}

# on NAME COMMAND...: runs a command on a host, as root.
on() {
    local pid=${HOSTS[$1]}
    shift
    nsenter --target "$pid" --mount --pid --ipc --uts --net --cgroup --root="/proc/$pid/root" --wd="/proc/$pid/root" \
        env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb "$@"
}

# path_on NAME PATH: where this machine sees a file of a host.
path_on() { printf '%s' "/proc/${HOSTS[$1]}/root$2"; }

end_hosts() {
    local name
    for name in "${!HOSTS[@]}"; do [ -z "${HOSTS[$name]}" ] || kill -KILL "${HOSTS[$name]}" 2>/dev/null || true; done
}
