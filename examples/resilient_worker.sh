#!/usr/bin/env bash
# A crash-safe worker in the shell: it runs a command for each message, with the body on standard input.
#
# `broker work QUEUE -- COMMAND` is enough, and faster, when a message is done if the command ends with 0 and should
# be tried again otherwise. Copy this script when you need your own rules between taking and acknowledging.
#
# Both ways are at least once: killed at any moment, even with -9, the worker loses nothing, and the message that it had
# is handled again. The command must tolerate that. After kill -9 the old command may still be running meanwhile.
#
# Needs bash 4.4 and jq.

set -euo pipefail

# Settings. Each can be given in the environment.
LEASE_S=${LEASE_S:-60}                   # how long a killed worker keeps its message; renewed while the command runs
MAX_ATTEMPTS=${MAX_ATTEMPTS:-5}          # then the message goes to the dead-letter queue
BACKOFF_MS=${BACKOFF_MS:-500}            # pause after the first failure; it doubles with each further one ...
MAX_BACKOFF_MS=${MAX_BACKOFF_MS:-300000} # ... up to this
IDLE_S=${IDLE_S:-10}                     # longest wait for a message before looking again
DEAD_LETTER=${DEAD_LETTER:-}             # name of the dead-letter queue; empty: QUEUE.dead
DRAIN=${DRAIN:-0}                        # 1: end when nothing is ready or leased
KEEP=${KEEP:-0}                          # 1: `peek` removes nothing, so that several readers see every message

usage() {
    cat <<'END'
usage: resilient_worker.sh lease QUEUE COMMAND [ARG...]
       resilient_worker.sh peek  QUEUE CHECKPOINT_FILE COMMAND [ARG...]
       resilient_worker.sh demo

lease  Lease a message, run COMMAND, acknowledge. Any number of workers share a queue.
peek   Look at the oldest message, run COMMAND, note its id in the checkpoint file, remove it. Strictly in order, so a
       failing message holds up the others until its attempts are used up. One worker for a queue and checkpoint file.

COMMAND reads the body from standard input and finds BROKER_QUEUE, BROKER_MESSAGE_ID and BROKER_ATTEMPT in its
environment. Status 0: done. Anything else: again after a pause, and in the end to the dead-letter queue.
INT and TERM: the command that runs is finished, then the worker ends with 0. An error of the broker (disk full,
database busy) ends the worker with 1. Nothing is lost then: let its supervisor start it again.
Settings in the environment: LEASE_S MAX_ATTEMPTS BACKOFF_MS MAX_BACKOFF_MS IDLE_S DEAD_LETTER DRAIN KEEP.
The database is the one that `broker` uses here; see BROKER_DEFAULT_DB_LOCATION.
END
}

log() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
    log "$@"
    exit 1
}

# The broker command: $BROKER, or `broker` if it is installed, or simplebroker.py beside this file or above it.
broker_command=("${BROKER:-broker}")
if [[ -z ${BROKER:-} ]] && ! type -P broker >/dev/null; then
    here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
    for file in "$here/../simplebroker.py" "$here/simplebroker.py"; do # the nearer one wins
        [[ ! -f $file ]] || broker_command=(python3 "$file")
    done
fi

# Ctrl-C goes to everything in the terminal, and TERM may: only the worker itself shall hear it.
shielded() {
    local status
    while true; do
        status=0
        (
            trap '' INT TERM
            exec "$@" 3>&-
        ) || status=$?
        ((status == 130 || status == 143)) || return "$status" # else it was hit before it began: once more
    done
}

broker() { shielded "${broker_command[@]}" "$@"; }

# Run a broker command: true if it did something, false if nothing is there (status 2). Other statuses are errors.
found() {
    local status=0
    "$@" || status=$?
    ((status == 0 || status == 2)) || die "'$1 ${2:-} ${3:-}' failed with status $status"
    return "$status"
}

# Run a command that a request to stop cuts short.
until_stopped() {
    local status=0
    "$@" >/dev/null 3>&- &
    waiting=$!
    ((!stop)) || kill "$waiting" || true
    wait "$waiting" || status=$?
    waiting=
    ((stop)) || return "$status"
}

request_stop() {
    stop=1
    [[ -z $waiting ]] || kill "$waiting" 2>/dev/null || true
}

# Wait until something is ready, at most IDLE_S. False if there is nothing left to wait for.
wait_for_message() {
    if ((DRAIN)); then
        ((!KEEP)) || return 1
        found broker list --json --pattern "$1" >"$tmp/list.json" || return 1
        [[ $(shielded jq '.ready + .leased' "$tmp/list.json") != 0 ]] || return 1
    fi
    found until_stopped "${broker_command[@]}" peek "$@" --wait "${IDLE_S}s" || true
}

# Take message.json apart: id, attempt and lease into variables of the caller, the body into a file, byte for byte.
unpack() {
    shielded jq -j '"\(.timestamp) \(.attempt) \(.lease)\n", .message' "$tmp/message.json" >"$tmp/unpacked" ||
        die "cannot unpack the message"
    read -r id attempt lease <"$tmp/unpacked"
    shielded tail -n +2 "$tmp/unpacked" >"$tmp/body" || die "cannot write '$tmp/body'"
}

# Run the command for the message that is unpacked, and return its status. Its input is a file, not a pipe: it may
# read all of it, a part, or nothing.
handle() {
    local queue=$1 id=$2 attempt=$3
    shift 3
    (
        trap '' INT
        export BROKER_QUEUE=$queue BROKER_MESSAGE_ID=$id BROKER_ATTEMPT=$attempt
        exec "$@" <"$tmp/body" 3>&-
    )
}

# The pause after the given attempt failed.
backoff_ms() {
    local ms=$BACKOFF_MS n
    for ((n = 1; n < $1 && ms < MAX_BACKOFF_MS; n++)); do ms=$((ms * 2)); done
    printf '%s\n' "$((ms < MAX_BACKOFF_MS ? ms : MAX_BACKOFF_MS))"
}

seconds() { printf '%d.%03d\n' "$(($1 / 1000))" "$(($1 % 1000))"; }

# --- lease, run, acknowledge

work_by_lease() {
    local queue=$1 id attempt lease status
    shift
    exec 3> >(keep_lease "$queue")
    while ((!stop)); do
        if ! found broker lease "$queue" --for "${LEASE_S}s" >"$tmp/message.json"; then
            wait_for_message "$queue" || break
            continue
        fi
        unpack
        if ((attempt > MAX_ATTEMPTS)); then # it ended its workers before they could say so
            bury "$queue" "$lease" "$id"
            continue
        fi
        status=0
        printf '%s\n' "$lease" >&3
        handle "$queue" "$id" "$attempt" "$@" || status=$?
        printf '\n' >&3
        if ((status == 0)); then
            broker ack "$queue" "$lease" || log "message $id was not acknowledged: it will be handled again"
            continue
        fi
        log "message $id: status $status, attempt $attempt of $MAX_ATTEMPTS"
        if ((attempt < MAX_ATTEMPTS)); then
            broker release "$queue" "$lease" --delay "$(backoff_ms "$attempt")ms" ||
                log "message $id was not released: it will be handled again when its lease ends"
        else
            bury "$queue" "$lease" "$id"
        fi
    done
}

# Renew the lease that the worker names on our standard input, until it names none. At the end of the input the worker
# is gone, however it went, and the lease runs out.
keep_lease() {
    local queue=$1 lease='' line='' part status nap
    nap=$(seconds "$((LEASE_S * 1000 / 3))")
    trap '' INT TERM
    while true; do
        status=0
        IFS= read -r -t "$nap" part || status=$?
        line+=$part # a read whose time is over has read a part of the line
        if ((status == 0)); then
            lease=$line line=''
        elif ((status <= 128)); then
            return 0
        elif [[ -n $lease ]]; then
            broker extend "$queue" "$lease" --for "${LEASE_S}s" || log "the lease $lease was not renewed"
        fi
    done
}

# Dead-letter a leased message, in two atomic steps. If the worker is killed between them, or another one is faster than
# the second, the attempts are still used up: whoever leases the message next does the same.
bury() {
    local queue=$1 lease=$2 id=$3 dead=${DEAD_LETTER:-$1.dead}
    if broker release "$queue" "$lease" && found broker move "$queue" "$dead" -m "$id" >/dev/null; then
        log "message $id moved to $dead"
    else
        log "message $id was not moved to $dead: someone else has it"
    fi
}

# --- peek, run, note, remove

# A message is removed after the checkpoint says that it was handled. Killed between the two, the worker finds the
# message that the checkpoint names when it starts again, and removes it without running the command.
#
# With KEEP=1 it goes on behind the checkpoint and never looks back: a message that gets into the queue later with an
# older id (delayed, released, moved, loaded) is not seen.
work_by_peek() {
    local queue=$1 checkpoint=$2 done_id tried_id tries id attempt lease status range=()
    shift 2
    read_checkpoint "$checkpoint"
    while ((!stop)); do
        ((!KEEP)) || range=(--after "$done_id")
        if ! found broker peek "$queue" --json "${range[@]}" >"$tmp/message.json"; then
            wait_for_message "$queue" "${range[@]}" || break
            continue
        fi
        unpack
        if [[ $id == "$done_id" ]]; then
            found broker delete "$queue" -m "$id" || true
            continue
        fi
        tries=$((id == tried_id ? tries + 1 : 1)) tried_id=$id
        write_checkpoint "$checkpoint"
        if ((tries > MAX_ATTEMPTS)); then # the last attempt ended the worker
            give_up "$queue" "$checkpoint" "$id"
            continue
        fi
        status=0
        handle "$queue" "$id" "$tries" "$@" || status=$?
        if ((status == 0)); then
            done_id=$id
            write_checkpoint "$checkpoint"
            ((KEEP)) || found broker delete "$queue" -m "$id" || true
            continue
        fi
        log "message $id: status $status, attempt $tries of $MAX_ATTEMPTS"
        if ((tries < MAX_ATTEMPTS)); then
            until_stopped sleep "$(seconds "$(backoff_ms "$tries")")" || die "cannot sleep"
        else
            give_up "$queue" "$checkpoint" "$id"
        fi
    done
}

# The checkpoint: the id that was handled last, the id that is being tried, and how often it was.
read_checkpoint() {
    local form='^(0|[1-9][0-9]{0,18}) (0|[1-9][0-9]{0,18}) (0|[1-9][0-9]{0,8})$' line=
    done_id=0 tried_id=0 tries=0
    [[ -e $1 ]] || return 0
    IFS= read -r line <"$1" || true
    [[ $line =~ $form ]] || die "the checkpoint '$1' is damaged: delete it to start with the oldest message"
    read -r done_id tried_id tries <<<"$line"
}

# Replaced as a whole by a rename: after a crash, of the machine too, the file holds the old line or the new one.
write_checkpoint() {
    printf '%s\n' "$done_id $tried_id $tries" >"$1.new" || die "cannot write '$1.new'"
    shielded sync "$1.new" || die "cannot sync '$1.new'"
    shielded mv -f -- "$1.new" "$1" || die "cannot replace '$1'"
}

# Dead-letter a message. With KEEP=1 a copy of it: two if the worker is killed before the checkpoint is written.
give_up() {
    local queue=$1 checkpoint=$2 id=$3 dead=${DEAD_LETTER:-$1.dead}
    if ((KEEP)); then
        broker write "$dead" - <"$tmp/body" || die "cannot write to $dead"
        done_id=$id
    else
        found broker move "$queue" "$dead" -m "$id" >/dev/null || true
    fi
    log "message $id went to $dead"
    tried_id=0 tries=0
    write_checkpoint "$checkpoint"
}

# --- demo: every line that begins with "ok" was checked

check() {
    [[ $2 == "$3" ]] || die "demo: $1: expected $(printf %q "$2"), found $(printf %q "$3")"
    printf 'ok: %s\n' "$1"
}

# shellcheck disable=SC2016 # what stands in single quotes is not for this shell
demo() {
    local self=("$BASH" "${BASH_SOURCE[0]}") status
    export BROKER_DEFAULT_DB_LOCATION=$tmp BROKER_DEFAULT_DB_NAME=demo.db BROKER_PROJECT_SCOPE=0
    export LEASE_S=1 MAX_ATTEMPTS=2 BACKOFF_MS=10 DRAIN=1 KEEP=0 DEAD_LETTER=
    # A command that appends the body to a file and, the first time, sends a signal to its worker, which is its parent.
    local note=(bash -c 'cat >>"$1"; [[ -e $1.signal ]] || { : >"$1.signal"; kill "$2" "$PPID"; }' note)

    printf '%s\n\n' '$(touch x) "quoted" \n' | broker write jobs -
    status=0
    "${self[@]}" lease jobs "${note[@]}" "$tmp/leased" -KILL || status=$?
    check "lease: the worker was killed with -9 while it handled a message" 137 "$status"
    "${self[@]}" lease jobs "${note[@]}" "$tmp/leased" -KILL
    check "lease: the next worker handled it again, byte for byte" \
        $'$(touch x) "quoted" \\n\n\n$(touch x) "quoted" \\n\n\n.' "$(cat "$tmp/leased" && printf .)"

    printf 'one\ntwo\nthree\n' | broker write logs --lines
    "${self[@]}" peek logs "$tmp/checkpoint" "${note[@]}" "$tmp/peeked" -TERM
    check "peek: the worker finished its message and stopped at TERM" "one" "$(cat "$tmp/peeked")"
    "${self[@]}" peek logs "$tmp/checkpoint" "${note[@]}" "$tmp/peeked" -TERM
    check "peek: the next worker went on behind the checkpoint" "onetwothree" "$(cat "$tmp/peeked")"

    printf 'bad' | broker write jobs -
    "${self[@]}" lease jobs false
    check "what fails $MAX_ATTEMPTS times is in the dead-letter queue, and nothing is left elsewhere" \
        "jobs.dead: 1" "$(broker list)"
}

# --- main

check_settings() {
    local name
    ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "needs bash 4.4 or newer, this is $BASH_VERSION"
    type -P jq >/dev/null || die "needs jq"
    type -P "${broker_command[0]}" >/dev/null || die "no '${broker_command[0]}': install SimpleBroker or set BROKER"
    for name in LEASE_S MAX_ATTEMPTS BACKOFF_MS MAX_BACKOFF_MS IDLE_S DRAIN KEEP; do
        [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "$name is '${!name}': give a whole number"
    done
    ((LEASE_S > 0 && MAX_ATTEMPTS > 0)) || die "LEASE_S and MAX_ATTEMPTS must be at least 1"
}

check_command() { type -P "$1" >/dev/null || die "no command '$1': nothing was taken"; }

main() {
    local way=${1:-}
    (($# == 0)) || shift
    check_settings
    tmp=$(mktemp -d) # stays behind after kill -9
    trap 'rm -rf -- "$tmp"' EXIT
    stop=0 waiting=
    trap request_stop INT TERM
    case $way:$# in
        lease:0 | lease:1 | peek:[0-2]) usage >&2 && exit 1 ;;
        lease:*)
            check_command "$2"
            work_by_lease "$@"
            ;;
        peek:*)
            check_command "$3"
            work_by_peek "$@"
            ;;
        demo:0) demo ;;
        help:0 | -h:0 | --help:0) usage ;;
        *) usage >&2 && exit 1 ;;
    esac
}

main "$@"
