#!/bin/bash
# A real Slurm on one machine: slurmctld, munge, and one slurmd a node, without systemd and without touching /etc.
#
#   start.sh DIR [--nodes N] [--cpus C] [--gpus G]      then: . DIR/env.sh; sinfo
#
# Each node is a set of namespaces (network, processes, mounts, host name, IPC) on a bridge of its own, so that it has a
# host name (n1, n2, ...), an address and a private /dev/shm, as on a cluster; files are shared by all. Needs root, or a
# kernel that lets users make namespaces.
# DIR takes everything: configuration, keys, logs, spool. See README.md for what it can do.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

die() {
    echo "start.sh: $1" >&2
    exit "${2:-1}"
}

[[ $# -ge 1 && $1 != -* ]] || die "no folder given; write start.sh DIR [--nodes N] [--cpus C] [--gpus G]." 2
dir=$1 arguments=("$@")
shift
num_nodes=2 num_cpus=8 num_gpus=4
while (($#)); do
    [[ $# -ge 2 && $2 =~ ^[0-9]+$ ]] || die "$1 needs a number." 2
    case $1 in
        --nodes) num_nodes=$2 ;;
        --cpus) num_cpus=$2 ;;
        --gpus) num_gpus=$2 ;;
        *) die "$1 is not an option; there are --nodes, --cpus and --gpus." 2 ;;
    esac
    shift 2
done

for command in munged slurmctld slurmd sinfo ip unshare setsid; do
    command -v "$command" > /dev/null || die "$command is missing; on Debian: \
apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2 util-linux." 3
done

mkdir -p "$dir"
dir=$(cd "$dir" && pwd -P)
[[ ! -e $dir/run/bridge ]] || die "$dir is in use; run stop.sh $dir first."
umask 022
chmod 755 "$dir"

# Whoever is not root starts all of it, as themselves, in namespaces of their own, which last as long as this script in
# them: it waits there for nodes to start again, since nobody who comes later has its rights.
if [[ $(id -u) != 0 && -z ${SHARDLINE_TESTBED_INSIDE:-} ]]; then
    own=(unshare --user --map-current-user --keep-caps --net --mount)
    "${own[@]}" true 2> /dev/null || die "nodes are network namespaces, and this kernel lets only root make them." 3
    mkdir -p "$dir/log"
    rm -f "$dir/log/start.status"
    SHARDLINE_TESTBED_INSIDE=1 setsid "${own[@]}" "$0" "${arguments[@]}" < /dev/null > "$dir/log/start.out" 2>&1 &
    while [[ ! -e $dir/log/start.status ]] && kill -0 $! 2> /dev/null; do sleep 0.1; done
    cat "$dir/log/start.out"
    [[ -e $dir/log/start.status ]] || wait $!
    exit 0
fi

rm -rf "${dir:?}"/{spool,dev,munge,socket,etc,run}
mkdir -p "$dir"/{log,etc,dev,socket,spool/ctld,run}
mkdir -m 700 "$dir/munge"

if [[ $(id -u) != 0 ]]; then
    # Where ip keeps names of namespaces.
    mount -t tmpfs tmpfs /run
    ip link set lo up
    echo $$ > "$dir/run/inside.pid"
    mkfifo "$dir/run/nodes"
    printf '#!/bin/bash\nexec nsenter --target=%s --user --net --preserve-credentials -- "$@"\n' $$ > "$dir/enter"
else
    printf '#!/bin/bash\nexec "$@"\n' > "$dir/enter"
fi
chmod +x "$dir/enter"

# A bridge with a number that no other testbed has taken.
for ((net = 1; net < 250; net++)); do
    ip link add "shlbr$net" type bridge 2> /dev/null && break
done
((net < 250)) || die "no bridge can be made; this needs the right to make network namespaces (CAP_NET_ADMIN)." 3
echo "$net" > "$dir/run/bridge"
address=10.213.$net
ip addr add "$address.1/24" dev "shlbr$net"
ip link set "shlbr$net" up

controller=$(hostname -s)
{
    echo "127.0.0.1 localhost"
    echo "$address.1 $controller"
    for ((k = 1; k <= num_nodes; k++)); do echo "$address.$((10 + k)) n$k"; done
} > "$dir/etc/hosts"
# Names come from that file alone: each connection of a rendezvous would wait for reverse DNS to time out otherwise.
echo "hosts: files" > "$dir/etc/nsswitch.conf"

# A GPU must be a character device to be counted; nobody reads these.
gres=
if ((num_gpus > 0)); then
    for ((g = 0; g < num_gpus; g++)); do
        mknod -m 666 "$dir/dev/nvidia$g" c 1 3 2> /dev/null && continue
        # Only root makes one.
        touch "$dir/dev/nvidia$g"
        mount --bind /dev/null "$dir/dev/nvidia$g"
    done
    echo "Name=gpu File=$dir/dev/nvidia[0-$((num_gpus - 1))]" > "$dir/etc/gres.conf"
    gres="Gres=gpu:$num_gpus"
fi
# With this, slurmd neither mounts nor needs control groups.
echo "CgroupPlugin=cgroup/v1" > "$dir/etc/cgroup.conf"

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
{
    cat << CONF
ClusterName=testbed
SlurmctldHost=$controller($address.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has expired, 120 s by default.
AuthInfo=socket=$dir/socket/munge,cred_expire=5
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld.log
StateSaveLocation=$dir/spool/ctld
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmdLogFile=$dir/log/slurmd-%n.log
SlurmdSpoolDir=$dir/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=9
KillWait=${SHARDLINE_TESTBED_KILL_WAIT_S:-15}
MinJobAge=86400
MessageTimeout=10
JobRequeue=1
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
DebugFlags=NO_CONF_HASH
SlurmctldDebug=verbose
SlurmdDebug=verbose
CONF
    for ((k = 1; k <= num_nodes; k++)); do
        echo "NodeName=n$k NodeAddr=$address.$((10 + k)) Port=6818 CPUs=$num_cpus RealMemory=256000 $gres State=UNKNOWN"
    done
    echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=REQUEUE GraceTime=20"
    echo "PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF"
} > "$dir/etc/slurm.conf"
echo "export SLURM_CONF=$dir/etc/slurm.conf PATH=\$PATH:/usr/sbin:/sbin" > "$dir/env.sh"
export SLURM_CONF=$dir/etc/slurm.conf

# Starts a node, or returns one that was killed; kill -9 $(cat DIR/run/n1.pid) takes a whole node away.
cat > "$dir/node.sh" << NODE
#!/bin/bash
# node.sh nK: start node K, also after its end.
set -euo pipefail
if [[ \$(id -u) != 0 && -z \${SHARDLINE_TESTBED_INSIDE:-} ]]; then
    echo "\$1" > "$dir/run/nodes"
    exit 0
fi
export PATH=\$PATH:/usr/sbin:/sbin SLURM_CONF=$dir/etc/slurm.conf
node=\$1 number=\${1#n}
space=shl$net-\$node link=shlv$net-\$number
mkdir -p "$dir/spool/\$node"
ip netns del "\$space" 2> /dev/null || true
ip link del "\$link" 2> /dev/null || true
ip netns add "\$space"
ip link add "\$link" type veth peer name eth0 netns "\$space"
ip link set "\$link" master shlbr$net up
ip -n "\$space" addr add "$address.\$((10 + number))/24" dev eth0
ip -n "\$space" link set lo up
ip -n "\$space" link set eth0 up
ip -n "\$space" route add default via $address.1
setsid ip netns exec "\$space" unshare --mount --uts --ipc --pid --fork --kill-child --mount-proc bash -c '
    hostname "\$0"
    mount --bind "$dir/etc/hosts" /etc/hosts
    mount --bind "$dir/etc/nsswitch.conf" /etc/nsswitch.conf
    mount -t tmpfs tmpfs /dev/shm
    slurmd -D -N "\$0" & daemon=\$!
    trap "kill \$daemon" TERM
    while kill -0 \$daemon 2> /dev/null; do wait \$daemon; done
' "\$node" < /dev/null > "$dir/log/\$node.out" 2>&1 &
echo \$! > "$dir/run/\$node.pid"
NODE
chmod +x "$dir/node.sh"

head -c 128 /dev/urandom > "$dir/munge/key"
chmod 600 "$dir/munge/key"
# --force: a folder above may be closed to others, as a temporary one is.
munged --force --key-file="$dir/munge/key" --socket="$dir/socket/munge" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed" 2> "$dir/log/munged.err"
(cd "$dir/spool" && slurmctld -c -i)
for ((k = 1; k <= num_nodes; k++)); do "$dir/node.sh" "n$k" & done
wait
for ((t = 0; t < 300; t++)); do
    if [[ $(sinfo -h -p main -t idle -o %D 2> /dev/null) == "$num_nodes" ]]; then
        echo "$num_nodes nodes are up; write  . $dir/env.sh$([[ $(id -u) == 0 ]] || echo ", and $dir/enter COMMAND")"
        [[ $(id -u) != 0 ]] || exit 0
        echo 0 > "$dir/log/start.status"
        while read -r node <> "$dir/run/nodes"; do "$dir/node.sh" "$node"; done
    fi
    sleep 0.1
done
sinfo -N -o '%N %t %E' >&2 || true
tail -n 5 "$dir/log/slurmctld.log" >&2
die "the nodes are not up after 30 s; logs are in $dir/log."
