# Ends the server that lives in a folder and removes the folder, as soon as standard input
# closes: whoever holds the other end of that pipe has let go of it or has died.
# Usage: sh -c "$(cat guard.sh)" guard FOLDER
trap '' HUP INT QUIT TERM
folder=$1
while read -r _; do :; done

# Whatever belongs to the server works in its folder. A zombie works nowhere.
who() {
    for cwd in /proc/[0-9]*/cwd; do
        case $(readlink "$cwd" 2>/dev/null) in
        "$folder" | "$folder"/* | "$folder ("*)
            cwd=${cwd%/cwd}
            echo "${cwd#/proc/}"
            ;;
        esac
    done
}

# PostgreSQL has something outside: a segment of shared memory. Told to quit, it removes it.
lock=$folder/data/postmaster.pid
if [ -s "$lock" ]; then
    kill -QUIT "$(head -n 1 "$lock")" 2>/dev/null
    patience=50
    while [ -s "$lock" ] && [ -n "$(who)" ] && [ $patience -gt 0 ]; do
        patience=$((patience - 1))
        sleep 0.1
    done
fi
segment=$(sed -n 7p "$lock" 2>/dev/null)

patience=100
while left=$(who) && [ -n "$left" ] && [ $patience -gt 0 ]; do
    # One word each.
    kill -KILL $left 2>/dev/null
    patience=$((patience - 1))
    sleep 0.05
done
[ -z "$segment" ] || ipcrm -m "${segment##* }" 2>/dev/null
rm -rf "$folder"
