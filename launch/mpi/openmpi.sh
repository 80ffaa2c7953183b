#!/bin/bash
# Open MPI on the hosts of a file like launch/hosts.example:
#
#     bash launch/mpi/openmpi.sh HOSTFILE RUN.yaml [key=value ...]
#
# The environment must be active here and have the same path on every host. Ctrl-C and SIGTERM save first. This script cannot
# end an mpirun that hangs after losing a host, nor return exit codes that mpirun hides (RUN/status.json has the true state).
# `dsllm launch RUN.yaml --hostfile HOSTFILE --with mpi` does both.
set -e
hosts=${1:?a hostfile is needed}
shift
if [ ! -s "$hosts" ]; then
    echo "$hosts: no such hostfile, or it is empty" >&2
    exit 2
fi
num_ranks=$(sed 's/#.*//' "$hosts" | awk -F 'slots=' '{n += $2} END {print n}')
MASTER_ADDR=$(sed 's/#.*//' "$hosts" | awk 'NF {print $1; exit}')
MASTER_PORT=$((20000 + RANDOM % 10000))
export MASTER_ADDR MASTER_PORT

# in its own session, because a terminal's Ctrl-C or a SIGTERM to mpirun would kill the ranks; SIGUSR1 lets them save
setsid mpirun -np "$num_ranks" --hostfile "$hosts" -x PATH -x MASTER_ADDR -x MASTER_PORT python -u -m dsllm train "$@" &
ranks=$!
trap 'kill -USR1 $ranks' INT TERM USR1
while :; do # a signal interrupts wait
    code=0
    wait $ranks || code=$?
    kill -0 $ranks 2> /dev/null || break
done
exit $code
