"""Real clusters on one machine: hosts with ssh and pdsh, SLURM, MPI and torchrun, and the same run on each of them."""
