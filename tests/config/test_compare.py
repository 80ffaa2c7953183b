"""What differs between two runs, and what of it may."""

import dataclasses

from dsllm.config.compare import differences
from dsllm.config.data import DataConfig, SourceConfig
from dsllm.config.run import RunConfig, RunSection

RUN = RunConfig(run=RunSection(name="a", directory="runs/a"))


def test_a_run_does_not_differ_from_itself():
    assert differences(RUN, dataclasses.replace(RUN)) == []


def test_how_a_run_is_carried_out_may_change():
    other = dataclasses.replace(
        RUN,
        deepspeed="other.json",
        run=dataclasses.replace(RUN.run, directory="elsewhere"),
        train=dataclasses.replace(RUN.train, micro_batch_sequences=2, total_tokens=5),
        checkpoint=dataclasses.replace(RUN.checkpoint, every_steps=3, keep_last=9),
        log=dataclasses.replace(RUN.log, every_steps=1),
    )
    found = differences(RUN, other)
    assert all(d.changeable for d in found)
    assert {d.field for d in found} == {
        "deepspeed", "run.directory", "train.micro_batch_sequences", "train.total_tokens", "checkpoint.every_steps",
        "checkpoint.keep_last", "log.every_steps",
    }  # fmt: skip


def test_what_a_run_computes_may_not_change():
    other = dataclasses.replace(
        RUN,
        data=DataConfig(sources=(*RUN.data.sources, SourceConfig(name="more", paths=("x",)))),
        model=dataclasses.replace(RUN.model, dropout=0.1),
    )
    found = differences(RUN, other)
    assert [d.field for d in found] == ["data.sources.1", "model.dropout"]
    assert not any(d.changeable for d in found)
    assert str(found[1]) == "model.dropout: saved 0.0, now 0.1"
