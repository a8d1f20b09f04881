#!/usr/bin/env bash
# Work spread over several queues and workers: in turn, to the least loaded, by stealing, by priority.
#
# One queue that all workers share is balanced without any of this: `broker work QUEUE -j 4 -- COMMAND`, here and in
# other terminals. A queue for each worker is for work that shall stay with one worker as long as it keeps up, such as a
# tenant, a warm cache or a device.
#
# Nothing is lost or doubled by the distribution: each move is atomic. Workers are at least once: when one is killed,
# its message is handled again after its lease ends, and the others empty its queue. A worker steals by leasing from
# another queue and not by moving, so that attempts are counted on, and a thief that dies gives back what it stole.
#
# Needs bash 4.4 and jq. Dealing takes a broker command for each message: some 20 in a second.

set -euo pipefail

# Settings. Each can be given in the environment.
LEASE_S=${LEASE_S:-300}         # longer than any run of the command (resilient_worker.sh renews leases)
MAX_ATTEMPTS=${MAX_ATTEMPTS:-5} # then the message goes to the dead-letter queue
RETRY_MS=${RETRY_MS:-1000}      # pause after a failure (dead_letter_queue.sh has growing ones)
IDLE_MS=${IDLE_MS:-500}         # how long an idle worker waits before it looks at the other queues again
INTERVAL_S=${INTERVAL_S:-2}     # between two reports of the monitor
DEAD_LETTER=${DEAD_LETTER:-}    # name of the dead-letter queue; empty: QUEUE.dead

usage() {
    cat <<'END'
usage: work_stealing.sh round-robin  SOURCE QUEUE...     deal what is ready in SOURCE to the queues in turn
       work_stealing.sh least-loaded SOURCE QUEUE...     each message to the queue with the fewest ready and leased
       work_stealing.sh steal        QUEUE OTHER...      move half of the longest other queue to QUEUE
       work_stealing.sh priority     QUEUE... -- COMMAND [ARG...]        one worker, the first queue that has some
       work_stealing.sh worker       QUEUE OTHER... -- COMMAND [ARG...]  one worker: its QUEUE first, then the longest
       work_stealing.sh run          N QUEUE COMMAND [ARG...]            deal QUEUE to QUEUE.1 ... QUEUE.N, N workers
       work_stealing.sh demo

Workers end when nothing in their queues is ready or leased. COMMAND reads the body from standard input and finds
BROKER_QUEUE, BROKER_MESSAGE_ID and BROKER_ATTEMPT in its environment; status 0 means done. With strict priority the
last queue waits as long as the others have messages. INT and TERM: finish the messages, end with 0.

Status: 0 done, 1 error, 2 nothing to deal or to steal.
Settings in the environment: LEASE_S MAX_ATTEMPTS RETRY_MS IDLE_MS INTERVAL_S DEAD_LETTER. The database is the one that
`broker` uses here; see BROKER_DEFAULT_DB_LOCATION.
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

# --- distribution

round_robin() {
    local source=$1 queue count=0
    shift
    while ((!stop)); do
        for queue in "$@"; do
            found broker move "$source" "$queue" >/dev/null || break 2
            count=$((count + 1))
        done
    done
    dealt "$count" "$source"
}

least_loaded() {
    local source=$1 queue count=0
    shift
    while ((!stop)); do
        queue=$(loads 'min_by(.ready + .leased).queue' "$@")
        found broker move "$source" "$queue" >/dev/null || break
        count=$((count + 1))
    done
    dealt "$count" "$source"
}

dealt() {
    printf '%s dealt from %s\n' "$1" "$2"
    (($1)) || return 2
}

# The oldest half, because it has waited longest. Its attempts count from 0 again: this is for what was not tried yet.
steal() {
    local queue=$1 longest ready victim count
    shift
    longest=$(loads 'max_by(.ready) | "\(.ready) \(.queue)"' "$@")
    read -r ready victim <<<"$longest"
    ((ready)) || return 2
    found broker move "$victim" "$queue" -n "$(((ready + 1) / 2))" --json >"$tmp/stolen.json" || return 2
    count=$(wc -l <"$tmp/stolen.json")
    printf '%s stolen from %s\n' "$((count))" "$victim"
}

# What a jq program makes of the list of the given queues. A queue that does not exist holds nothing.
# shellcheck disable=SC2016 # variables of jq
loads() {
    local program=$1
    shift
    found broker list --json | shielded jq -rs 'INDEX(.queue) as $all | $ARGS.positional
        | map({queue: ., ready: ($all[.].ready // 0), leased: ($all[.].leased // 0)}) | '"$program" --args "$@" ||
        die "cannot read the list of queues"
}

# --- workers

# Lease a message from the first of these queues that has one.
lease_from() {
    for taken_from in "$@"; do
        if found broker lease "$taken_from" --for "${LEASE_S}s" >"$tmp/message.json"; then return; fi
    done
    return 1
}

# Run the command for the leased message, and acknowledge, release or dead-letter it.
handle() {
    local queue=$taken_from id attempt lease status=0
    # The first line is for us, the rest is the body, byte for byte.
    shielded jq -j '"\(.timestamp) \(.attempt) \(.lease)\n", .message' "$tmp/message.json" >"$tmp/unpacked" ||
        die "cannot unpack the message"
    read -r id attempt lease <"$tmp/unpacked"
    shielded tail -n +2 "$tmp/unpacked" >"$tmp/body" || die "cannot write '$tmp/body'"
    if ((attempt > MAX_ATTEMPTS)); then # it ended its workers before they could say so
        bury "$queue" "$lease" "$id"
        return
    fi
    (
        trap '' INT
        export BROKER_QUEUE=$queue BROKER_MESSAGE_ID=$id BROKER_ATTEMPT=$attempt
        exec "$@" <"$tmp/body"
    ) || status=$?
    if ((status == 0)); then
        broker ack "$queue" "$lease" || log "message $id was not acknowledged: it will be handled again"
        return
    fi
    log "message $id of $queue: status $status, attempt $attempt of $MAX_ATTEMPTS"
    if ((attempt < MAX_ATTEMPTS)); then
        broker release "$queue" "$lease" --delay "${RETRY_MS}ms" ||
            log "message $id was not released: it will be handled again when its lease ends"
    else
        bury "$queue" "$lease" "$id"
    fi
}

# Dead-letter a leased message, in two atomic steps. If we are killed between them, or another worker is faster than
# the second, the attempts are still used up: whoever leases the message next does the same.
bury() {
    local queue=$1 lease=$2 id=$3 dead=${DEAD_LETTER:-$1.dead}
    if broker release "$queue" "$lease" && found broker move "$queue" "$dead" -m "$id" >/dev/null; then
        log "message $id moved to $dead"
    else
        log "message $id was not moved to $dead: someone else has it"
    fi
}

idle() { found broker peek "$1" --wait "${IDLE_MS}ms" >/dev/null || true; }

# Split the arguments at the -- into queues and command.
parse() {
    queues=()
    while (($#)) && [[ $1 != -- ]]; do
        queues+=("$1")
        shift
    done
    command=("${@:2}")
    ((${#queues[@]} && ${#command[@]})) || die "give queues, --, and a command"
    type -P "${command[0]}" >/dev/null || die "no command '${command[0]}': nothing was taken"
}

priority() {
    local queues command left
    parse "$@"
    while ((!stop)); do
        if lease_from "${queues[@]}"; then
            handle "${command[@]}"
            continue
        fi
        left=$(loads 'map(.ready + .leased) | add' "${queues[@]}")
        ((left)) || break
        idle "${queues[0]}"
    done
}

worker() {
    local queues command look left ready longest handled=0 stolen=0
    parse "$@"
    while ((!stop)); do
        if ! lease_from "${queues[0]}"; then
            look=$(loads '"\(map(.ready + .leased) | add) \(max_by(.ready) | "\(.ready) \(.queue)")"' "${queues[@]}")
            read -r left ready longest <<<"$look"
            ((left)) || break
            if ! { ((ready)) && lease_from "$longest"; }; then
                idle "${queues[0]}"
                continue
            fi
            stolen=$((stolen + 1))
        fi
        handled=$((handled + 1))
        handle "${command[@]}"
    done
    printf '%s: %s handled, %s of them stolen\n' "${queues[0]}" "$handled" "$stolen"
}

# --- several workers, which are processes, and a monitor. Killed with -9, this leaves the workers to finish.

run() {
    local n=$1 source=$2 queues=() i monitor left
    shift 2
    [[ $n =~ ^[1-9][0-9]{0,2}$ ]] || die "'$n' is not a number of workers: give 1 to 999"
    type -P "$1" >/dev/null || die "no command '$1': nothing was taken"
    export DEAD_LETTER=${DEAD_LETTER:-$source.dead}
    for ((i = 1; i <= n; i++)); do queues+=("$source.$i"); done
    round_robin "$source" "${queues[@]}" || true
    for ((i = 0; i < n; i++)); do # what arrives in the source from now on can be stolen there
        "$BASH" "${BASH_SOURCE[0]}" worker "${queues[i]}" "${queues[@]:0:i}" "${queues[@]:i+1}" "$source" -- "$@" &
        workers+=("$!")
    done
    ((!stop)) || request_stop
    exec 3> >(monitor "$source")
    monitor=$!
    for i in "${!workers[@]}"; do
        while kill -0 "${workers[i]}" 2>/dev/null; do wait "${workers[i]}" || true; done # a signal ends wait, too
        wait "${workers[i]}" || log "worker $((i + 1)) ended with status $?: its messages are for the others"
    done
    exec 3>&- # the monitor ends
    wait "$monitor" || log "the monitor ended with status $?"
    left=$(loads 'map(.ready + .leased) | add' "${queues[@]}" "$source")
    ((stop || left == 0)) || die "$left messages are left: start again when their leases have ended"
}

# Report until our standard input ends: then its other end, the script, is done or was killed.
monitor() {
    local status=0
    trap '' INT TERM
    while ((status == 0 || status > 128)); do # 0: something to read, > 128: nothing for so long
        status=0
        read -r -t "$INTERVAL_S" || status=$?
        ((status <= 128)) || found broker list --stats --pattern "$1.*" >&2 || true
    done
}

request_stop() {
    stop=1
    ((${#workers[@]} == 0)) || kill "${workers[@]}" 2>/dev/null || true
}

# --- demo: every line that begins with "ok" was checked

check() {
    [[ $2 == "$3" ]] || die "demo: $1: expected $(printf %q "$2"), found $(printf %q "$3")"
    printf 'ok: %s\n' "$1"
}

# shellcheck disable=SC2016 # what stands in single quotes is not for this shell
demo() {
    local self=("$BASH" "${BASH_SOURCE[0]}")
    export BROKER_DEFAULT_DB_LOCATION=$tmp BROKER_DEFAULT_DB_NAME=demo.db BROKER_PROJECT_SCOPE=0
    export LEASE_S=1 IDLE_MS=300 INTERVAL_S=1 DEAD_LETTER=

    printf '%s\n' 1 2 3 | broker write in --lines
    "${self[@]}" round-robin in a b
    check "round robin: in turn" $'a: 2\nb: 1' "$(broker list)"
    broker write in 4
    "${self[@]}" least-loaded in a b c
    check "least loaded: to the empty queue" $'a: 2\nb: 1\nc: 1' "$(broker list)"
    "${self[@]}" steal d a b
    check "stealing: the oldest half of the longest queue" 1 "$(broker read d)"

    "${self[@]}" priority c a b -- bash -c 'cat >>"$1"' note "$tmp/order"
    check "priority: the first queue first" 432 "$(<"$tmp/order")"

    # The command kills its worker, which is its parent, once. Another one does its work when the lease has ended.
    local kill_once=(bash -c 'printf "%s\n" "$(cat)"; if mkdir "$1" 2>/dev/null; then kill -KILL "$PPID"; fi' command)
    printf '%s\n' 1 2 3 4 | broker write jobs --lines
    "${self[@]}" run 2 jobs "${kill_once[@]}" "$tmp/killed" >"$tmp/done"
    cat "$tmp/done"
    check "two workers, one of them killed with -9: everything was handled" \
        "1 2 3 4 " "$(grep -x '[0-9]' "$tmp/done" | sort -u | tr '\n' ' ')"
    check "and nothing is left" "" "$(broker list)"
}

# --- main

check_settings() {
    local name
    ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "needs bash 4.4 or newer, this is $BASH_VERSION"
    type -P jq >/dev/null || die "needs jq"
    type -P "${broker_command[0]}" >/dev/null || die "no '${broker_command[0]}': install SimpleBroker or set BROKER"
    for name in LEASE_S MAX_ATTEMPTS RETRY_MS IDLE_MS; do
        [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "$name is '${!name}': give a whole number"
    done
    ((LEASE_S > 0 && MAX_ATTEMPTS > 0)) || die "LEASE_S and MAX_ATTEMPTS must be at least 1"
    [[ $INTERVAL_S =~ ^[0-9]+([.][0-9]+)?$ && $INTERVAL_S =~ [1-9] ]] || die "INTERVAL_S is '$INTERVAL_S': give seconds"
}

main() {
    check_settings
    tmp=$(mktemp -d) # stays behind after kill -9
    trap 'rm -rf -- "$tmp"' EXIT
    stop=0 workers=()
    trap request_stop INT TERM
    case ${1:-}:$# in
        round-robin:[12] | least-loaded:[12] | steal:[12] | run:[123]) usage >&2 && exit 1 ;;
        round-robin:*) round_robin "${@:2}" ;;
        least-loaded:*) least_loaded "${@:2}" ;;
        steal:* | priority:* | worker:* | run:* | demo:1) "$@" ;;
        help:1 | -h:1 | --help:1) usage ;;
        *) usage >&2 && exit 1 ;;
    esac
}

main "$@"
