"""The verdict of a comparison: gates decide what is better or worse, and nothing else does."""

import pytest

from moec.compiler.report.diff import Difference
from moec.compiler.report.judgement import judge, markdown

RECIPE = Difference("recipe", "dtype", "fp32", "fp16")
SMALLER = Difference("sizes", "all files", 1000, 900)
LOSS = Difference("gates", "quality: increase", 0.01, 0.02)


def gate(first: str | None, second: str | None) -> Difference:
    return Difference("gates", "quality", first, second)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ([], "B is the same as A, in every figure."),
        ([LOSS], "B is what A is; only what was measured differs; perplexity +2.00% in place of +1.00%."),
        (
            [RECIPE, SMALLER, LOSS],
            (
                "B differs from A, and no gate passes in one of them alone; it differs in recipe, sizes; "
                "it is 10.0% smaller; perplexity +2.00% in place of +1.00%."
            ),
        ),
        ([gate("pass", "fail")], "B is worse than A: quality: fail in place of pass."),
        ([gate("pass", "not run")], "B is worse than A: quality: not run in place of pass."),
        ([gate("pass", None), RECIPE], "B is worse than A: quality: absent in place of pass; it differs in recipe."),
        ([gate("not run", "too noisy")], "B is worse than A: quality: too noisy in place of not run."),
        ([gate("fail", "pass")], "B is better than A: quality: pass in place of fail."),
        ([gate(None, "pass")], "B is better than A: quality: pass in place of absent."),
        (
            [gate("not run", "pass"), Difference("gates", "latency", "pass", "fail")],
            "B is worse than A: latency: fail in place of pass.",
        ),
        ([gate("fail", "too noisy")], "B is what A is; only what was measured differs."),
        ([gate("fail", "not run")], "B is what A is; only what was measured differs."),
    ],
)
def test_the_sentence_says_what_the_gates_say(found: list[Difference], sentence: str) -> None:
    judged = judge(found)
    assert judged.sentence == sentence
    assert {"worse": "worse", "better": "better", "the same": "the same"}.get(str(judged.comparison), "") in sentence


def test_markdown_of_no_difference_has_no_table() -> None:
    assert markdown([], judge([])) == "**B is the same as A, in every figure.**"


def test_long_values_are_cut_and_bars_do_not_end_a_cell() -> None:
    text = markdown([Difference("recipe", "a|b", "x" * 100, None)], judge([RECIPE]))
    assert "| recipe | a\\|b | " + "x" * 58 + ".. | - |  |" in text
