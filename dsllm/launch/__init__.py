"""dsllm launch: writes the files and commands that start a run under any launcher, follows it, and returns one exit code."""
