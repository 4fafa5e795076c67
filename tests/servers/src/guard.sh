# Removes a folder, and ends whoever works in it, as soon as standard input closes: whoever holds
# the other end of that pipe has let go of it or has died. The first line there says how many
# seconds those who work in the folder have for ending by themselves, and which folder it is.
trap '' HUP INT QUIT TERM
read -r patience_s folder || exit
while read -r _; do :; done

# A zombie works nowhere.
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

# Waits until nobody is left, for so many tenths of a second.
nobody_within() {
    tenths=$1
    while [ -n "$(who)" ]; do
        [ "$tenths" -gt 0 ] || return 1
        tenths=$((tenths - 1))
        sleep 0.1
    done
}

# PostgreSQL has something outside: a segment of shared memory. Told to quit, it removes it. Its
# lock file may be an old one, and the id be another's by now.
lock=$folder/data/postmaster.pid
postmaster=$(head -n 1 "$lock" 2>/dev/null)
case " $(who | tr '\n' ' ')" in
*" ${postmaster:-none} "*)
    kill -QUIT "$postmaster"
    patience_s=5
    ;;
esac
nobody_within $((patience_s * 10))
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
