# shellcheck shell=bash
# What the scripts of `make` share: where things lie, how a step is shown, how an error is said. To be sourced.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

# Costly to make again, so outside target/. The guest kernel and the emulated host use the same variable.
cache=${PICOVM_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/picovm}
cache=$(realpath -m -- "$cache")
export PICOVM_CACHE=$cache
# `own_store`: from here on the store is one for tests, not that of the containers that a user of this machine runs.
own_store() { export PICOVM_HOME=${PICOVM_HOME:-$cache/store}; }

target=$(realpath -m -- "${CARGO_TARGET_DIR:-target}")
if [[ -n ${CARGO_TARGET_DIR:-} ]]; then export CARGO_TARGET_DIR=$target; fi
# shellcheck disable=SC2034 # for those that source this
release=$target/x86_64-unknown-linux-gnu/release
logs=$target/log

# The job server of an outer `make -j` is not passed to these scripts; what they start must not look for it.
unset MAKEFLAGS MFLAGS MAKELEVEL

# `die SENTENCE...`: says what went wrong and what to do about it.
die() {
    echo "error: $*" >&2
    exit 1
}

# Milliseconds since some point in the past.
now() { echo $((${EPOCHREALTIME/[^0-9]/} / 1000)); }

# `duration MILLISECONDS`: 0.4 s, 12 s, 3 min 10 s.
duration() {
    local seconds=$(($1 / 1000))
    if ((seconds < 10)); then
        echo "$seconds.$(($1 % 1000 / 100)) s"
    elif ((seconds < 60)); then
        echo "$seconds s"
    else
        echo "$((seconds / 60)) min $((seconds % 60)) s"
    fi
}

# Shows that a step is alive, until the pipe on standard input is closed: on a terminal the time and the log's last
# line, elsewhere a word every minute.
heartbeat() {
    local what=$1 log=$2 begun=$3 seconds minutes=0 line room
    while read -r -t 1 || (($? > 128)); do
        seconds=$((($(now) - begun) / 1000))
        if [[ -t 1 ]]; then
            line=$(tail -c 2000 "$log" 2>/dev/null | tr '\r' '\n' | grep -v '^ *$' | tail -n 1 | tr -dc '[:print:]' || true)
            room=$((${COLUMNS:-$(tput cols 2>/dev/null || echo 80)} - ${#what} - 26))
            printf '\r\033[K==> %s ... %s  %s' "$what" "$(duration $((seconds * 1000)))" "${line:0:room > 0 ? room : 0}"
        elif ((seconds / 60 > minutes)); then
            minutes=$((seconds / 60))
            printf '%s min ... ' "$minutes"
        fi
    done
}

# `attempt WHAT LOG COMMAND...`: runs COMMAND with its output in LOG, showing `==> WHAT ... ` meanwhile. Leaves its
# exit status in $status and its time in $took, and the line on the screen unfinished: `finish` says how it ended.
attempt() {
    local what=$1 log=$2 begun pulse
    shift 2
    mkdir -p "$(dirname "$log")" || die "cannot write to $target; make it writable, or set CARGO_TARGET_DIR"
    : >"$log"
    begun=$(now)
    printf '==> %s ... ' "$what"
    exec {pulse}> >(heartbeat "$what" "$log" "$begun" 2>/dev/null)
    local watcher=$!
    status=0
    "$@" </dev/null >"$log" 2>&1 {pulse}>&- || status=$?
    exec {pulse}>&-
    wait "$watcher" || true
    took=$(duration $(($(now) - begun)))
    if [[ -t 1 ]]; then printf '\r\033[K==> %s ... ' "$what"; fi
}

# `show_end LOG [LINES]`: the end of a log, set off from what is around it.
show_end() {
    tail -n "${2:-30}" "$1" | sed 's/^/    | /'
    echo "    the whole log: $1"
}

# `step WHAT COMMAND...`: one line on the screen; if COMMAND fails, the end of its log, and the script ends too.
step() {
    local what=$1 log=$logs/${1//[^A-Za-z0-9]/-}.log
    shift
    attempt "$what" "$log" "$@"
    if ((status)); then
        echo "failed after $took"
        show_end "$log" >&2
        die "$what: failed with status $status; mend what the log names, then run the same target again"
    fi
    echo "$took"
}
