#!/usr/bin/env bash
# Failures handled: counted retries, pauses that grow, a dead-letter queue, a second chance from it, a monitor.
#
# `broker work QUEUE --max-attempts 5 --backoff 500ms -- COMMAND` does the retries and the dead-lettering by itself.
# Copy this script for rules of your own, such as the exit status that means "never try this again".
#
# A dead-letter queue is an ordinary queue. Messages keep their ids on the way there and back, so they also keep their
# place in the order, and times mean when a message was written, not when it failed.
#
# Needs bash 4.4 and jq.

set -euo pipefail

# Settings. Each can be given in the environment.
MAX_ATTEMPTS=${MAX_ATTEMPTS:-5}
BACKOFF_MS=${BACKOFF_MS:-500}            # pause after the first failure; it doubles with each further one ...
MAX_BACKOFF_MS=${MAX_BACKOFF_MS:-300000} # ... up to this
LEASE_S=${LEASE_S:-300}                  # longer than any run of the command (resilient_worker.sh renews leases)
PERMANENT_STATUS=${PERMANENT_STATUS:-65} # the command says: this message will never work (65 is EX_DATAERR)
MAX_DEAD=${MAX_DEAD:-0}                  # alert when there are more dead messages than this ...
MAX_AGE_S=${MAX_AGE_S:-86400}            # ... or when the oldest was written longer ago than this
INTERVAL_S=${INTERVAL_S:-60}             # between two looks of the monitor

usage() {
    cat <<'END'
usage: dead_letter_queue.sh simple  QUEUE COMMAND [ARG...]    one attempt, then the dead-letter queue
       dead_letter_queue.sh counted QUEUE COMMAND [ARG...]    up to MAX_ATTEMPTS, without a pause
       dead_letter_queue.sh backoff QUEUE COMMAND [ARG...]    up to MAX_ATTEMPTS, pauses double from BACKOFF_MS
       dead_letter_queue.sh show    QUEUE                     the dead messages, a line of JSON each
       dead_letter_queue.sh retry   QUEUE [--after TS] [--before TS] [-n N]    move them back, those of a time or all
       dead_letter_queue.sh check   QUEUE [COMMAND [ARG...]]  look once: status 3 and COMMAND if it is time for an alert
       dead_letter_queue.sh monitor QUEUE [COMMAND [ARG...]]  look every INTERVAL_S: COMMAND when that changes
       dead_letter_queue.sh demo

The dead-letter queue of QUEUE is QUEUE.dead. The first three end when nothing in QUEUE is ready or leased. Their
COMMAND reads the body from standard input; status 0 means done, PERMANENT_STATUS: dead-letter without a retry. A
worker that dies gives its message back when the lease ends (at least once). The COMMAND of check and monitor reads
{"queue": ..., "dead": N, "oldest_s": AGE, "alert": true or false}. INT and TERM: finish the message, end with 0.

Status: 0 done, 1 error, 2 nothing to show or to retry, 3 alert.
Settings in the environment: MAX_ATTEMPTS BACKOFF_MS MAX_BACKOFF_MS LEASE_S PERMANENT_STATUS MAX_DEAD MAX_AGE_S
INTERVAL_S. The database is the one that `broker` uses here; see BROKER_DEFAULT_DB_LOCATION.
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

# Ctrl-C goes to everything in the terminal, and TERM may: only this script shall hear it.
shielded() {
    local status
    while true; do
        status=0
        (
            trap '' INT TERM
            exec "$@"
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

# --- retries

# Handle what is in the queue, with so many attempts for each message, and a pause after the first failed one.
process() {
    local queue=$1 max_attempts=$2 backoff_ms=$3 id attempt lease status
    shift 3
    while ((!stop)); do
        if ! found broker lease "$queue" --for "${LEASE_S}s" >"$tmp/message.json"; then
            wait_for_message "$queue" || break
            continue
        fi
        unpack
        if ((attempt > max_attempts)); then # it ended its workers before they could say so
            bury "$queue" "$lease" "$id"
            continue
        fi
        status=0
        handle "$queue" "$id" "$attempt" "$@" || status=$?
        if ((status == 0)); then
            broker ack "$queue" "$lease" || log "message $id was not acknowledged: it will be handled again"
            continue
        fi
        log "message $id: status $status, attempt $attempt of $max_attempts"
        if ((attempt < max_attempts && status != PERMANENT_STATUS)); then
            broker release "$queue" "$lease" --delay "$(pause_ms "$backoff_ms" "$attempt")ms" ||
                log "message $id was not released: it will be handled again when its lease ends"
        else
            bury "$queue" "$lease" "$id"
        fi
    done
}

# Wait until something is ready, a second at most. False if nothing is ready or leased (that includes pauses).
wait_for_message() {
    found broker list --json --pattern "$1" >"$tmp/list.json" || return 1
    [[ $(shielded jq '.ready + .leased' "$tmp/list.json") != 0 ]] || return 1
    found broker peek "$1" --wait 1s >/dev/null || true
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
        exec "$@" <"$tmp/body"
    )
}

# The pause after an attempt failed: it doubles from the first one on, up to MAX_BACKOFF_MS.
pause_ms() {
    local ms=$1 n
    for ((n = 1; n < $2 && ms < MAX_BACKOFF_MS; n++)); do ms=$((ms * 2)); done
    printf '%s\n' "$((ms < MAX_BACKOFF_MS ? ms : MAX_BACKOFF_MS))"
}

# Dead-letter a leased message, in two atomic steps. If we are killed between them, or another worker is faster than
# the second, the attempt still counts: whoever leases the message next tries it once more at most, or does the same.
bury() {
    local queue=$1 lease=$2 id=$3
    if broker release "$queue" "$lease" && found broker move "$queue" "$queue.dead" -m "$id" >/dev/null; then
        log "message $id moved to $queue.dead"
    else
        log "message $id was not moved to $queue.dead: someone else has it"
    fi
}

# --- the dead-letter queue

# Bodies are data of strangers: -a escapes everything that a terminal could obey.
show() {
    found broker peek "$1.dead" --all --json >"$tmp/dead.json" || return 2
    shielded jq -ac '{id: .timestamp, written: .timestamp[:-9] | tonumber | todate,
                      bytes: .message | utf8bytelength, start: .message[:60]}' "$tmp/dead.json" || die "cannot show it"
}

# Their attempts count from 0 again. Killed in between, some are moved and the others are not: run it again.
retry() {
    local queue=$1 some=(--all) range=() count
    shift
    while (($# > 1)); do
        case $1 in
            --after | --before) range+=("$1" "$2") ;;
            -n) some=(-n "$2") ;;
            *) die "retry takes --after TS, --before TS and -n N, not '$1'" ;;
        esac
        shift 2
    done
    (($# == 0)) || die "retry: not understood: '$1'"
    count=$(found broker move "$queue.dead" "$queue" --json "${some[@]}" "${range[@]}" | wc -l)
    printf '%s moved from %s.dead to %s\n' "$((count))" "$queue" "$queue"
}

# Write the report on the dead-letter queue to report.json.
# shellcheck disable=SC2016 # variables of jq
look() {
    local dead=$1.dead
    found broker list --json --pattern "$dead" >"$tmp/list.json" || true
    found broker peek "$dead" --json >"$tmp/oldest.json" || true
    shielded jq -nc --arg queue "$dead" --slurpfile list "$tmp/list.json" --slurpfile oldest "$tmp/oldest.json" \
        --argjson max_dead "$MAX_DEAD" --argjson max_age "$MAX_AGE_S" '
        ($list[0].total // 0) as $dead
        | (if $oldest == [] then 0 else now - ($oldest[0].timestamp[:-9] | tonumber) | floor end) as $age
        | {queue: $queue, dead: $dead, oldest_s: $age, alert: ($dead > $max_dead or $age > $max_age)}
    ' >"$tmp/report.json" || die "cannot write the report"
    alert=$(shielded jq .alert "$tmp/report.json") || die "cannot read the report"
}

# Run the command for an alert.
tell() {
    (
        trap '' INT
        exec "$@" <"$tmp/report.json"
    )
}

check() {
    look "$1"
    shift
    cat "$tmp/report.json"
    [[ $alert == true ]] || return 0
    (($# == 0)) || tell "$@" || die "the command for the alert failed with status $?"
    return 3
}

# The command runs when an alert begins or ends. If it fails, it runs again after the next look.
monitor() {
    local queue=$1 told=false
    shift
    while ((!stop)); do
        look "$queue"
        if [[ $alert != "$told" ]]; then
            cat "$tmp/report.json"
            if (($# == 0)) || tell "$@"; then
                told=$alert
            else
                log "the command for the alert failed with status $?"
            fi
        fi
        nap "$INTERVAL_S"
    done
}

# Sleep until a signal comes, or so long.
nap() {
    sleep "$1" >/dev/null 2>&1 &
    sleeper=$!
    ((!stop)) || kill "$sleeper" || true
    wait "$sleeper" || true
    sleeper=
}

request_stop() {
    stop=1
    [[ -z $sleeper ]] || kill "$sleeper" 2>/dev/null || true
}

# --- demo: every line that begins with "ok" was checked

check_that() {
    [[ $2 == "$3" ]] || die "demo: $1: expected $(printf %q "$2"), found $(printf %q "$3")"
    printf 'ok: %s\n' "$1"
}

# shellcheck disable=SC2016 # what stands in single quotes is not for this shell
demo() {
    local self=("$BASH" "${BASH_SOURCE[0]}") old new status monitor report
    export BROKER_DEFAULT_DB_LOCATION=$tmp BROKER_DEFAULT_DB_NAME=demo.db BROKER_PROJECT_SCOPE=0
    export MAX_ATTEMPTS=2 BACKOFF_MS=10 PERMANENT_STATUS=65 MAX_DEAD=0 MAX_AGE_S=86400 INTERVAL_S=0.5

    printf 'good\nbad: $(touch x)\n' | broker write mail --lines
    "${self[@]}" simple mail bash -c '! grep -q bad'
    check_that "simple: only the message that failed is dead" "mail.dead: 1" "$(broker list)"

    "${self[@]}" retry mail
    "${self[@]}" counted mail bash -c 'printf %s "$BROKER_ATTEMPT" >>"$1"; exit 1' try "$tmp/counted"
    check_that "counted: it was tried $MAX_ATTEMPTS times, then moved" 12 "$(<"$tmp/counted")"

    "${self[@]}" retry mail
    "${self[@]}" backoff mail bash -c '((BROKER_ATTEMPT == 2))'
    check_that "backoff: the second attempt worked, after a pause" "" "$(broker list)"

    printf 'old\nnew\n' | broker write mail --lines -t >"$tmp/ids"
    { read -r old && read -r new; } <"$tmp/ids"
    "${self[@]}" backoff mail bash -c 'exit "$PERMANENT_STATUS"'
    check_that "a permanent failure is dead after one attempt" "mail.dead: 2" "$(broker list)"

    status=0
    "${self[@]}" check mail || status=$?
    check_that "check: there is an alert" 3 "$status"
    mkfifo "$tmp/alerts"
    exec 4<>"$tmp/alerts"
    "${self[@]}" monitor mail bash -c 'cat >"$1"' tell "$tmp/alerts" &
    monitor=$!
    read -r -t 60 report <&4
    check_that "monitor: the alert began" true "$(jq .alert <<<"$report")"

    "${self[@]}" retry mail --after "$old"
    check_that "retry: only the newer one is back in its queue" "new" "$(broker peek mail --all)"
    "${self[@]}" retry mail --before "$new"
    read -r -t 60 report <&4
    check_that "monitor: the alert ended" false "$(jq .alert <<<"$report")"
    kill "$monitor"
    wait "$monitor"
    printf 'ok: monitor: stopped at TERM\n'
}

# --- main

check_settings() {
    local name
    ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "needs bash 4.4 or newer, this is $BASH_VERSION"
    type -P jq >/dev/null || die "needs jq"
    type -P "${broker_command[0]}" >/dev/null || die "no '${broker_command[0]}': install SimpleBroker or set BROKER"
    for name in MAX_ATTEMPTS BACKOFF_MS MAX_BACKOFF_MS LEASE_S PERMANENT_STATUS MAX_DEAD MAX_AGE_S; do
        [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "$name is '${!name}': give a whole number"
    done
    ((LEASE_S > 0 && MAX_ATTEMPTS > 0)) || die "LEASE_S and MAX_ATTEMPTS must be at least 1"
    [[ $INTERVAL_S =~ ^[0-9]+([.][0-9]+)?$ ]] || die "INTERVAL_S is '$INTERVAL_S': give seconds"
}

check_command() { type -P "$1" >/dev/null || die "no command '$1': nothing was taken"; }

main() {
    local action=${1:-} queue=${2:-}
    check_settings
    tmp=$(mktemp -d) # stays behind after kill -9
    trap 'rm -rf -- "$tmp"' EXIT
    stop=0 sleeper=
    trap request_stop INT TERM
    case $action:$# in
        simple:[012] | counted:[012] | backoff:[012]) usage >&2 && exit 1 ;;
        simple:* | counted:* | backoff:*)
            shift 2
            check_command "$1"
            case $action in
                simple) process "$queue" 1 0 "$@" ;;
                counted) process "$queue" "$MAX_ATTEMPTS" 0 "$@" ;;
                backoff) process "$queue" "$MAX_ATTEMPTS" "$BACKOFF_MS" "$@" ;;
            esac
            ;;
        show:2) show "$queue" ;;
        retry:* | check:* | monitor:*)
            (($# > 1)) || { usage >&2 && exit 1; }
            shift
            "$action" "$@"
            ;;
        demo:1) demo ;;
        help:1 | -h:1 | --help:1) usage ;;
        *) usage >&2 && exit 1 ;;
    esac
}

main "$@"
