"""Oracle: the sentences a person should read, written out by hand."""

from __future__ import annotations

from tunery.export.summary import summary

CHECK = {"error": 0.00123, "largest": 0.1, "argmax": 0.995, "tolerance": 0.05}
MERGED = {
    "out": "merged",
    "kind": "merged",
    "scores": False,
    "dtype": "bfloat16",
    "parameters": 1234567,
    "bytes": 2_500_000,
    "written": CHECK,
    "merge": {"error": 2.1e-7, "largest": 1e-6, "argmax": 1.0, "tolerance": 1e-4},
    "effect": {"error": 0.416, "largest": 3.0, "argmax": 0.4},
}


def test_a_merge_in_words():
    assert summary(MERGED) == [
        "Wrote the merged model to merged (1,234,567 parameters in bfloat16, 2.5 MB), and read it back.",
        "  logits compared with the adapter on its base: relative error 0.0012 (allowed 0.05), 99.5% of the likeliest "
        "tokens agree",
        "  of which by merging, before rounding: relative error 2.1e-07 (allowed 0.0001), 100.0% of the likeliest "
        "tokens agree",
        "  the adapter moves its base's logits by 0.42 (relative)",
    ]


def test_an_adapter_that_does_nothing():
    assert summary({**MERGED, "effect": {"error": 0.0}})[-1].endswith(
        "does not move its base's logits at all: was it trained?"
    )


def test_the_other_kinds():
    adapter = {"out": "a", "kind": "adapter", "scores": False, "dtype": None, "parameters": 12, "bytes": 900,
               "written": CHECK}  # fmt: skip
    assert summary(adapter)[0] == "Wrote the adapter to a (12 parameters, 900 bytes), and read it back."
    model = {**adapter, "kind": "model", "dtype": "float16", "bytes": 15_100_000_000}
    first, second = summary(model)
    assert "(12 parameters in float16, 15.1 GB)" in first and "the model it was made from" in second


def test_a_reward_model_has_values_and_no_likeliest_tokens():
    said = summary({**MERGED, "scores": True})
    assert said[1] == "  values compared with the adapter on its base: relative error 0.0012 (allowed 0.05)"
    assert said[3] == "  the adapter moves its base's values by 0.42 (relative)"
