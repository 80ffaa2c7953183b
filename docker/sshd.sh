#!/bin/sh
# Starts an sshd as the image's ordinary user, so that deepspeed (pdsh) and mpirun on another host can start ranks in here:
#
#     docker run --network host --volume KEYS:/home/dsllm/.ssh:ro --entrypoint dsllm-sshd dsllm:gpu [PORT]
#
# KEYS belongs to that user and contains authorized_keys. It may contain a host key (ssh_host_ed25519_key); otherwise each
# start makes a new one, which the login host must accept again. Only keys are accepted; the image contains no secret.
set -eu

port=${1:-2222}
keys=$HOME/.ssh
if [ ! -r "$keys/authorized_keys" ]; then
  echo "dsllm-sshd: $keys/authorized_keys cannot be read: mount a folder with the public key of the host that starts the ranks" >&2
  exit 2
fi
host_key=$keys/ssh_host_ed25519_key
if [ ! -r "$host_key" ]; then
  folder=$(mktemp -d)
  host_key=$folder/ssh_host_ed25519_key
  ssh-keygen -q -t ed25519 -N '' -f "$host_key"
fi
exec /usr/sbin/sshd -D -e -f /dev/null -p "$port" -o "HostKey=$host_key" -o "AuthorizedKeysFile=$keys/authorized_keys" \
  -o PasswordAuthentication=no -o KbdInteractiveAuthentication=no -o UsePAM=no -o PidFile=none -o "SetEnv=PATH=$PATH"
