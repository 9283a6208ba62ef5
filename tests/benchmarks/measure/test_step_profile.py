"""Where a step's time goes, on spans whose answer is known, and in a real profile."""

import pytest
import torch
from torch.profiler import record_function

from benchmarks.measure.step_profile import (
    CATEGORIES,
    INPUT_SPAN,
    Span,
    StepProfile,
    busy_share,
    category_of,
    time_shares,
    verdict,
)

_CPU = ("input", "compute", "memory", "communication")


def test_only_communication_that_nothing_hides_is_exposed() -> None:
    spans = [
        Span("communication", 10, 60),
        # Hides 20 to 50.
        Span("compute", 20, 40),
        Span("memory", 30, 50),
        # A second collective at the same time counts once.
        Span("communication", 55, 70),
        Span("input", 80, 90),
    ]
    shares = time_shares(spans, 0, 100, _CPU)
    assert shares == pytest.approx(
        {"compute": 0.20, "memory": 0.10, "communication": 0.30, "input": 0.10, "host": 0.30}
    )
    assert sum(shares.values()) == pytest.approx(1.0)
    assert busy_share(spans, 0, 100, "communication") == pytest.approx(0.6)


def test_spans_are_cut_at_the_window_and_order_does_not_matter() -> None:
    spans = [Span("compute", -50, 10), Span("communication", 5, 20), Span("memory", 90, 400), Span("compute", 200, 300)]
    shares = time_shares(spans, 0, 100, _CPU)
    assert shares == pytest.approx({"compute": 0.1, "memory": 0.1, "communication": 0.1, "input": 0.0, "host": 0.7})
    assert time_shares(reversed(spans), 0, 100, _CPU) == shares
    assert time_shares([], 3, 4, _CPU)["host"] == 1.0


def test_a_product_inside_another_operator_is_a_product() -> None:
    """``aten::linear`` contains ``aten::addmm``: what remains of it moves data."""
    names = [("aten::linear", 0, 10), ("aten::addmm", 2, 9)]
    spans = []
    for name, start, end in names:
        category = category_of(name, is_on_gpu=False, device_type="cpu")
        assert category is not None
        spans.append(Span(category, start, end))
    shares = time_shares(spans, 0, 10, _CPU)
    assert (shares["compute"], shares["memory"]) == pytest.approx((0.7, 0.3))


def test_on_a_cpu_reading_a_batch_is_input_and_on_a_gpu_what_the_device_does_comes_first() -> None:
    spans = [Span("input", 0, 10), Span("memory", 2, 8)]
    assert time_shares(spans, 0, 10, _CPU)["input"] == 1.0
    assert time_shares(spans, 0, 10, ("compute", "memory", "communication", "input"))["input"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("name", "is_on_gpu", "device_type", "category"),
    [
        ("gloo:all_reduce", False, "cpu", "communication"),
        ("gloo:all_reduce", False, "cuda", "communication"),
        ("c10d::allreduce_", False, "cpu", "communication"),
        ("c10d::allreduce_", False, "cuda", None),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", False, "cpu", "compute"),
        ("aten::mul", False, "cpu", "memory"),
        ("aten::mul", False, "cuda", None),
        ("Optimizer.step#AdamW.step", False, "cpu", None),
        ("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", False, "cuda", "input"),
        (INPUT_SPAN, False, "cpu", "input"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", True, "cuda", "communication"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", True, "cuda", "compute"),
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTT", True, "cuda", "compute"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", True, "cuda", "memory"),
    ],
)
def test_events_are_told_apart(name: str, is_on_gpu: bool, device_type: str, category: str | None) -> None:
    assert category_of(name, is_on_gpu=is_on_gpu, device_type=device_type) == category


def test_the_verdict_follows_the_stated_threshold() -> None:
    def shares(**values: float) -> dict[str, float]:
        return dict.fromkeys(CATEGORIES, 0.0) | values

    assert verdict(shares(compute=0.5, memory=0.3, communication=0.2)).startswith("bound by compute: ")
    assert verdict(shares(communication=0.7, host=0.3)).startswith("bound by communication: ")
    assert verdict(shares(input=0.6, host=0.4)) == "bound by input: 60% of a step is waiting for batches."
    mixed = verdict(shares(memory=0.49, host=0.35, communication=0.16))
    assert mixed.startswith("bound by memory and host: 49% of a step is ")
    assert mixed.endswith(", 35% the host's; 16% could be saved at most by hiding all communication.")


def test_a_real_profile_is_divided() -> None:
    square = torch.randn(256, 256)
    profile = StepProfile(torch.device("cpu"))
    profile.begin()
    for step in range(3):
        with record_function(INPUT_SPAN):
            torch.randn(1000)
        # The first step is not looked at.
        for _ in range(200 if step == 0 else 20):
            square @ square
        profile.edge()
    profile.end()
    shares = profile.shares()
    assert sum(shares[category] for category in CATEGORIES) == pytest.approx(1.0)
    assert shares["compute"] > 0.5
    assert shares["input"] > 0
    assert shares["communication"] == shares["communication_busy"] == 0
    assert 0 < shares["step_s"] < 1
