"""One environment for every test: offline, one thread, and hypothesis profiles chosen by HYPOTHESIS_PROFILE."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import HealthCheck, Phase, settings

# The suite is spread over processes; more threads in each would only get in one another's way.
torch.set_num_threads(1)

# No deadlines: a shared machine is slow at times, and no test asserts a time.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
# For tools that run the suite over and over: the same few examples each time, and no search for the smallest.
settings.register_profile(
    "quick",
    max_examples=10,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    report_multiple_bugs=False,
    **_COMMON,
)
settings.register_profile("dev", max_examples=25, **_COMMON)
settings.register_profile("ci", max_examples=100, derandomize=True, database=None, print_blob=True, **_COMMON)
settings.register_profile("deep", max_examples=2000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") == "true" else "dev"))
