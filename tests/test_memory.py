"""Long commands use memory again that they have freed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from ipn_core.memory import keep_freed_memory

done = keep_freed_memory() if sys.argv[1] == "kept" else None
for _ in range(10):
    torch.zeros(2**24)  # 64 MB, which glibc would map and unmap
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.zeros(2**24)
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **settings: str) -> tuple[str, int]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    found = subprocess.run(
        [sys.executable, "-c", FAULTS, how],
        capture_output=True,
        text=True,
        check=True,
        env={**plain, "OMP_NUM_THREADS": "1", **settings},
    )
    done, count = found.stdout.split()
    return done, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_large_tensors_are_faulted_in_once() -> None:
    _, before = faults("plain")
    done, after = faults("kept")
    assert done == "True"
    assert after * 10 < before, (after, before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_settings_of_the_users_own_stay() -> None:
    assert faults("kept", MALLOC_ARENA_MAX="2")[0] == "False"
