"""The benchmark of a step's memory runs, with either head."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.runtime.support.tiny import tiny_model


def test_both_heads_are_measured(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    command = [sys.executable, "-m", "tests.benchmarks.step_memory", "--model", str(tmp_path), "--batch", "4"]
    command += ["--mini-batch", "2", "--response", "6", "--dtype", "bfloat16", "--checkpointing"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    lines = [json.loads(line) for line in answer.stdout.splitlines()]
    assert [line["head"] for line in lines] == ["fused", "dense"]
    assert all(line["peak_mib"] >= line["loaded_mib"] > 0 for line in lines)
