"""Budgets as users write them."""

import pytest

from moec.compiler.common.errors import UsageError
from moec.compiler.measure.latency.demands import Cold, Demand, Workload, parse_budgets


def test_every_kind_of_budget() -> None:
    found = parse_budgets("decode.p50=12ms, prefill512.p99=0.3s,load=2s,first_token=900ms,peak_rss=1.5GB,size=400MiB")
    assert found == (
        Demand("decode.p50", Workload("decode", 128), "p50", 0.012),
        Demand("prefill512.p99", Workload("prefill", 512), "p99", 0.3),
        Demand("load", Cold.LOAD, "p50", 2.0),
        Demand("first_token", Cold.FIRST_TOKEN, "p50", 0.9),
        Demand("peak_rss", Cold.PEAK_RSS, "", 1.5e9),
        Demand("size", Cold.SIZE, "", 400 * 2**20),
    )
    assert parse_budgets({"decode.p50": "12ms"}) == found[:1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decode=12ms", "unknown key 'decode'"),
        ("decode.p95=12ms", "unknown key"),
        ("decode.p50=12", "decode.p50 has the value '12'"),
        ("decode.p50=12MB", "decode.p50 has the value '12MB'"),
        ("size=3s", "size has the value '3s'"),
        ("load=0s", "load has the value '0s'"),
        ("decode.p50=1ms,decode128.p50=2ms", "given twice"),
        ("", "empty"),
    ],
)
def test_a_wrong_budget_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        parse_budgets(text)
    assert error.value.exit_code == 2
    assert error.value.hint
