"""A rank reports what it finds by itself, without torch."""

import subprocess
import sys

from dsllm.doctor.local_checks import cannot_import, cannot_join, check_locally, collect_local_facts
from dsllm.engine.processes.ranks import discover_ranks


def test_this_rank_finds_no_error_here():
    facts = collect_local_facts(discover_ranks({}))
    assert facts.place.rank == 0 and facts.versions.versions["dsllm"] and facts.machine.cores
    assert not [finding for finding in check_locally(facts) if finding.check in ("versions", "network")]


def test_local_checks_need_no_torch():
    code = (
        "import sys; from dsllm.doctor.local_checks import *; from dsllm.engine.processes.ranks import discover_ranks\n"
        "check_locally(collect_local_facts(discover_ranks({})))\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_failed_import_or_rendezvous_names_the_rank_and_the_reason():
    place = collect_local_facts(discover_ranks({})).place
    broken = cannot_import(place, OSError("libcudart.so.12"))
    assert (
        broken.level == "error"
        and "OSError: libcudart.so.12" in broken.problem
        and broken.where.startswith("rank 0 on ")
    )
    assert cannot_join(place, "nothing listens", TimeoutError("late")).problem == "late (nothing listens)"
