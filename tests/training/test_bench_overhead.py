"""What a run takes beside its steps."""

import pytest
import tiny_run

from benchmarks.end_to_end import bench_overhead


@pytest.mark.parametrize("steps", [40, 41])
def test_a_run_pauses_twice(tmp_path, steps):
    row = bench_overhead.measure("tiny", steps, tmp_path, compile=False)
    assert len(tiny_run.rows(tmp_path / "run", of="val/loss")) == 2
    assert row["step_seconds"] > 0
    saves = [row[f"{name}_seconds"] for name in ("first_checkpoint", "checkpoint", "written")]
    assert min(saves) > 0
    assert row["checkpoints"] == pytest.approx((saves[0] + 9 * saves[1] + saves[2]) / 480, abs=3e-6)
