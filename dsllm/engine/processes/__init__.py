"""The processes of a job: their ranks, how they meet, their groups, devices and cores."""
