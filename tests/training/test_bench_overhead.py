"""What a run takes beside its steps."""

import pytest
import tiny_run

from benchmarks.end_to_end import bench_overhead


@pytest.mark.parametrize("steps", [40, 41])
def test_a_run_pauses_twice(tmp_path, steps):
    row = bench_overhead.measure("tiny", steps, tmp_path, compile=False)
    assert len(tiny_run.rows(tmp_path / "run", of="val/loss")) == 2
    assert row["step_seconds"] > 0
    (first_look, look), (first, save), written = (row[f"{x}_seconds"] for x in ("validation", "checkpoint", "written"))
    assert min(first_look, look, first, save, written) > 0
    assert row["validations"] == pytest.approx((first_look + 19 * look) / 480, abs=5e-6)
    assert row["checkpoints"] == pytest.approx((first + 9 * save + written) / 480, abs=5e-6)
