#!/usr/bin/env bash
# A crash-safe worker in the shell: it runs a command for each message, with the body on standard input.
#
# `broker work` does all of that already, with leases: renewed while the command runs, retries after pauses that grow,
# dead letters with a reason, a clean stop. `lease` calls it. Beyond it, `peek` works strictly in order, with a checkpoint
# file, and shows each step in the shell, for rules of your own between them.
# Both ways are at least once: killed at any moment, even with -9, the worker loses nothing, and the message that it had
# is handled again. The command must tolerate that. Needs bash 4.4 and jq.

set -euo pipefail

# Settings. Each can be given in the environment.
MAX_ATTEMPTS=${MAX_ATTEMPTS:-5}          # then the message goes to the dead-letter queue
BACKOFF_MS=${BACKOFF_MS:-500}            # pause after the first failure; it doubles with each further one ...
MAX_BACKOFF_MS=${MAX_BACKOFF_MS:-300000} # ... up to this (peek)
LEASE_S=${LEASE_S:-60}                   # how long a killed worker keeps its message (lease)
WAIT_S=${WAIT_S:-2}                      # between two looks at an empty queue; a stop takes as long then (peek)
DEAD_LETTER=${DEAD_LETTER:-}             # name of the dead-letter queue; empty: QUEUE.dead
DRAIN=${DRAIN:-0}                        # 1: end when nothing is left (lease: 1 if it dead-lettered)

usage() {
    cat <<'END_OF_USAGE'
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
END_OF_USAGE
}

log() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
    log "$@"
    exit 1
}

# The command: $BROKER, or `broker` if it is installed, or simplebroker.py beside this file or above it.
broker_command=("${BROKER:-broker}")
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
for file in "$here/../simplebroker.py" "$here/simplebroker.py"; do # the nearer one wins
    [[ -n ${BROKER:-} || ! -f $file ]] || type -P broker >/dev/null || broker_command=(python3 "$file")
done

broker() { command "${broker_command[@]}" "$@"; }

# Run a broker command: true if it did something, false if nothing is there (status 2). Other statuses are errors.
found() {
    local status=0
    "$@" || status=$?
    ((status == 0 || status == 2)) || die "'$1 ${2:-} ${3:-}' failed with status $status"
    return "$status"
}

# Check these settings before a message is taken, and make a scratch directory.
prepare() {
    local name
    for name in "$@"; do
        [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "$name is '${!name}': give a whole number"
    done
    tmp=$(mktemp -d) # stays behind after kill -9
    trap 'rm -rf -- "$tmp"' EXIT
}

check_command() { type -P "$1" >/dev/null || die "no command '$1': nothing was taken"; }

# For the demonstration: every line that begins with "ok" was checked.
expect() {
    [[ $2 == "$3" ]] || die "demo: $1: expected $(printf %q "$2"), found $(printf %q "$3")"
    printf 'ok: %s\n' "$1"
}

running() { [[ ! -e $stop_file ]] && kill -0 "$$" 2>/dev/null; }

# Run a function that INT and TERM do not end, nor what it starts, also when they go to the whole group. They, and the
# end of this script by kill -9, make running() false.
guarded() {
    stop_file=$tmp/stop
    trap ': >"$stop_file"' INT TERM
    (
        trap '' INT TERM
        "$@"
    ) &
    while kill -0 "$!" 2>/dev/null; do wait "$!" || true; done # a signal ends wait, too
    wait "$!"
}

# Sleep for $1 milliseconds, or until a signal comes.
nap() {
    local left
    for ((left = $1; left > 0; left -= 200)); do
        ! running || sleep "0.$(printf '%03d' "$((left < 200 ? left : 200))")"
    done
}

# Take message.json apart: id, attempt, lease and reason into variables, the body into a file, byte for byte.
# shellcheck disable=SC2034 # not every script uses all of these variables
unpack() {
    jq -j '"\(.timestamp) \(.attempt) \(.lease) \(.reason // "")\n", .message' "$tmp/message.json" >"$tmp/unpacked" ||
        die "cannot unpack the message"
    read -r id attempt lease reason <"$tmp/unpacked"
    tail -n +2 "$tmp/unpacked" >"$tmp/body" || die "cannot write '$tmp/body'"
}

# Run a command for the message. Its input is a file, not a pipe: it may read all of it, a part, or nothing.
handle() {
    (
        export BROKER_QUEUE=$1 BROKER_MESSAGE_ID=$id BROKER_ATTEMPT=$attempt
        shift
        exec "$@" <"$tmp/body"
    )
}

work_by_lease() {
    local queue=$1 options=(--exact --lease "${LEASE_S}s" --max-attempts "$MAX_ATTEMPTS" --backoff "${BACKOFF_MS}ms")
    shift
    ((!DRAIN)) || options+=(--drain)
    rm -rf -- "$tmp"
    exec "${broker_command[@]}" work "$queue" "${options[@]}" --dead-letter "${DEAD_LETTER:-$queue.dead}" -- "$@"
}

# A message is removed after the checkpoint says that it was handled. Killed between the two, the worker finds the
# message that the checkpoint names when it starts again, and removes it without running the command.
work_by_peek() {
    local queue=$1 checkpoint=$2 status delay_ms
    shift 2
    read_checkpoint "$checkpoint"
    while running; do
        if ! found broker peek "$queue" --json >"$tmp/message.json"; then
            if ((DRAIN)); then found broker list --pattern "$queue" >/dev/null || break; fi # empty
            found broker peek "$queue" --wait "${WAIT_S}s" >/dev/null || true
            continue
        fi
        unpack
        if [[ $id == "$done_id" ]]; then
            found broker delete "$queue" -m "$id" || true
            continue
        fi
        attempt=$((id == tried_id ? tries + 1 : 1)) status=0
        write_checkpoint "$checkpoint" "$done_id" "$id" "$attempt"
        if ((attempt <= MAX_ATTEMPTS)); then # else the last attempt ended the worker
            handle "$queue" "$@" || status=$?
            if ((status == 0)); then
                write_checkpoint "$checkpoint" "$id" 0 0
                found broker delete "$queue" -m "$id" || true
                continue
            fi
            log "message $id: status $status, attempt $attempt of $MAX_ATTEMPTS"
        fi
        if ! running; then # perhaps it failed because of the stop, which does not count
            write_checkpoint "$checkpoint" "$done_id" "$id" "$((attempt - 1))"
        elif ((attempt < MAX_ATTEMPTS)); then
            delay_ms=$((BACKOFF_MS << (attempt > 20 ? 19 : attempt - 1)))
            nap "$((delay_ms < MAX_BACKOFF_MS ? delay_ms : MAX_BACKOFF_MS))"
        else
            found broker move "$queue" "${DEAD_LETTER:-$queue.dead}" -m "$id" -q || true
        fi
    done
}

# The checkpoint: the id that was handled last, the id that is being tried, and how often it was.
read_checkpoint() {
    local form='^(0|[1-9][0-9]{0,18}) (0|[1-9][0-9]{0,18}) (0|[1-9][0-9]{0,8})$' line='0 0 0'
    [[ ! -e $1 ]] || IFS= read -r line <"$1" || true
    [[ $line =~ $form ]] || die "the checkpoint '$1' is damaged: delete it to start with the oldest message"
    read -r done_id tried_id tries <<<"$line"
}

# Replaced as a whole by a rename: after a crash, of the machine too, the file holds the old line or the new one.
write_checkpoint() {
    done_id=$2 tried_id=$3 tries=$4
    printf '%s\n' "$done_id $tried_id $tries" >"$1.new" || die "cannot write '$1.new'"
    { sync "$1.new" && mv -f -- "$1.new" "$1"; } || die "cannot replace '$1'"
}

# shellcheck disable=SC2016 # what stands in single quotes is not for this shell
demo() {
    local self=("$BASH" "${BASH_SOURCE[0]}") status=0
    export BROKER_DEFAULT_DB_LOCATION=$tmp BROKER_DEFAULT_DB_NAME=demo.db BROKER_PROJECT_SCOPE=0
    export LEASE_S=1 MAX_ATTEMPTS=2 BACKOFF_MS=10 DRAIN=1 DEAD_LETTER=
    # A command that appends the body to a file and, the first time, kills its worker.
    local note=(bash -c 'cat >>"$1"; [[ -e $1.once ]] || { : >"$1.once"; kill -KILL "$PPID"; }' note)
    printf '%s\n\n' '$(touch x) "quoted" \n' | broker write jobs -
    "${self[@]}" peek jobs "$tmp/checkpoint" "${note[@]}" "$tmp/peeked" 2>/dev/null || status=$?
    expect "peek: the worker was killed with -9 while it handled a message" 137 "$status"
    printf 'next' | broker write jobs -
    "${self[@]}" peek jobs "$tmp/checkpoint" "${note[@]}" "$tmp/peeked"
    expect "peek: the next worker handled it again, byte for byte, and went on" \
        $'$(touch x) "quoted" \\n\n\n$(touch x) "quoted" \\n\n\nnext' "$(cat "$tmp/peeked")"
    printf 'bad' | broker write jobs -
    "${self[@]}" peek jobs "$tmp/checkpoint" false 2>/dev/null
    expect "what fails $MAX_ATTEMPTS times is in the dead-letter queue" "jobs.dead: 1" "$(broker list)"
    printf 'good' | broker write jobs -
    expect "lease: the body arrives" "good" "$("${self[@]}" lease jobs cat)"
}

main() {
    prepare LEASE_S MAX_ATTEMPTS BACKOFF_MS MAX_BACKOFF_MS WAIT_S DRAIN
    case ${1:-}:$# in
        lease:[12] | peek:[123]) usage >&2 && exit 1 ;;
        lease:*) check_command "$3" && work_by_lease "${@:2}" ;;
        peek:*) check_command "$4" && guarded work_by_peek "${@:2}" ;;
        demo:1) demo ;;
        help:1 | -h:1 | --help:1) usage ;;
        *) usage >&2 && exit 1 ;;
    esac
}

main "$@"
