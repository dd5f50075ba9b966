"""Peaks against NVIDIA's data sheets, from the properties that those cards report."""

import dataclasses
import enum
import types

import pytest
import torch

from cs336.utils import device
from cs336.utils.device import Gpu

H200 = Gpu("NVIDIA H200", (9, 0), 132, 1980e6, 3201e6, 6144, 60 << 20, 141 << 30)


def card(name, capability, sm_count, mhz):
    return dataclasses.replace(H200, name=name, capability=capability, sm_count=sm_count, clock_hz=mhz * 1e6)


@pytest.mark.parametrize(
    ("gpu", "kind", "teraflops"),
    [
        (H200, "bfloat16", 989.4),
        (H200, "float16", 989.4),
        (H200, "tf32", 494.7),
        (H200, "float32", 66.9),
        (card("NVIDIA H100 PCIe", (9, 0), 114, 1755), "bfloat16", 756.4),
        (card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1410), "bfloat16", 312),
        (card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1410), "tf32", 156),
        (card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1410), "float32", 19.5),
        (card("NVIDIA RTX A6000", (8, 6), 84, 1800), "bfloat16", 154.8),
        (card("NVIDIA GeForce RTX 3090", (8, 6), 82, 1695), "bfloat16", 71.2),
        (card("NVIDIA GeForce RTX 4090", (8, 9), 128, 2520), "bfloat16", 165.2),
        (card("NVIDIA GeForce RTX 4090", (8, 9), 128, 2520), "float32", 82.6),
        (card("NVIDIA L40S", (8, 9), 142, 2520), "bfloat16", 366),
        (card("NVIDIA B200", (10, 0), 148, 1965), "bfloat16", 2250),
        (card("NVIDIA GeForce RTX 5090", (12, 0), 170, 2407), "bfloat16", 209.5),
        (card("Tesla T4", (7, 5), 40, 1590), "float16", 65),
        (card("Tesla V100-SXM2-16GB", (7, 0), 80, 1530), "float16", 125),
    ],
    ids=lambda v: v.name if isinstance(v, Gpu) else str(v),
)
def test_peak_is_the_data_sheets(gpu, kind, teraflops):
    assert gpu.peak_flops(kind) / 1e12 == pytest.approx(teraflops, rel=0.005)


def test_bandwidth_is_the_data_sheets():
    assert H200.bandwidth / 1e12 == pytest.approx(4.9, rel=0.01)


@pytest.mark.parametrize(
    ("gpu", "kind"),
    [
        (card("NVIDIA of tomorrow", (99, 0), 100, 2000), "bfloat16"),
        (card("Tesla T4", (7, 5), 40, 1590), "bfloat16"),
        (H200, "float64"),
        (dataclasses.replace(H200, clock_hz=0), "bfloat16"),
    ],
)
def test_unknown_is_none(gpu, kind):
    assert gpu.peak_flops(kind) is None


def test_bandwidth_is_none_without_a_clock():
    assert dataclasses.replace(H200, memory_clock_hz=0).bandwidth is None


class Error(enum.Enum):
    cudaSuccess = 0
    cudaErrorInvalidDevice = 101


def fake_runtime(error=Error.cudaSuccess):
    """cuda.bindings.runtime as it answers on an H200."""
    properties = types.SimpleNamespace(
        name=b"NVIDIA H200\0\0",
        major=9,
        minor=0,
        multiProcessorCount=132,
        l2CacheSize=60 << 20,
        totalGlobalMem=141 << 30,
    )
    attributes = {
        "cudaDevAttrClockRate": 1980000,
        "cudaDevAttrMemoryClockRate": 3201000,
        "cudaDevAttrGlobalMemoryBusWidth": 6144,
    }
    return types.SimpleNamespace(
        cudaError_t=Error,
        cudaDeviceAttr=types.SimpleNamespace(**{name: name for name in attributes}),
        cudaDeviceGetAttribute=lambda attribute, index: (error, attributes[attribute]),
        cudaGetDeviceProperties=lambda index: (error, properties),
    )


def test_from_cuda_python():
    assert device.from_runtime(fake_runtime(), 0) == H200


def test_a_failing_driver_is_named():
    with pytest.raises(RuntimeError, match=r"GPU 3 failed.*cudaErrorInvalidDevice"):
        device.from_runtime(fake_runtime(Error.cudaErrorInvalidDevice), 3)


def test_from_torch_says_how_to_get_cuda_python():
    properties = types.SimpleNamespace(
        name="NVIDIA H200",
        major=9,
        minor=0,
        multi_processor_count=132,
        L2_cache_size=60 << 20,
        total_memory=141 << 30,
        clock_rate=1980000,
        memory_clock_rate=3201000,
        memory_bus_width=6144,
    )
    told = device.from_torch(properties, device.MISSING)
    assert "pip install 'cs336[cuda]'" in told.note
    assert dataclasses.replace(told, note=None) == H200
    del properties.clock_rate  # an older torch
    assert device.from_torch(properties, None).peak_flops("bfloat16") is None


@pytest.fixture
def one_h200(monkeypatch):
    monkeypatch.setattr(device, "gpu", lambda index: [H200][index])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def test_float32_is_tf32_where_torch_may_use_it(one_h200):
    before = torch.get_float32_matmul_precision()
    try:
        for precision, teraflops in (("highest", 66.9), ("high", 494.7)):
            torch.set_float32_matmul_precision(precision)
            assert device.peak_flops("cuda", torch.float32) / 1e12 == pytest.approx(teraflops, rel=0.005)
    finally:
        torch.set_float32_matmul_precision(before)
    assert device.peak_bandwidth("cuda:0") == H200.bandwidth


def test_cpu_roofs_are_measured_once():
    assert device.peak_flops("cpu", torch.float32) == device.peak_flops(torch.device("cpu"), torch.float32) > 1e8
    assert device.peak_bandwidth("cpu") == device.peak_bandwidth("cpu") > 1e8


def test_other_devices_have_no_peak():
    assert device.peak_flops("meta", torch.float32) is None
    assert device.peak_bandwidth("meta") is None


def test_no_such_gpu():
    with pytest.raises(RuntimeError, match="there is no GPU 99"):
        device.gpu(99)
