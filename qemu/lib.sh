# Shared by the scripts under qemu/ and ci/: where things are, how a served disk and a guest are started, and how
# what they print is judged. Source it after `set -euo pipefail`.
# shellcheck shell=bash

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BUILD=${SEALBLK_BUILD:-$REPO/build}               # everything that is built for guests, git-ignored
SEALBLK=${SEALBLK:-$REPO/target/release/sealblk}  # the binary under test
GUEST_MEMORY=${GUEST_MEMORY:-512M}
BOOT_PARTITION=160 # MiB for kernel and initramfs on a disk that the small guest boots from

say() { printf '%s\n' "$*"; }
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
        return
    fi
    command -v sudo >/dev/null || die "'$*' needs root, and there is no sudo: run this as root"
    sudo "$@"
}

# --- What is built, and when it is built again ---------------------------------------------------------------------

# up_to_date TARGET SOURCE...: TARGET was finished with these very SOURCE files.
up_to_date() {
    local target=$1
    shift
    [ -e "$target" ] && [ "$(cat "$target.made-from" 2>/dev/null)" = "$(cat "$@" | sha256sum)" ]
}

# finished TARGET SOURCE...: says so of a TARGET that is now complete.
finished() {
    local target=$1
    shift
    cat "$@" | sha256sum >"$target.made-from"
}

# The Debian mirror that this machine's apt uses; SEALBLK_DEBIAN_MIRROR overrides it.
debian_mirror() {
    local mirror=${SEALBLK_DEBIAN_MIRROR:-}
    # shellcheck disable=SC2016  # $(REPO_URI) is apt's own syntax
    [ -n "$mirror" ] || mirror=$(apt-get indextargets --format '$(REPO_URI)' \
        'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | head -n 1)
    [ -n "$mirror" ] || die "apt knows no Debian mirror: run 'apt-get update', or set SEALBLK_DEBIAN_MIRROR"
    printf '%s' "$mirror"
}

# extract_debian SUITE TREE PACKAGE...: the packages' files and those of all that they need, unpacked and not set up.
extract_debian() {
    local suite=$1 tree=$2 mirror
    shift 2
    mirror=$(debian_mirror)
    rm -rf "$tree"
    mkdir -p "$tree"
    mmdebstrap --quiet --variant=extract --aptopt='Apt::Install-Recommends "false"' \
        --include="$(IFS=,; echo "$*")" "$suite" - "$mirror" |
        tar -x -C "$tree" --exclude=./dev --no-same-owner
}

# in_tree TREE PROGRAM ARGUMENT...: becomes a program of an unpacked tree with that tree's own libraries. Unlike a
# chroot this needs no root, and paths of sockets and disks mean what they mean outside.
in_tree() {
    local tree=$1 program=$2
    shift 2
    exec "$(tree_loader "$tree")" --library-path "$(tree_libraries "$tree")" "$tree/$program" "$@"
}

tree_libraries() { printf '%s' "$1/usr/lib/x86_64-linux-gnu:$1/lib/x86_64-linux-gnu"; }

tree_loader() {
    local loader
    for loader in "$1"/{usr/,}lib/x86_64-linux-gnu/ld-linux-x86-64.so.2; do
        [ -f "$loader" ] && { printf '%s' "$loader"; return; }
    done
    die "$1 has no program loader: remove it and build it again"
}

# --- QEMU ----------------------------------------------------------------------------------------------------------

# qemu_command: sets the array QEMU to the command for SEALBLK_QEMU: `system`, or `10` for the tree of qemu/build-qemu10.
qemu_command() {
    case ${SEALBLK_QEMU:-system} in
    system) QEMU=(qemu-system-x86_64) ;;
    10) QEMU=("$REPO/qemu/qemu10" qemu-system-x86_64) ;;
    *) die "SEALBLK_QEMU is '$SEALBLK_QEMU': 'system' or '10' is meant" ;;
    esac
}

# machine_options: sets the array MACHINE. vhost-user needs guest memory that another process can map; the firmware
# and the boot loader talk on the serial port (`graphics=off`).
machine_options() {
    local accel
    accel=$("$REPO/qemu/accel")
    # shellcheck disable=SC2054,SC2206  # QEMU's commas; words on purpose: "kvm -cpu host"
    MACHINE=(-nodefaults -no-user-config -display none -smp 2
        -object "memory-backend-memfd,id=memory,size=$GUEST_MEMORY,share=on" -m "$GUEST_MEMORY"
        -machine q35,memory-backend=memory,graphics=off -accel $accel)
}

# served_disk SOCKET [QUEUES]: sets the array DISK to the options of a disk that a back-end serves at SOCKET.
served_disk() {
    DISK=(-chardev "socket,id=sealblk,path=$1,reconnect=1"
        -device "vhost-user-blk-pci,chardev=sealblk,num-queues=${2:-2},bootindex=1")
}

# --- The served disk -----------------------------------------------------------------------------------------------

# serve DISK SOCKET [OPTION...]: serves DISK until `stop_serving` or the script's end; its log is SOCKET.log.
serve() {
    local disk=$1 socket=$2
    shift 2
    rm -f "$socket" # one that an earlier server left must not pass for this one's
    "$SEALBLK" serve --blk-file "$disk" --socket-path "$socket" "$@" >>"$socket.log" 2>&1 &
    SERVER=$!
    wait_until 30 serves_or_ended "$socket" || true
    if process_is_gone "$SERVER" || [ ! -S "$socket" ]; then
        tail -n 20 "$socket.log" >&2
        die "sealblk did not start to serve $disk"
    fi
}

serves_or_ended() { [ -S "$1" ] || process_is_gone "$SERVER"; }

# end_processes: for a script's EXIT trap: ends the server and the guest that still run.
end_processes() {
    local process
    for process in ${SERVER:-} ${GUEST:-}; do kill "$process" 2>/dev/null || true; done
    wait
}

# stop_serving: ends the server and fails if it did not end well.
stop_serving() {
    local server=$SERVER
    SERVER=
    kill -TERM "$server"
    wait "$server"
}

# kill_server: ends the server as a crash would.
kill_server() {
    local server=$SERVER
    SERVER=
    kill -KILL "$server"
    wait "$server" 2>/dev/null || true
}

process_is_gone() { ! kill -0 "$1" 2>/dev/null; }

# wait_until SECONDS COMMAND...: polls COMMAND until it succeeds.
wait_until() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $deadline ] || return 1
        sleep 0.2
    done
}

# --- The small guest -----------------------------------------------------------------------------------------------

# run_job SECONDS JOB [QEMU OPTION...]: boots the small guest, which runs the script JOB/run with the files beside it,
# then powers off. Everything that it prints is in JOB.log. Fails if the script did, or if the guest did not end in time.
# With MAY_REBOOT set a reboot of the guest is one, else it is its end.
run_job() {
    local limit=$1 started=$SECONDS
    shift
    start_job "$@"
    job_ended "$limit" "$1"
    say "  guest '${1##*/}': $((SECONDS - started)) s"
}

# start_job JOB [QEMU OPTION...]: the same in the background; `job_ended SECONDS JOB` waits for its end.
start_job() {
    job_initrd "$1"
    start_with_initrd "$1.initrd" "$@"
}

# start_with_initrd INITRD NAME [QEMU OPTION...]: starts the small guest with an initramfs that is there; NAME.log is its console.
# It boots with one CPU (`maxcpus`), and its /init brings the others up: see `start_guest`.
start_with_initrd() {
    local initrd=$1 name=$2
    shift 2
    qemu_command
    machine_options
    CONSOLE_LOG=$name.log
    : >"$name.log"
    CONSOLE_SEEN=0
    [ -n "${MAY_REBOOT:-}" ] || MACHINE+=(-no-reboot)
    "${QEMU[@]}" "${MACHINE[@]}" -serial "file:$name.log" -kernel "$BUILD/guest/vmlinuz" -initrd "$initrd" \
        -append "console=ttyS0 panic=-1 quiet maxcpus=1" "$@" </dev/null 2>>"$name.qemu" &
    GUEST=$!
}

job_ended() {
    local limit=$1 job=$2
    guest_ended "$limit" || job_failed "$job" "the guest did not end well within $limit s"
    rm -f "$job.initrd"
    grep -q '^sealblk-guest: done, status 0' "$job.log" || job_failed "$job" "the guest's script failed"
}

job_initrd() {
    local root
    root=$(mktemp -d)
    ln -s "$1" "$root/job"
    { cat "$BUILD/guest/initrd" && (cd "$root" && find -L job | cpio --quiet -o -L -H newc -R 0:0); } >"$1.initrd"
    rm -rf "$root"
}

# bootable_disk JOB IMAGE: makes IMAGE a disk from which the small guest boots by itself and runs the job; the first
# BOOT_PARTITION + 1 MiB of the disk that it is written to are taken.
bootable_disk() {
    local job=$1 image=$2 files
    job_initrd "$job"
    files=$(mktemp -d)
    cp "$BUILD/guest/vmlinuz" "$files/"
    gzip -1 <"$job.initrd" >"$files/initrd" # the firmware reads more slowly than the kernel unpacks
    rm "$job.initrd"
    cp "$BUILD/guest/grub" "$image"
    truncate -s "$((1 + BOOT_PARTITION))M" "$image"
    mke2fs -q -t ext4 -d "$files" -E offset=$((1 << 20)) "$image" "${BOOT_PARTITION}M"
    rm -rf "$files"
}

job_failed() {
    printf '%s\n' "--- the last that guest '${1##*/}' printed ($1.log)" >&2
    tail -n 40 "$1.log" | tr -d '\r' >&2
    printf '%s\n' "--- and QEMU" >&2
    tail -n 10 "$1.qemu" >&2
    die "guest '${1##*/}': $2"
}

# --- A guest with a console ----------------------------------------------------------------------------------------

# install_debian SOCKET JOB: makes the disk served at SOCKET a bootable Debian; JOB.log is the guest's console.
install_debian() {
    local socket=$1 job=$2
    mkdir -p "$job"
    cp "$REPO/qemu/guest/install-debian" "$job/run"
    served_disk "$socket"
    run_job 900 "$job" "${DISK[@]}" -drive "file=$BUILD/debian.tar,format=raw,if=none,id=tar,readonly=on" \
        -device virtio-blk-pci,drive=tar
}

# start_guest LOG [QEMU OPTION...]: boots from firmware; LOG is the serial console, `type_line` types on it. With QEMU 7.2
# the guest has one CPU. Before 8.2 TCG changes a CPU's memory map while that CPU runs: if one CPU sizes a PCI BAR while another
# writes to its APIC, that write can reach the device of the BAR, and QEMU ends with a failed assertion of hw/pci/msix.c.
start_guest() {
    CONSOLE_LOG=$1
    CONSOLE_SEEN=0
    shift
    qemu_command
    machine_options
    [ "${SEALBLK_QEMU:-system}" != system ] || MACHINE+=(-smp 1)
    rm -f "$CONSOLE_LOG" "$CONSOLE_LOG.keyboard"
    : >"$CONSOLE_LOG"
    mkfifo "$CONSOLE_LOG.keyboard"
    exec {KEYBOARD}<>"$CONSOLE_LOG.keyboard"
    "${QEMU[@]}" "${MACHINE[@]}" -serial stdio "$@" <"$CONSOLE_LOG.keyboard" >"$CONSOLE_LOG" 2>&1 &
    GUEST=$!
}

# type_line TEXT: as if somebody typed it.
type_line() { printf '%s\r' "$1" >&"$KEYBOARD"; }

# expect SECONDS TEXT: waits until the console shows TEXT, after what the last `expect` has seen. Fails at once if QEMU ended.
expect() {
    wait_until "$1" shows_or_ended "$2" && console_shows "$2" && return
    printf '%s\n' "--- the last on the guest's console ($CONSOLE_LOG)" >&2
    tail -c 3000 "$CONSOLE_LOG" | tr -d '\r' >&2
    if process_is_gone "$GUEST"; then
        printf '%s\n' "--- QEMU ended before '$2'" >&2
    else
        printf '%s\n' "--- waited $1 s for '$2'" >&2
    fi
    return 1
}

shows_or_ended() { grep -q -a -F -- "$1" <(tail -c "+$((CONSOLE_SEEN + 1))" "$CONSOLE_LOG") || process_is_gone "$GUEST"; }

console_shows() {
    local at
    at=$(tail -c "+$((CONSOLE_SEEN + 1))" "$CONSOLE_LOG" | grep -a -b -o -F -m 1 -- "$1" | head -n 1) || return 1
    CONSOLE_SEEN=$((CONSOLE_SEEN + ${at%%:*} + ${#1}))
}

# guest_runs SECONDS COMMAND: a command at the guest's shell prompt, which must succeed.
guest_runs() {
    type_line "$2; echo \"status-\$?\""
    expect "$1" status-0
}

# log_in SECONDS: waits for the login prompt and logs in as root.
log_in() {
    expect "$1" 'login: '
    type_line root
    expect 60 '# '
}

# guest_ended SECONDS: waits for QEMU's end, and fails if it did not end well or in time.
guest_ended() {
    local guest=$GUEST
    wait_until "$1" process_is_gone "$guest" || {
        kill_guest
        return 1
    }
    GUEST=
    wait "$guest"
}

# kill_guest: ends QEMU as a crash would.
kill_guest() {
    local guest=$GUEST
    GUEST=
    kill -KILL "$guest"
    wait "$guest" 2>/dev/null || true
}

# read_disk SOCKET FILE: what a guest would read from the disk served at SOCKET, in the clear.
read_disk() {
    "$REPO/qemu/qemu10" qemu-img convert --image-opts -O raw "driver=virtio-blk-vhost-user,path=$1,cache.direct=on" "$2"
}

# write_disk SOCKET FILE: writes FILE, as a guest would, to the begin of the disk served at SOCKET.
write_disk() {
    "$REPO/qemu/qemu10" qemu-img convert -n -S 0 -f raw --target-image-opts "$2" \
        "driver=virtio-blk-vhost-user,path=$1,cache.direct=on"
}
