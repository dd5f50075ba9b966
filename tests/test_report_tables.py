"""The README's tables are what benchmarks/report.py makes of benchmarks/results."""

import pytest

from benchmarks import report

HEADER = {
    "command": "python -m benchmarks.run ops",
    "gpu": "NVIDIA H200",
    "driver": "580.1",
    "cuda": "13.0",
    "torch": "2.11.0",
    "triton": None,
    "python": "3.12.3",
    "peers": {"liger-kernel": "0.8.5"},
    "commit": "abc1234",
    "date": "2026-01-02",
    "roofs": {"copy_gbps": 4290.0, "matmul_bf16_tflops": 794.0},
}


def row(pass_, variant, shape, seconds, **more):
    timed = {"seconds": seconds, "spread": 0.01} if seconds else {"skipped": "No module named 'x'"}
    return {"op": "norm", "pass": pass_, "variant": variant, "shape": shape, "dtype": "bfloat16", **timed, **more}


def results(*rows):
    return {"h200": {"norm": {"header": HEADER, "rows": list(rows)}}}


SMALL, LARGE = [8192, 4096], [32768, 4096]  # 64 MB, 256 MB
ROWS = (
    row("fwd", "native", SMALL, 10e-6, percent_of_roof=95.04),
    row("fwd", "eager", SMALL, 25e-6),
    row("fwd", "liger", SMALL, 9e-6),
    row("fwd", "quack", SMALL, None),
    row("fwd", "native", LARGE, 40e-6, percent_of_roof=96.0),
    row("fwd", "eager", LARGE, 100e-6),
    row("fwd", "liger", LARGE, 39.9e-6),
)
TEXT = "before\n<!-- table: norm -->\nold\n<!-- /table -->\nafter\n"


@pytest.mark.parametrize("page", report.PAGES)
def test_pages_are_current(page):
    text = (report.ROOT / page).read_text()
    assert report.render(text, report.load()) == text, "run `python -m benchmarks.report`"


def test_the_readme_has_a_row_a_capability_and_the_tables_are_elsewhere():
    readme, tables = ((report.ROOT / page).read_text() for page in report.PAGES[:2])
    assert report.MARKED.findall(readme)[0][1] == "headline"
    assert len(readme.splitlines()) < 300
    names = {found[1] for found in report.MARKED.findall(tables)}
    assert names >= set(report.HEADLINES)


def test_a_headline_is_a_row_of_the_results():
    text = report.render(
        TEXT.replace("norm", "headline"), {"h200": {"rms_norm": {"header": HEADER, "rows": list(ROWS)}}}
    )
    assert "| norm, bf16, N = 4096 | 96 % of what a copy reaches | 1.00x Liger | NVIDIA H200 |" in text


def test_a_table_shows_roof_ratios_and_losses():
    text = report.render(TEXT, results(*ROWS))
    assert "| N | % of roof | eager | Liger |" in text  # QuACK never ran: no column
    assert "| 4096 | 95.0 / 96.0 | 2.50 / 2.50 | 0.90 / 1.00 |" in text
    assert "native loses to Liger in fwd 8192x4096 (64 MB): 0.90." in text  # 256 MB is within the noise
    assert text.startswith("before\n<!-- table: norm -->\n")
    assert text.endswith("<!-- /table -->\nafter\n")
    for fact in (
        "NVIDIA H200",
        "driver 580.1",
        "liger-kernel 0.8.5",
        "4.29 TB/s",
        "abc1234",
        "2026-01-02",
        "python -m",
    ):
        assert fact in text
    assert "triton" not in text


def test_peers_ahead_by_less_than_the_noise_are_counted():
    case = {"native": row("fwd", "native", SMALL, 10e-6) | {"spread": 0.3}, "liger": row("fwd", "liger", SMALL, 8e-6)}
    said = "In none of the sweep's 1 cases is a peer faster by more than the noise"
    assert report.losses([case], sized=False) == f"{said}; in 1 by more than 5 %, which the noise there exceeds."
    assert report.losses([case | {"liger": row("fwd", "liger", SMALL, 9.8e-6)}], sized=False) == f"{said}."


def test_a_run_of_several_ops_names_them_and_no_megabytes():
    rows = [
        {**row("fwd", variant, SMALL, seconds, gbps=4000.0, percent_of_roof=93.0), "op": op}
        for op in ("swiglu", "relu2")
        for variant, seconds in (("native", 20e-6), ("liger", 10e-6))
    ]
    text = report.table("activation", {"h200": {"activation": {"header": HEADER, "rows": rows}}})
    assert "| relu2 fwd | 8192x4096 | 20.0 | 4000 GB/s | 93.0 | 0.50 |" in text
    assert "the sweep's 2 cases, native loses to Liger in relu2 fwd 8192x4096: 0.50; Liger in swiglu fwd" in text
    one = report.table("paged_attention", {"h200": {"paged_attention": {"header": HEADER, "rows": rows[:2]}}})
    assert "| fwd | 8192x4096 |" in one


def test_a_pass_without_a_native_kernel_shows_tritons():
    rows = [
        row("bwd", "native", SMALL, None),
        row("bwd", "triton", SMALL, 20e-6, tflops=300.0, percent_of_roof=40.0),
        row("bwd", "cudnn", SMALL, 10e-6),
    ]
    text = report.table("attention", {"h200": {"attention": {"header": HEADER, "rows": rows}}})
    assert "| bwd, Triton | 8192x4096 | 20.0 | 300 TFLOP/s | 40.0 | 1.00 | 0.50 |" in text


def test_launches():
    rows = [{"kernel": "attention_fwd_kernel<D>", "registers": 128, "threads": 512, "shared_bytes": 231424}]
    assert list(report.launches(rows))[-1] == "| `attention_fwd_kernel<D>` | 128 | 512 | 226.0 |"


def test_rendering_again_changes_nothing():
    once = report.render(TEXT, results(*ROWS))
    assert report.render(once, results(*ROWS)) == once != TEXT


def test_no_loss_is_said():
    assert "In none of the sweep's 1 cases" in report.render(TEXT, results(*ROWS[:2]))


def test_host_time():
    rows = (*ROWS, row("host fwd", "cs336", [8, 512], 4e-6), row("host fwd", "eager", [8, 512], 5e-6))
    assert "fwd 4.0 us (torch 5.0)" in report.render(TEXT, results(*rows))


def test_training():
    shared = {"op": "train", "model": "124M"}
    rows = [
        {**shared, "variant": "cs336", "tokens_per_second": 600e3, "mfu": 50.0, "loss": 5.25, "spread": 0.07},
        {**shared, "variant": "plain", "tokens_per_second": 500e3, "mfu": None, "loss": 5.251, "spread": 0.048},
    ]
    text = report.table("train", {"h200": {"train": {"header": HEADER, "rows": rows}}})
    assert (
        "| 124M | 600.0k tokens/s, 50.0 % MFU | 500.0k tokens/s | 1.200 | 7.0% / 4.8% | 5.2500 / 5.2510 | – |" in text
    )
    rows[0] |= {"bytes": 3 << 30, "predicted_bytes": 7 << 29}
    rows[1] |= {"bytes": 5 << 30, "predicted_bytes": None}
    text = report.table("train", {"h200": {"train": {"header": HEADER, "rows": rows}}})
    assert "| 5.2500 / 5.2510 | 3.00 (3.50) / 5.00 |" in text
    rows.append(rows[0] | {"variant": "cs336 deterministic", "tokens_per_second": 550e3})
    text = report.table("train", {"h200": {"train": {"header": HEADER, "rows": rows}}})
    assert [line[:39] for line in text.splitlines() if "124M" in line] == [
        "| 124M | 600.0k tokens/s, 50.0 % MFU | ",
        "| 124M, deterministic | 550.0k tokens/s",
    ]
    rows.append(rows[1] | {"variant": "plain whole", "tokens_per_second": 625e3})
    text = report.table("train", {"h200": {"train": {"header": HEADER, "rows": rows}}})
    assert "| 124M | 600.0k tokens/s, 50.0 % MFU | 625.0k tokens/s | 0.960 |" in text  # the faster one counts


def coded(tool, output, cold, warm, **more):
    shared = {"op": "tokenizer", "job": "encode", "tokenizer": "gpt2", "text": "code", "threads": 1, "megabytes": 20.0}
    return {**shared, "tool": tool, "output": output, "cold_cpu": cold, "warm_cpu": warm, **more}


def test_mixers():
    whole = {"op": "mixer", "variant": "mamba2", "shape": [8, 2048], "train_bytes": 3 << 30, "state_bytes": 5 << 19}
    whole |= {"train_tokens_per_second": 58102.3, "decode_tokens_per_second": 1550.4}
    alone = {"op": "ssd", "shape": [8, 1, 32, 2048, 128, 64], "dtype": "bf16"}
    rows = [whole]
    for pass_, variant, seconds in (("fwd", "cs336", 2e-4), ("fwd", "fla", 5e-4), ("fwd+bwd", "cs336", 1.4e-3)):
        rows.append(alone | {"pass": pass_, "variant": variant, "seconds": seconds})
    rows.append(alone | {"variant": "fla", "failed": "another Triton"})
    text = "\n".join(report.mixers(rows))
    assert "| mamba2 | 8 x 2048 | 58,102 | 3.0 GiB | 2.5 MiB | 1,550 |" in text
    assert "| ssd | (8, 1, 32, 2048, 128, 64) | fwd | 0.200 ms | 0.500 ms |" in text
    assert "| ssd | (8, 1, 32, 2048, 128, 64) | fwd+bwd | 1.400 ms | – |" in text


def test_data():
    ours = {"op": "data", "tool": "cs336", "pages": 100, "kept": 92, "pages_per_cpu_second": 300.04, "to_ours": 1.0}
    theirs = {**ours, "tool": "datatrove", "kept": 78, "pages_per_cpu_second": 12.0, "to_ours": 25.0}
    header = {"cpu": "EPYC", "cores": 2, "python": "3.12", "peers": {}, "commit": "abc", "date": "d", "command": "c"}
    rows = [ours, theirs, {"op": "data", "tool": "dolma", "skipped": "No module"}]
    text = report.table("data", {"cpu": {"data": {"header": header, "rows": rows}}})
    assert "| cs336 | 92 of 100 | 300.0 | 1.0 |" in text
    assert "| datatrove | 78 of 100 | 12.0 | 25.0 |" in text
    assert "Not installed here: dolma." in text


def test_curation():
    row = {"op": "curation", "documents": 1379, "megabytes": 13.6, "tokens": 150000, "epochs": 0.03}
    rows = [
        row | {"side": "raw", "bits_per_byte": [3.0, 3.2], "mean": 3.1, "gain": 0.0, "gain_half_width": 0.0},
        row | {"side": "curated", "bits_per_byte": [2.8, 3.1], "mean": 2.95, "gain": 0.15, "gain_half_width": 0.635},
    ]
    text = "\n".join(report.curation(rows))
    assert "| raw | 1,379 | 13.6 | 0.03 | 3.000, 3.200 | 3.100 | – |" in text
    assert "| curated | 1,379 | 13.6 | 0.03 | 2.800, 3.100 | 2.950 | +0.150 ± 0.635 |" in text
    assert "150,000 tokens each." in text


def test_variants():
    row = {"op": "variants", "parameters": 37024, "tokens": 51200, "interval": None, "state_bytes": 16384}
    rows = [
        row | {"variant": "ReLU", "loss": 2.5, "tokens_per_second": 30, "decoding_error": 1.2e-06, "decodes": True},
        row | {"variant": "SwiGLU", "loss": 2.25, "tokens_per_second": 20, "decoding_error": 0.5, "decodes": False},
    ]
    rows[1]["interval"] = 0.0456
    text = "\n".join(report.variants(rows))
    assert "| ReLU | 37,024 | 2.500 | 1.50 | 16,384 | yes, 1e-06 |" in text
    assert "| SwiGLU | 37,024 | 2.250 ± 0.046 | 1.00 | 16,384 | no, 5e-01 |" in text
    assert "51,200 tokens each." in text


def test_tokenizers():
    trained = {
        "op": "tokenizer",
        "job": "train",
        "text": "all",
        "vocab_size": 32000,
        "megabytes": 100.0,
        "peak_mb": 64.2,
    }
    rows = [
        {"op": "tokenizer", "tool": "fastokens", "skipped": "No module named 'fastokens'"},
        coded("cs336", "numpy", 0.1, 0.05, peak_mb=88.4),
        coded("snaptokens", "numpy", 0.2, 0.04, ids="other"),
        coded("tiktoken", "numpy", None, None, failed="KeyError"),
        coded("cs336", None, 0.1, 0.1, job="decode", threads=2, cold_wall=0.05, warm_wall=0.05),
        {**trained, "tool": "cs336", "threads": 1, "cold_cpu": 1.25, "cold_wall": 9.0},
        {**trained, "tool": "cs336", "threads": 2, "cold_cpu": 9.0, "cold_wall": 0.7},
        {"op": "tokenizer", "job": "double", "tool": "cs336", "text": "a", "seconds": [0.1, 0.2, 0.4, 0.9]},
    ]
    header = {"cpu": "EPYC", "cores": 2, "python": "3.12", "peers": {"snaptokens": "0.2"}, "commit": "abc", "date": "d"}
    text = report.table("tokenizer", {"cpu": {"tokenizer": {"header": header | {"command": "c"}, "rows": rows}}})
    assert "| numpy | cs336 | 200.0 / 400.0 | – | 88 |" in text
    assert "| numpy | snaptokens | 100.0 / 500.0 (other ids) | – |" in text
    assert "| numpy | tiktoken | – | – |" in text
    assert "Ahead of cs336: snaptokens numpy code x1 warm 1.25x." in text
    assert "| cs336 | 1.25 s, 64 MB | 0.70 s, 64 MB |" in text
    assert "`a`, repeated to 512 KB, take at most 9.0 times as long" in text
    assert "Not installed here: fastokens." in text
    assert "<sub>EPYC, 2 cores, Python 3.12, snaptokens 0.2; commit abc, d; `c`</sub>" in text


def test_absent_results_are_said():
    assert "Not measured yet: `norm`" in report.render(TEXT, {})


@pytest.mark.parametrize("text", ["nothing", "<!-- table: norm -->\n", "<!-- table: -->\n<!-- /table -->\n"])
def test_missing_markers_are_an_error(text):
    with pytest.raises(ValueError, match=r"<!-- /table -->"):
        report.render(text, {})


def test_the_optimizer_has_a_row_for_each_list_of_parameters():
    rows = [
        {**row("step", "native", [124_000_000], 1e-3, percent_of_roof=91.0), "dtype": "float32"},
        {**row("step", "fused", [124_000_000], 1.2e-3), "dtype": "float32"},
        {**row("host step", "cs336", [148], 2e-4), "dtype": "float32"},
        {**row("host step", "eager", [148], 3e-4), "dtype": "float32"},
    ]
    text = report.render(TEXT.replace("norm", "adamw"), {"h200": {"adamw": {"header": HEADER, "rows": rows}}})
    assert "| parameters | % of roof | torch fused |" in text
    assert "| 124 M float32 | 91.0 | 1.20 |" in text
    assert "step 200.0 us (torch 300.0)" in text


def test_quantization():
    rows = [
        {"model": "tiny", "method": "unquantised", "bits_per_byte": 1.5, "mib": 400.0},
        {"model": "tiny", "method": "gptq int4", "bits_per_byte": 1.5123, "mib": 60.04},
        {"model": "tiny", "method": "torchao int4", "bits_per_byte": 1.62, "mib": 400.0},
    ]
    machine = {"cpu": "x86", "cores": 2, "python": "3.11", "peers": {"torch": "2.13"}, **HEADER}
    text = report.render(
        TEXT.replace("norm", "quantization"), {"cpu": {"quantization": {"header": machine, "rows": rows}}}
    )
    assert "| tiny | gptq int4 | 1.5123 | +0.0123 | 60.0 |" in text
    assert "| tiny | torchao int4 | 1.6200 | +0.1200 | – |" in text
