"""dsllm launch: from a run and a cluster to files and a command for any launcher, started, watched and ended as one."""
