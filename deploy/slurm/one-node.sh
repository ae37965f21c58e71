#!/usr/bin/env bash
# A whole Slurm on this machine, for trials: munged, slurmctld and slurmd on the loopback interface, with configuration,
# state, key and logs in a directory of their own. Nothing of the system's own configuration is read or written.
#
#   deploy/slurm/one-node.sh COMMAND...      run COMMAND with it (SLURM_CONF is set), and stop it afterwards
#
# Needs Linux, root, and Debian's slurm-wlm and munge (apt-get install slurm-wlm munge). Jobs run as root, without limits
# on memory that are enforced: what is tried out is scheduling.
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
for program in munged slurmctld slurmd sbatch srun squeue; do
    command -v "$program" > /dev/null || { echo "$program is missing: apt-get install slurm-wlm munge" >&2; exit 10; }
done
[ "$(id -u)" -eq 0 ] || { echo "slurmd starts jobs for others, and so has to be run by root" >&2; exit 10; }

home=$(mktemp -d)
daemons=()
stop() {
    local pid
    for pid in "${daemons[@]}"; do kill "$pid" 2> /dev/null || true; done
    for pid in "${daemons[@]}"; do wait "$pid" 2> /dev/null || true; done
    rm -rf "$home"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

mkdir -m 700 "$home/munge"
mkdir "$home/state" "$home/spool"
chmod 755 "$home"
(umask 077 && head -c 1024 /dev/urandom > "$home/munge/key")
# Not nproc: it takes what OMP_NUM_THREADS says for the number of processors.
cat > "$home/slurm.conf" << EOF
ClusterName=one-node
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$home/munge/socket
CredType=cred/munge
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd.pid
SlurmctldLogFile=$home/slurmctld.log
SlurmdLogFile=$home/slurmd.log
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SwitchType=switch/none
ReturnToService=2
MinJobAge=3600
SchedulerParameters=sched_interval=2,batch_sched_delay=0
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(getconf _NPROCESSORS_ONLN) RealMemory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
PartitionName=all Nodes=$(hostname -s) Default=YES MaxTime=INFINITE State=UP
EOF
export SLURM_CONF="$home/slurm.conf"
# Inside of jobs Snakemake drops that variable, as a cluster does not need it.
mkdir "$home/bin"
printf '#!/bin/sh\nSLURM_CONF=%q exec %q "$@"\n' "$SLURM_CONF" "$(command -v srun)" > "$home/bin/srun"
chmod +x "$home/bin/srun"
export PATH="$home/bin:$PATH"

log() { tail -n 20 "$home"/*.log "$home"/munge/log >&2 2> /dev/null || true; }
start() {
    "$@" > /dev/null 2>> "$home/start.log" &
    daemons+=($!)
}
start munged --foreground --force --key-file "$home/munge/key" --socket "$home/munge/socket" \
    --pid-file "$home/munge/pid" --log-file "$home/munge/log" --seed-file "$home/munge/seed"
for _ in $(seq 100); do [ -S "$home/munge/socket" ] && break; sleep 0.1; done
start slurmctld -D -c -f "$SLURM_CONF"
start slurmd -D -f "$SLURM_CONF" -N "$(hostname -s)"
for _ in $(seq 300); do
    [ "$(sinfo --noheader --format %T 2> /dev/null)" = idle ] && break
    for pid in "${daemons[@]}"; do
        kill -0 "$pid" 2> /dev/null || { echo "a daemon ended while Slurm started" >&2; log; exit 1; }
    done
    sleep 0.1
done
[ "$(sinfo --noheader --format %T)" = idle ] || { echo "Slurm does not get ready" >&2; log; exit 1; }

code=0
"$@" || code=$?
scancel --user "$(id -un)" 2> /dev/null || true # what it left running
for _ in $(seq 100); do
    [ -z "$(squeue --noheader 2> /dev/null)" ] && break
    sleep 0.1
done
exit "$code"
