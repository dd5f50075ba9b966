from benchmarks import support
from cs336.ops import registry


def test_the_page_is_current():
    assert support.PAGE.read_text() == support.page(), "run `python -m benchmarks.support`"


def test_the_page_says_what_the_registry_does():
    """A capability that an op does not run on is not in its row."""
    rows = {line.split("`")[1]: line for line in support.page().splitlines() if line.startswith("| `")}
    assert set(rows) == set(support.defined()) >= {"adamw_", "rms_norm_fwd", "layer_norm_bwd"}
    assert "| native, ref | ref | native, triton, ref |" in next(
        line for line in support.page().splitlines() if "`rms_norm_fwd` | float32" in line
    )
    assert "| `rms_norm_fwd` | float64 | ref | ref | ref | ref | ref |" in support.page()


def test_a_kernel_for_one_architecture_is_in_its_column_alone(monkeypatch):
    op = registry.OPS["rms_norm_bwd"]
    monkeypatch.setitem(op.capabilities, "native", ((9, 0), (9, 0)))
    row = next(line for line in support.page().splitlines() if "`rms_norm_bwd` | float32" in line)
    assert row.endswith("| native, ref | ref | triton, ref | native, triton, ref | triton, ref |")


def test_asking_leaves_the_registry_as_it_was():
    before = {name: dict(op.order) for name, op in registry.OPS.items()}
    support.page()
    assert {name: dict(op.order) for name, op in registry.OPS.items()} == before
