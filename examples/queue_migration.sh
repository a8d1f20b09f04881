#!/usr/bin/env bash
# Messages moved between queues, and between databases: select, split, merge, transform, back up, restore, verify.
#
# `broker rename`, `move --all --after --before`, `dump` and `load` do the plain cases by themselves, and `broker work`
# runs a command for each message. This script shows beyond them: selecting by content, ages, small steps with pauses,
# new bodies, and backups that are checked. A move keeps the id, and with it the place in the order of age; it takes the
# ready messages only and leaves what is leased or delayed.
#
# What happens if this is killed in the middle:
#   moves       each step is atomic. No message is lost or doubled; run the command again to go on.
#   transform   write, then acknowledge: at least once. The message it was at is transformed again when its lease ends.
#   backup      the old file or the new one is there, never half of it.
#   restore     all or nothing.
# Needs bash 4.4 and jq. Selecting by content takes a broker command for each message: some 20 in a second.

set -euo pipefail

# Settings. Each can be given in the environment.
STEP=${STEP:-100}       # messages in one step
PAUSE_S=${PAUSE_S:-1}   # between steps, so that others get a turn
LEASE_S=${LEASE_S:-300} # longer than any run of the command of `transform`

usage() {
    cat <<'END_OF_USAGE'
usage: queue_migration.sh rename    SOURCE DEST           what is leased or delayed too
       queue_migration.sh content   SOURCE DEST REGEX     bodies that match (regular expression of jq)
       queue_migration.sh older     SOURCE DEST AGE       written longer ago than 90s, 5m, 2h or 7d
       queue_migration.sh newer     SOURCE DEST AGE       written since then
       queue_migration.sh steps     SOURCE DEST           STEP at a time with pauses, up to the newest at the start
       queue_migration.sh split     SOURCE FIELD          by a field of JSON bodies, to SOURCE.VALUE or SOURCE.other
       queue_migration.sh merge     DEST SOURCE...        in the order of age
       queue_migration.sh transform SOURCE DEST COMMAND [ARG...]
       queue_migration.sh backup    FILE [PATTERN]        all queues, or those that match a shell pattern
       queue_migration.sh restore   FILE                  fails, and changes nothing, if one of the ids exists
       queue_migration.sh verify    FILE [PATTERN]        does the database hold what the backup holds, no more?
       queue_migration.sh demo

COMMAND of transform reads a body from standard input and writes the new one to standard output, both byte for byte. If
its status is not 0, the message goes to SOURCE.failed unchanged. New messages have new ids, in the old order.
Status: 0 done, 1 error, 2 nothing there, 3 not everything: messages that failed, are held, or differ (verify).
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

# Take message.json apart: id, attempt, lease and reason into variables, the body into a file, byte for byte.
# shellcheck disable=SC2034 # not every script uses all of these variables
unpack() {
    jq -j '"\(.timestamp) \(.attempt) \(.lease) \(.reason // "")\n", .message' "$tmp/message.json" >"$tmp/unpacked" ||
        die "cannot unpack the message"
    read -r id attempt lease reason <"$tmp/unpacked"
    tail -n +2 "$tmp/unpacked" >"$tmp/body" || die "cannot write '$tmp/body'"
}

jq() { command jq "$@" || die "jq failed with status $?"; } # its 2 does not mean that nothing is there

# What is moved is printed, a line each, and only the lines are of interest.
move_and_count() { count=$(broker move "$@" --json | wc -l); }

# Move what is ready, within the bounds that follow.
move_all() {
    local source=$1 dest=$2 count
    shift 2
    found move_and_count "$source" "$dest" --all "$@" || return 2
    printf '%s moved from %s to %s\n' "$((count))" "$source" "$dest"
}

merge() {
    local dest=$1 source status=2
    shift
    for source in "$@"; do
        if move_all "$source" "$dest"; then status=0; fi
    done
    return "$status"
}

# Move what was written before or after (the option $4) the time that was so long ago.
by_age() {
    local unit_s=1
    [[ $3 =~ ^([1-9][0-9]{0,8})([smhd])$ ]] || die "'$3' is not an age: write 90s, 5m, 2h or 7d"
    case ${BASH_REMATCH[2]} in m) unit_s=60 ;; h) unit_s=3600 ;; d) unit_s=86400 ;; esac
    move_all "$1" "$2" "$4" "$(($(date +%s) - BASH_REMATCH[1] * unit_s))s"
}

# The newest id at the start is the bound, so that this ends while others go on writing.
steps() {
    local source=$1 dest=$2 last count total=0
    found broker --status --json >"$tmp/status.json" || return 2
    last=$(jq -r .last_ts "$tmp/status.json")
    while found move_and_count "$source" "$dest" -n "$STEP" --before "$((last + 1))"; do
        total=$((total + count))
        printf '%s moved from %s to %s\n' "$total" "$source" "$dest"
        ((count == STEP)) || break
        sleep "$PAUSE_S"
    done
    ((total)) || return 2
}

# Write what the jq program makes of each ready message to a file. The ids in it are moved one by one later: a message
# that somebody else takes in the meantime is left alone.
select_from() {
    local source=$1
    shift
    { found broker peek "$source" --all --json || true; } | jq -r "$@" >"$tmp/selected"
    [[ -s $tmp/selected ]] || return 2
}

# shellcheck disable=SC2016 # a variable of jq
content() {
    select_from "$1" --arg regex "$3" 'select(.message | test($regex)) | .timestamp'
    move_selected "$1" "$2"
}

# Values come from the bodies: only those that are good names become one. \A and \z, because $ allows a newline.
split() {
    # shellcheck disable=SC2016 # variables of jq
    select_from "$1" --arg field "$2" '
        (try (.message | fromjson | .[$field]) catch null) as $value
        | ($value | type) as $type
        | (if $type == "string" or $type == "boolean" or ($type == "number" and $value > -9e15 and $value < 9e15)
           then $value | tostring else "" end) as $name
        | "\(.timestamp) \(if $name | test("\\A[A-Za-z0-9_.-]{1,100}\\z") then $name else "other" end)"'
    move_selected "$1"
}

move_selected() {
    local source=$1 dest=${2:-} id name count=0
    while read -r id name; do
        if found broker move "$source" "${dest:-$source.$name}" -m "$id" </dev/null >/dev/null; then
            count=$((count + 1))
        fi
    done <"$tmp/selected"
    printf '%s moved from %s\n' "$count" "$source"
}

# Lease, run the command, write, acknowledge.
transform() {
    local source=$1 dest=$2 failed=0 count=0
    shift 2
    [[ $source != "$dest" ]] || die "transform needs two queues: it would never end"
    check_command "$1"
    while found broker lease "$source" --for "${LEASE_S}s" >"$tmp/message.json"; do
        unpack
        if "$@" <"$tmp/body" >"$tmp/new" && broker write "$dest" - <"$tmp/new"; then
            broker ack "$source" "$lease" || log "message $id was not acknowledged: it may be in $dest twice"
            count=$((count + 1))
        else
            failed=3
            broker dead-letter "$source" "$lease" --to "$source.failed" --reason "transform failed" ||
                log "message $id failed, and somebody else has it now"
        fi
    done
    printf '%s transformed from %s to %s\n' "$count" "$source" "$dest"
    if found broker list --stats --pattern "$source"; then failed=3; fi
    ((failed || count)) || return 2
    return "$failed"
}

backup() {
    local file=$1 pattern=(${2:+--pattern "$2"})
    found broker --status >/dev/null || die "the old '$file' is left as it is"
    (umask 077 && broker dump "${pattern[@]}" >"$file.new")
    sync -- "$file.new"
    mv -f -- "$file.new" "$file"
    printf '%s messages in %s\n' "$(($(wc -l <"$file") - 1))" "$file"
}

verify() {
    local file=$1 pattern=(${2:+--pattern "$2"}) missing extra
    messages <"$file" >"$tmp/wanted"
    broker dump "${pattern[@]}" | messages >"$tmp/present"
    missing=$(LC_ALL=C comm -23 "$tmp/wanted" "$tmp/present" | wc -l)
    extra=$(LC_ALL=C comm -13 "$tmp/wanted" "$tmp/present" | wc -l)
    printf '%s missing, %s not in the backup\n' "$((missing))" "$((extra))"
    ((missing + extra == 0)) || return 3
}

messages() { jq -c 'select(.type == "message") | [.queue, .id, .body]' | LC_ALL=C sort; }

# shellcheck disable=SC2016 # it is not meant to expand
demo() {
    local self=("$BASH" "${BASH_SOURCE[0]}") status=0
    export BROKER_DEFAULT_DB_LOCATION=$tmp BROKER_DEFAULT_DB_NAME=demo.db BROKER_PROJECT_SCOPE=0 STEP=2 PAUSE_S=0
    printf '{"kind": "%s"}\n' mail print mail '../$(x)' | broker write in --lines
    "${self[@]}" rename in jobs
    "${self[@]}" content jobs urgent '"print"'
    expect "rename, and select by content" $'jobs: 3\nurgent: 1' "$(broker list)"
    "${self[@]}" merge jobs urgent
    "${self[@]}" split jobs kind
    expect "merge, and split by a field" $'jobs.mail: 2\njobs.other: 1\njobs.print: 1' "$(broker list)"
    "${self[@]}" newer jobs.mail recent 1h
    "${self[@]}" steps recent all
    expect "by time, and in steps" $'all: 2\njobs.other: 1\njobs.print: 1' "$(broker list)"
    "${self[@]}" transform all names jq -j .kind
    expect "transform, byte for byte" '{"message":"mail"}{"message":"mail"}' \
        "$(broker peek names --all --json | jq -cj '{message}')"
    "${self[@]}" backup "$tmp/backup"
    export BROKER_DEFAULT_DB_NAME=restored.db
    "${self[@]}" restore "$tmp/backup"
    "${self[@]}" verify "$tmp/backup"
    expect "restored into another database" $'jobs.other: 1\njobs.print: 1\nnames: 2' "$(broker list)"
    broker read names >/dev/null
    "${self[@]}" verify "$tmp/backup" || status=$?
    expect "verify tells what is missing" 3 "$status"
}

main() {
    prepare STEP PAUSE_S LEASE_S
    case ${1:-}:$# in
        rename:3) found broker "$@" ;;
        older:4) by_age "${@:2}" --before ;;
        newer:4) by_age "${@:2}" --after ;;
        restore:2) broker load <"$2" ;;
        merge:[12] | transform:[123]) usage >&2 && exit 1 ;;
        content:4 | steps:3 | split:3 | merge:* | transform:* | backup:[23] | verify:[23] | demo:1) "$@" ;;
        *) usage >&2 && exit 1 ;;
    esac
}

main "$@"
