"""A reward for examples/grpo.yaml: does a translation keep the office's rules? Nobody has to know the right answer."""

import re

TAG = re.compile(r"</?\w+>")
HAN = re.compile(r"[\u4e00-\u9fff]")
NUMERIC_DATE = re.compile(r"\d{4}[-/.]\d")


def house_rules(completions, prompts, **columns):
    """1 for the translation and nothing else: one line, in the language asked for, with the tags of the text, and its
    dates in words."""
    return [float(keeps(prompt, answer)) for prompt, answer in zip(prompts, completions, strict=True)]


def keeps(prompt, answer):
    into_chinese, text = "Chinese" in prompt.splitlines()[0], prompt.splitlines()[-1]
    written = TAG.sub("", answer)
    right_language = len(HAN.findall(written)) > len(written) / 4 if into_chinese else not HAN.search(written)
    same_tags = sorted(TAG.findall(answer)) == sorted(TAG.findall(text))
    one_line = bool(written.strip()) and "\n" not in answer
    return one_line and right_language and same_tags and not NUMERIC_DATE.search(written)
