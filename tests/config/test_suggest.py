"""The suggestion at the end of an error message."""

from dsllm.config.suggest import did_you_mean


def test_the_closest_known_word_is_suggested():
    assert did_you_mean("overlap_com", ("reduce_scatter", "overlap_comm")) == "; did you mean 'overlap_comm'?"
    assert did_you_mean("lama-7b", {"llama-7b": 1, "gpt2-124m": 2}) == "; did you mean 'llama-7b'?"


def test_nothing_is_suggested_where_no_word_is_close():
    assert did_you_mean("xyz", ("reduce_scatter", "overlap_comm")) == ""
    assert did_you_mean("xyz", ()) == ""
