#!/usr/bin/env bash
# Failures handled: counted retries, pauses that grow, a dead-letter queue, a second chance from it, a monitor.
# `broker work QUEUE --max-attempts 5 --backoff 500ms COMMAND` retries and dead-letters by itself, and `broker requeue`
# gives a second chance. This script shows beyond it: rules of your own, such as the exit status that means "never try
# this again", and a monitor. Dead messages keep their ids, so times mean when they were written. Needs bash 4.4, jq.

set -euo pipefail

# Settings. Each can be given in the environment.
MAX_ATTEMPTS=${MAX_ATTEMPTS:-5}
BACKOFF_MS=${BACKOFF_MS:-500}            # pause after the first failure; it doubles with each further one ...
MAX_BACKOFF_MS=${MAX_BACKOFF_MS:-300000} # ... up to this
LEASE_S=${LEASE_S:-300}                  # longer than any run of the command (`broker work` renews leases)
PERMANENT_STATUS=${PERMANENT_STATUS:-65} # the command says: this message will never work (65 is EX_DATAERR)
MAX_DEAD=${MAX_DEAD:-0}                  # alert when there are more dead messages than this ...
MAX_AGE_S=${MAX_AGE_S:-86400}            # ... or when the oldest was written longer ago than this
INTERVAL_MS=${INTERVAL_MS:-60000}        # between two looks of the monitor

usage() {
    cat <<'END_OF_USAGE'
usage: dead_letter_queue.sh simple  QUEUE COMMAND [ARG...]    one attempt, then the dead-letter queue
       dead_letter_queue.sh counted QUEUE COMMAND [ARG...]    up to MAX_ATTEMPTS, without a pause
       dead_letter_queue.sh backoff QUEUE COMMAND [ARG...]    up to MAX_ATTEMPTS, pauses double from BACKOFF_MS
       dead_letter_queue.sh show    QUEUE                     the dead messages, a line of JSON each
       dead_letter_queue.sh retry   QUEUE [--after TS] [--before TS] [-n N]    move them back, those of a time or all
       dead_letter_queue.sh check   QUEUE [COMMAND [ARG...]]  look once: status 3 and COMMAND if it is time for an alert
       dead_letter_queue.sh monitor QUEUE [COMMAND [ARG...]]  look every INTERVAL_MS, the same
       dead_letter_queue.sh demo
The dead-letter queue of QUEUE is QUEUE.dead. The first three end when QUEUE is empty. Their COMMAND reads the body
from standard input; status 0 means done, PERMANENT_STATUS: dead-letter without a retry. What a killed worker had is
handled again when its lease ends. INT and TERM: finish the message, end with 0. The COMMAND of check and monitor reads
{"queue": ..., "dead": N, "oldest_s": AGE, "alert": true}.
Status: 0 done, 1 error, 2 nothing to show or to retry, 3 alert.
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

# Lease a message of queue $1 that may have $2 attempts. False if there is none.
take() {
    while found broker lease "$1" --for "${LEASE_S}s" >"$tmp/message.json"; do
        unpack
        if ((attempt <= $2)) || [[ $reason == stopped ]]; then return 0; fi
        settle "$1" 137 "$2" 0 # its last attempt ended the worker, as kill -9 does
    done
    return 1
}

# Say how the command for a message of queue $1 ended ($2). Of $3 attempts the next one comes after $4 milliseconds.
settle() {
    if (($2 == 0)); then
        broker ack "$1" "$lease"
    elif ! running; then # perhaps it failed because of the stop, which does not count
        broker release "$1" "$lease" --reason stopped
    elif ((attempt < $3)); then
        broker release "$1" "$lease" --delay "$4ms" --reason "exit status $2"
    else
        log "message $id goes to ${DEAD_LETTER:-$1.dead}: status $2, attempt $attempt"
        broker dead-letter "$1" "$lease" --to "${DEAD_LETTER:-$1.dead}" --reason "exit status $2 (attempt $attempt)"
    fi || log "message $id of $1 will be handled again: this worker has its lease no more"
}

# Handle what is in the queue, with so many attempts for each message. The first pause takes so long.
process() {
    local queue=$1 most=$2 first_ms=$3 status delay_ms
    shift 3
    while running; do
        if ! take "$queue" "$most"; then
            found broker list --pattern "$queue" >/dev/null || break # empty
            found broker peek "$queue" --wait 1s >/dev/null || true
            continue
        fi
        status=0 delay_ms=$((first_ms << (attempt > 20 ? 19 : attempt - 1)))
        ((delay_ms < MAX_BACKOFF_MS)) || delay_ms=$MAX_BACKOFF_MS
        handle "$queue" "$@" || status=$?
        settle "$queue" "$status" "$((status == PERMANENT_STATUS ? 1 : most))" "$delay_ms"
    done
}

# Bodies are data of strangers: -a escapes everything that a terminal could obey.
show() {
    found broker peek "$1.dead" --all --json >"$tmp/dead.json" || return 2
    jq -ac '{id: .timestamp, written: .timestamp[:-9] | tonumber | todate, reason,
             bytes: .message | utf8bytelength, start: .message[:60]}' "$tmp/dead.json" || die "cannot show it"
}

# Report on the dead-letter queue, and run the command if it is time for an alert.
# shellcheck disable=SC2016 # variables of jq
check() {
    found broker list --json --pattern "$1.dead" >"$tmp/list.json" || true
    jq -nc --arg queue "$1.dead" --slurpfile list "$tmp/list.json" --argjson max "$MAX_DEAD" --argjson age "$MAX_AGE_S" '
        ($list[0].total // 0) as $dead
        | ($list[0].oldest | if . then now - (.[:-9] | tonumber) | floor else 0 end) as $oldest
        | {queue: $queue, dead: $dead, oldest_s: $oldest, alert: ($dead > $max or $oldest > $age)}
    ' | tee "$tmp/report.json" || die "cannot write the report"
    jq -e .alert "$tmp/report.json" >/dev/null || return 0
    shift
    (($# == 0)) || "$@" <"$tmp/report.json" || die "the command for the alert failed with status $?"
    return 3
}

monitor() {
    while running; do
        (check "$@") || true # if the command failed, it runs again after the next look
        nap "$INTERVAL_MS"
    done
}

# shellcheck disable=SC2016 # what stands in single quotes is not for this shell
demo() {
    local self=("$BASH" "${BASH_SOURCE[0]}") old monitor report
    export BROKER_DEFAULT_DB_LOCATION=$tmp BROKER_DEFAULT_DB_NAME=demo.db BROKER_PROJECT_SCOPE=0
    export MAX_ATTEMPTS=2 BACKOFF_MS=10 PERMANENT_STATUS=65 MAX_DEAD=0 MAX_AGE_S=86400 INTERVAL_MS=100
    printf 'good\nbad: $(touch x)\n' | broker write mail --lines
    "${self[@]}" counted mail bash -c '! grep bad >>"$1"' try "$tmp/tried" 2>/dev/null
    expect "counted: only what failed $MAX_ATTEMPTS times is dead" "2 mail.dead: 1" "$(wc -l <"$tmp/tried") $(broker list)"
    "${self[@]}" retry mail >/dev/null
    "${self[@]}" backoff mail bash -c '((BROKER_ATTEMPT == 2))'
    expect "backoff: the second attempt worked, after a pause" "" "$(broker list)"
    old=$(broker write mail old -t) && broker write mail new
    "${self[@]}" backoff mail bash -c 'exit "$PERMANENT_STATUS"' 2>/dev/null
    expect "a permanent failure is dead after one attempt" "mail.dead: 2" "$(broker list)"
    mkfifo "$tmp/alerts"
    exec 4<>"$tmp/alerts"
    "${self[@]}" monitor mail bash -c 'cat >"$1"' tell "$tmp/alerts" >/dev/null &
    monitor=$!
    read -r -t 60 report <&4
    kill "$monitor" && wait "$monitor"
    expect "monitor: there is an alert" true "$(jq .alert <<<"$report")"
    "${self[@]}" retry mail --after "$old" >/dev/null
    expect "retry: only the newer one is back in its queue" "new" "$(broker peek mail --all)"
}

main() {
    prepare MAX_ATTEMPTS BACKOFF_MS MAX_BACKOFF_MS LEASE_S PERMANENT_STATUS MAX_DEAD MAX_AGE_S INTERVAL_MS
    case ${1:-}:$# in
        simple:* | counted:* | backoff:*) check_command "${3:-}" ;;&
        simple:*) guarded process "$2" 1 0 "${@:3}" ;;
        counted:*) guarded process "$2" "$MAX_ATTEMPTS" 0 "${@:3}" ;;
        backoff:*) guarded process "$2" "$MAX_ATTEMPTS" "$BACKOFF_MS" "${@:3}" ;;
        retry:*) found broker requeue "${@:2}" ;;
        monitor:1 | check:1) usage >&2 && exit 1 ;;
        monitor:*) guarded "$@" ;;
        show:2 | check:* | demo:1) "$@" ;;
        *) usage >&2 && exit 1 ;;
    esac
}

main "$@"
