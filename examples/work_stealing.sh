#!/usr/bin/env bash
# Work spread over several queues and workers: in turn, to the least loaded, by stealing, by priority.
# One queue that all workers share is balanced without any of this: `broker work QUEUE -j 4 COMMAND`, here and in other
# terminals. This script shows beyond it: a queue for each worker, for work that shall stay with one worker as long as it
# keeps up, such as a tenant, a warm cache or a device.
# Nothing is lost or doubled by the distribution: each move is atomic. Workers are at least once: when one is killed,
# its message is handled again after its lease ends, and the others empty its queue. A worker steals by leasing from
# another queue and not by moving, so that attempts are counted on, and a thief that dies gives back what it stole.
# Needs bash 4.4 and jq. Dealing takes a broker command for each message.

set -euo pipefail

# Settings. Each can be given in the environment.
LEASE_S=${LEASE_S:-300}         # longer than any run of the command (`broker work` renews leases)
MAX_ATTEMPTS=${MAX_ATTEMPTS:-5} # then the message goes to the dead-letter queue
RETRY_MS=${RETRY_MS:-1000}      # pause after a failure (dead_letter_queue.sh has growing ones)
IDLE_MS=${IDLE_MS:-500}         # how long an idle worker waits before it looks at the other queues again
INTERVAL_S=${INTERVAL_S:-2}     # between two reports of the monitor
DEAD_LETTER=${DEAD_LETTER:-}    # name of the dead-letter queue; empty: QUEUE.dead

usage() {
    cat <<'END_OF_USAGE'
usage: work_stealing.sh round-robin  SOURCE QUEUE...     deal what is ready in SOURCE to the queues in turn
       work_stealing.sh least-loaded SOURCE QUEUE...     each message to the queue with the fewest ready and leased
       work_stealing.sh steal        QUEUE OTHER...      move half of the longest other queue to QUEUE
       work_stealing.sh priority     QUEUE... -- COMMAND [ARG...]        one worker, the first queue that has some
       work_stealing.sh worker       QUEUE OTHER... -- COMMAND [ARG...]  one worker: its QUEUE first, then the longest
       work_stealing.sh run          N QUEUE COMMAND [ARG...]            deal QUEUE to QUEUE.1 ... QUEUE.N, N workers
       work_stealing.sh demo
Workers end when their queues are empty. COMMAND reads the body from standard input and finds BROKER_QUEUE,
BROKER_MESSAGE_ID and BROKER_ATTEMPT in its environment; status 0 means done. INT and TERM: finish the messages, end
with 0. Status: 0 done, 1 error, 2 nothing to deal or to steal.
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

# What a jq program makes of the list of the given queues. A queue that does not exist holds nothing.
# shellcheck disable=SC2016 # variables of jq
loads() {
    local program=$1
    shift
    found broker list --json | jq -rs 'INDEX(.queue) as $all | $ARGS.positional
        | map({queue: ., ready: ($all[.].ready // 0), leased: ($all[.].leased // 0), total: ($all[.].total // 0)}) | '"$program" \
        --args "$@" || die "cannot read the list of queues"
}

# Deal the messages of a queue: each to the queue which the function $1 names.
deal() {
    local choose=$1 source=$2 queue count=0
    shift 2
    while "$choose" "$count" "$@" && found broker move "$source" "$queue" -q; do count=$((count + 1)); done
    printf '%s dealt from %s\n' "$count" "$source"
    ((count)) || return 2
}

in_turn() { queue=${*:2 + $1 % ($# - 1):1}; }
least_loaded() { queue=$(loads 'min_by(.ready + .leased).queue' "${@:2}") || exit 1; }

# The oldest half, because it has waited longest. Its attempts count from 0 again: this is for what was not tried yet.
steal() {
    local longest ready victim
    longest=$(loads 'max_by(.ready) | "\(.ready) \(.queue)"' "${@:2}") || exit 1
    read -r ready victim <<<"$longest"
    ((ready)) || return 2
    found broker move "$victim" "$1" -n "$(((ready + 1) / 2))" -q || return 2
}

# One worker, with arguments QUEUE... -- COMMAND. It asks the function $1 for a message.
work() {
    local from=$1 queues=() queue status
    shift
    while (($#)) && [[ $1 != -- ]]; do
        queues+=("$1")
        shift
    done
    ((${#queues[@]})) || die "give queues, --, and a command"
    check_command "${2:-}"
    while running; do
        if "$from" "${queues[@]}"; then
            status=0
            handle "$queue" "${@:2}" || status=$?
            settle "$queue" "$status" "$MAX_ATTEMPTS" "$RETRY_MS"
        elif [[ $(loads 'map(.total) | add' "${queues[@]}") == 0 ]]; then
            break
        else
            found broker peek "${queues[0]}" --wait "${IDLE_MS}ms" >/dev/null || true
        fi
    done
}

first_of() {
    for queue in "$@"; do ! take "$queue" "$MAX_ATTEMPTS" || return 0; done
    return 1
}

own_or_longest() { first_of "$1" || first_of "$(loads 'max_by(.ready).queue' "$@")"; }

# Several workers, which are processes, and a monitor. Killed with -9, this leaves them to finish what they have.
run() {
    local source=$2 queues=() workers=() i scratch=$tmp
    [[ $1 =~ ^[1-9][0-9]?$ ]] || die "'$1' is not a number of workers: give 1 to 99"
    check_command "$3"
    DEAD_LETTER=${DEAD_LETTER:-$source.dead}
    for ((i = 1; i <= $1; i++)); do queues+=("$source.$i"); done
    deal in_turn "$source" "${queues[@]}" || true
    for ((i = 0; i < $1; i++)); do # what arrives in the source from now on can be stolen there
        tmp=$scratch/$i
        mkdir "$tmp"
        work own_or_longest "${queues[i]}" "${queues[@]:0:i}" "${queues[@]:i+1}" "$source" -- "${@:3}" &
        workers+=("$!")
    done
    report "$source" &
    for i in "${!workers[@]}"; do
        wait "${workers[i]}" || log "worker $((i + 1)) ended with status $?: its messages are for the others"
    done
    { kill -KILL "$!" && wait "$!"; } 2>/dev/null || true # silently; after a stop it ends by itself
    ! running || [[ $(loads 'map(.total) | add' "${queues[@]}" "$source") == 0 ]] || die "messages are left: start again"
}

report() {
    while sleep "$INTERVAL_S" &>/dev/null && running; do found broker list --stats --pattern "$1.*" >&2 || true; done
}

# shellcheck disable=SC2016 # what stands in single quotes is not for this shell
demo() {
    local self=("$BASH" "${BASH_SOURCE[0]}") kill_once
    export BROKER_DEFAULT_DB_LOCATION=$tmp BROKER_DEFAULT_DB_NAME=demo.db BROKER_PROJECT_SCOPE=0
    export LEASE_S=1 IDLE_MS=500 INTERVAL_S=1 DEAD_LETTER=
    printf '%s\n' 1 2 3 | broker write in --lines
    "${self[@]}" round-robin in a b
    expect "round robin: in turn" $'a: 2\nb: 1' "$(broker list)"
    broker write in 4
    "${self[@]}" least-loaded in a b c
    expect "least loaded: to the empty queue" $'a: 2\nb: 1\nc: 1' "$(broker list)"
    "${self[@]}" steal d a b
    expect "stealing: the oldest half of the longest queue" 1 "$(broker read d)"
    "${self[@]}" priority c a b -- bash -c 'cat >>"$1"' note "$tmp/order"
    expect "priority: the first queue first" 432 "$(<"$tmp/order")"
    # The command kills its worker, which is its parent, once. Another one does its work when the lease has ended.
    kill_once=(bash -c 'printf "%s\n" "$(cat)"; if mkdir "$1" 2>/dev/null; then kill -KILL "$PPID"; fi' command)
    printf '%s\n' 1 2 | broker write jobs --lines
    "${self[@]}" run 2 jobs "${kill_once[@]}" "$tmp/killed" >"$tmp/done" 2>/dev/null
    expect "two workers, one of them killed with -9: everything was handled" \
        "1 2 " "$(grep -x '[0-9]' "$tmp/done" | sort -u | tr '\n' ' ')"
    expect "and nothing is left" "" "$(broker list)"
}

main() {
    prepare LEASE_S MAX_ATTEMPTS RETRY_MS IDLE_MS INTERVAL_S
    case ${1:-}:$# in
        *:[012] | run:3) [[ $* == demo ]] || { usage >&2 && exit 1; } ;;&
        round-robin:*) deal in_turn "${@:2}" ;;
        least-loaded:*) deal least_loaded "${@:2}" ;;
        steal:* | demo:1) "$@" ;;
        priority:*) guarded work first_of "${@:2}" ;;
        worker:*) guarded work own_or_longest "${@:2}" ;;
        run:*) guarded "$@" ;;
        *) usage >&2 && exit 1 ;;
    esac
}

main "$@"
