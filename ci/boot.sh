# Shared by the boot tests: a fresh directory for this test's disks and logs, $WORK, and an end that leaves no process.
# shellcheck shell=bash
# shellcheck source=qemu/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../qemu/lib.sh"

WORK=$BUILD/boot/${0##*/}
rm -rf "$WORK"
mkdir -p "$WORK"
trap end_processes EXIT

# new_job NAME <<END ... END: a job for the small guest, to be run with `run_job SECONDS $WORK/NAME`.
new_job() {
    mkdir -p "$WORK/$1"
    cat >"$WORK/$1/run"
}
