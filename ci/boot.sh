# Shared by the boot tests: a fresh directory for this test's disks and logs, $WORK, and an end that leaves no process.
# shellcheck shell=bash
# shellcheck source=qemu/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../qemu/lib.sh"

WORK=$BUILD/boot/${0##*/}
SOCKET=$WORK/socket
RECOVERY=$WORK/recovery # the recovery key of the disks that `create_disk` makes
rm -rf "$WORK"
mkdir -p "$WORK"
trap end_processes EXIT

# create_disk NAME SIZE [OPTION...]: an encrypted disk $WORK/NAME.luks whose recovery key is in $RECOVERY.
create_disk() {
    local name=$1 size=$2
    shift 2
    "$SEALBLK" create "$WORK/$name.luks" --size "$size" --recovery-key "$RECOVERY" --state-dir "$WORK/state" "$@" \
        >>"$WORK/create.log" 2>&1 || {
        cat "$WORK/create.log" >&2
        die "cannot create $WORK/$name.luks"
    }
}

# serve_disk NAME [OPTION...]
serve_disk() {
    local name=$1
    shift
    serve "$WORK/$name.luks" "$SOCKET" --state-dir "$WORK/state" "$@"
}

# new_job NAME <<END ... END: a job for the small guest, to be run with `run_job SECONDS $WORK/NAME`.
new_job() {
    mkdir -p "$WORK/$1"
    cat >"$WORK/$1/run"
}

# make_tree DIR: files of sizes around those that block layers care about, filled at random, and DIR/sums of them all.
make_tree() {
    local size
    mkdir -p "$1/deep/er"
    for size in 0 1 511 512 513 4095 4096 4097 65535 65537 1048576 4194311; do
        head -c "$size" /dev/urandom >"$1/deep/file-$size"
        head -c "$size" /dev/urandom >"$1/deep/er/file-$size"
    done
    (cd "$1" && find deep -type f -exec sha256sum {} + >sums)
}

# printed JOB KEY: what the job printed after "KEY: ".
printed() { sed -n "s/^$2: //p" "$WORK/$1.log" | tr -d '\r'; }

# same WHAT A B
same() { [ "$2" = "$3" ] || die "$1: '$2' is not '$3'"; }

# monitor NAME: sets the array MONITOR to the options of a QEMU that takes orders by `order NAME ...`.
monitor() {
    local at=$WORK/$1.monitor
    rm -f "$at".{in,out}
    mkfifo "$at".{in,out}
    # shellcheck disable=SC2034  # of those who source this
    MONITOR=(-chardev "pipe,id=monitor,path=$at" -mon chardev=monitor)
}

# order NAME COMMAND...: has QEMU's monitor carry out a command. The pipe takes it also if QEMU has ended or has not started yet.
order() {
    local at=$WORK/$1.monitor
    shift
    printf '%s\n' "$*" 1<>"$at.in"
}

# answers NAME COMMAND TEXT: whether QEMU's monitor answers to a command with this text.
answers() {
    local at=$WORK/$1.monitor
    answer "$1" >>"$at.log" # to what was asked before
    order "$1" "$2"
    sleep 0.1
    answer "$1" >"$at.answer"
    cat "$at.answer" >>"$at.log"
    grep -qa -- "$3" "$at.answer"
}

# answer NAME: what QEMU's monitor has printed since.
answer() { dd if="$WORK/$1.monitor.out" iflag=nonblock bs=64k status=none 2>/dev/null || true; }
