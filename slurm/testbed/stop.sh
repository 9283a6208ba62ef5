#!/bin/bash
# stop.sh DIR: ends the Slurm that start.sh DIR brought up, its jobs included; logs stay in DIR/log.
set -uo pipefail
export PATH=$PATH:/usr/sbin:/sbin

if [[ $# != 1 || ! -e $1/run/bridge ]]; then
    echo "stop.sh: there is no testbed in ${1:-no folder}; write stop.sh DIR." >&2
    exit 2
fi
dir=$(cd "$1" && pwd -P)
net=$(< "$dir/run/bridge")

is_alive() {
    # A process whose parent reaps late is a zombie and counts as gone.
    [[ -r /proc/$1/stat && $(sed 's/.*) //' "/proc/$1/stat") != Z* ]]
}

# A node's processes, jobs included, share its process namespace and end with it.
for file in "$dir"/run/n*.pid; do
    [[ -e $file ]] || continue
    node=$(basename "$file" .pid)
    kill -9 "$(< "$file")" 2> /dev/null
    # Of a user's, who has no right to do this, they end with the last process in them.
    ip netns del "shl$net-$node" 2> /dev/null
    ip link del "shlv$net-${node#n}" 2> /dev/null
done
for file in "$dir/run/slurmctld.pid" "$dir/run/munged.pid" "$dir/run/inside.pid"; do
    [[ -e $file ]] || continue
    pid=$(< "$file")
    kill "$pid" 2> /dev/null
    for ((t = 0; t < 50; t++)); do
        is_alive "$pid" || break
        sleep 0.1
    done
    is_alive "$pid" && kill -9 "$pid" 2> /dev/null
done
ip link del "shlbr$net" 2> /dev/null
rm -rf "$dir"/run/* "$dir/socket"
echo "stopped; logs are in $dir/log"
