#!/bin/bash
# A real Slurm of virtual nodes on the loopback interface, for tests: no systemd, no cgroups, no database.
#   cluster.sh up DIR NODES CPUS    installs slurm-wlm and munge where this is root on Debian, starts them below DIR
#   cluster.sh down DIR             cancels all jobs and stops all daemons
# Exit status 3: cannot be installed here.
set -euo pipefail
what=$1 root=$(realpath -m "$2")
export SLURM_CONF="$root/slurm.conf"

install_slurm() {
    local program missing=0
    for program in slurmctld slurmd sbatch srun scontrol munged; do
        command -v "$program" >/dev/null || missing=1
    done
    [ "$missing" = 0 ] && return
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "no Slurm here, and only root can install it with apt-get" && exit 3
    fi
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 120 apt-get install -y -qq \
        --no-install-recommends slurm-wlm munge; } >"$root/install.log" 2>&1 ||
        { echo "apt-get could not install slurm-wlm and munge: $(tail -n 1 "$root/install.log")" && exit 3; }
}

free_ports() { # the first of $1 ports in a row that nobody listens at
    python3 - "$1" <<'P'
import random, socket, sys
wanted = int(sys.argv[1])
while True:
    first = random.randrange(11000, 19000)
    sockets = [socket.socket() for _ in range(wanted)]
    try:
        for number, one in enumerate(sockets):
            one.bind(("127.0.0.1", first + number))
        print(first)
        break
    except OSError:
        pass
    finally:
        for one in sockets:
            one.close()
P
}

up() {
    local nodes=$1 cpus=$2 host port me
    host=$(hostname -s) me=$(id -un)
    mkdir -p "$root"/{state,log,pids,munge}
    install_slurm
    port=$(free_ports $((nodes + 1)))
    chmod 755 "$root" && chmod 700 "$root/munge"
    head -c 128 /dev/urandom >"$root/munge/key" && chmod 600 "$root/munge/key"
    chmod 755 "$root/munge"
    munged --force --key-file="$root/munge/key" --socket="$root/munge/sock" --pid-file="$root/pids/munged" \
        --log-file="$root/log/munged.log" --seed-file="$root/munge/seed"
    cat >"$SLURM_CONF" <<C
ClusterName=mosaic
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$root/munge/sock,cred_expire=2
MpiDefault=none
SlurmctldPort=$port
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool.%n
SlurmctldPidFile=$root/pids/slurmctld
SlurmdPidFile=$root/pids/slurmd.%n
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,sched_min_interval=0
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=$cpus RealMemory=2000 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
C
    slurmctld -f "$SLURM_CONF"
    for number in $(seq "$nodes"); do
        mkdir -p "$root/spool.n$number"
        slurmd -f "$SLURM_CONF" -N "n$number"
    done
    for _ in $(seq 150); do
        [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | wc -l)" -ge "$nodes" ] && return
        sleep 0.1
    done
    echo "not all $nodes nodes became idle: $(tail -n 3 "$root/log/slurmctld.log")" && exit 1
}

down() {
    scancel --quiet --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 150); do
        [ -z "$(squeue -h 2>/dev/null)" ] && break
        sleep 0.1
    done
    local pids=() file pid left
    for file in "$root"/pids/slurmd.* "$root/pids/slurmctld" "$root/pids/munged"; do
        [ -s "$file" ] && pids+=("$(cat "$file")")
    done
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    for _ in $(seq 100); do
        left=0
        for pid in "${pids[@]}"; do # one that ended may stay as a zombie of a container's first process
            [ -e "/proc/$pid" ] && ! grep -q '^State:.*Z' "/proc/$pid/status" 2>/dev/null && left=1
        done
        [ "$left" = 0 ] && return
        sleep 0.1
    done
    echo "still running: ${pids[*]}" && exit 1
}

case $what in
up) up "$3" "$4" ;;
down) down ;;
*) echo "up or down" && exit 2 ;;
esac
