"""A bad input says where it is, what is wrong, and what is special about it."""

from dsllm.prepare.document import BadInput


def test_a_bad_input_reads_as_one_sentence():
    assert str(BadInput("a.jsonl, line 3", "not valid JSON")) == "a.jsonl, line 3: not valid JSON"
    assert str(BadInput("a.txt", "not UTF-8", "byte 3 is 0xff")) == "a.txt: not UTF-8 (byte 3 is 0xff)"
