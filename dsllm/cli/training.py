"""Joins the parts of a training run: processes, model, engine, data and loop. `dsllm train` comes here once all is checked."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dsllm import __version__, counts
from dsllm.checkpoint.architecture import differences_in_function
from dsllm.checkpoint.hugging_face import HuggingFaceReader
from dsllm.checkpoint.read import CheckpointReader
from dsllm.cli.inside import breakdown_of, profile_of
from dsllm.cli.terminal import Terminal
from dsllm.config.load import run_to_dict
from dsllm.config.run import RunConfig
from dsllm.config.train import Precision
from dsllm.config.yaml_file import read_yaml, write_yaml
from dsllm.data import fingerprint
from dsllm.data.loader import TrainingBatches, ValidationBatches
from dsllm.data.manifest import FILE_NAME as DATA_MANIFEST
from dsllm.data.manifest import Manifest
from dsllm.engine.build import Engine, build_engine
from dsllm.engine.nvme import swap_files
from dsllm.engine.processes.cores import Cores
from dsllm.engine.processes.device import (
    check_compiler,
    choose_device,
    compute_dtype,
    peak_flops,
    resolve_precision,
    set_up_process,
)
from dsllm.engine.processes.process_group import World, lost_ranks_named, process_group
from dsllm.engine.processes.ranks import Ranks
from dsllm.engine.settings.final_config import Layout, final_config
from dsllm.engine.state import check_attributes, load_state
from dsllm.errors import EXIT_INTERRUPTED, CheckpointError, DataError, RunError
from dsllm.evaluate.perplexity import validation_loss
from dsllm.files import sha256_of_file, write_atomically
from dsllm.model.initial import decay_groups
from dsllm.model.initial_state import InitialValues, WeightsOnly
from dsllm.model.kernels import Kernels, load_kernels
from dsllm.model.recompute import Recompute
from dsllm.model.transformer import Transformer, parameter_shapes
from dsllm.slices import StateReader
from dsllm.train.loop import Run, train
from dsllm.train.metrics import Metrics, Speed, short
from dsllm.train.picture import draw_loss_curve
from dsllm.train.progress import Progress
from dsllm.train.run_directory import DEEPSPEED_FILE, RUN_FILE, check_shared, lock_run, read_status, write_status
from dsllm.train.saving import RunRecord, check_same_run, clean_up, find_resumable, find_weights, restore

Tell = Callable[[str], None]


def run(
    config: RunConfig, given: Mapping[str, Any], manifest: Manifest, ranks: Ranks, profile_steps: str | None = None
) -> int:
    """Train from the run's last checkpoint, or from the start; the process's exit code.

    Args:
        profile_steps: FIRST:LAST, the steps to profile; empty: some after a warm-up; None: none
    """
    cores = set_up_process(ranks.local_size, ranks.local_rank, config.train.bind_cores)
    device = choose_device(ranks.local_rank)
    precision = resolve_precision(config.train.precision, device)
    final = final_config(config, given, _layout(ranks, device, precision))
    count = counts.parameter_count(config.model, config.context_length).total
    kernels = load_kernels(config.train.kernels, device.type)
    if config.train.compile:
        check_compiler(device)
    tell = Terminal(speaks=ranks.rank == 0)
    timeout = timedelta(minutes=config.train.timeout_minutes)
    with (
        swap_files(final, count, precision, ranks),
        process_group(ranks, device, timeout) as world,
        lost_ranks_named(world),  # while the directory is taken
        _run_directory(config, world) as attempt,
        lost_ranks_named(world),  # inside it, so that status.json has the words too
    ):
        directory = Path(config.run.directory)
        reader, damaged = find_resumable(directory, world, tell)
        _check_directory(config, directory, reader, tell)
        make_model = partial(_make_model, config, precision, kernels)
        engine = build_engine(make_model, decay_groups, config.train, precision, final, world)
        check_attributes(engine)
        batches = _training_batches(config, manifest, world)
        progress = _start_or_resume(engine, reader, config, manifest, batches, tell)
        if progress.step >= config.num_steps:
            if world.rank == 0:
                write_status(directory, "finished", attempt=attempt, step=progress.step, tokens=progress.tokens)
            tell(f"{directory} is finished: {progress.tokens:,} tokens. Raise train.total_tokens to go on")
            return 0
        clean_up(directory, world)
        record = RunRecord(config=config, deepspeed=final, versions=_versions(), damaged=damaged)
        profile = profile_of(config, final, engine, profile_steps, progress.step, tell)
        metrics = _open_metrics(config, engine, manifest, progress, attempt, tell)
        try:
            _introduce(config, engine, cores, metrics.speed, tell)
            with breakdown_of(config, world, tell) as breakdown:
                job = Run(
                    config=config,
                    directory=directory,
                    record=record,
                    metrics=metrics if world.rank == 0 else None,
                    tell=tell,
                    breakdown=breakdown,
                    profile=profile,
                )
                progress, stopped_by = train(engine, batches, progress, job, _validation(config, manifest, world))
        finally:
            if world.rank == 0:
                metrics.close()
        return _conclude(config, progress, stopped_by, world, tell)


def _layout(ranks: Ranks, device: torch.device, precision: Precision) -> Layout:
    nodes = -(-ranks.world_size // ranks.local_size)
    return Layout(world_size=ranks.world_size, device=device.type, precision=precision, num_nodes=nodes)


def _make_model(config: RunConfig, precision: Precision, kernels: Kernels) -> Transformer:
    recompute = Recompute(what=config.train.activation_checkpointing, offload=config.train.activation_offload)
    model = Transformer(config.model, config.context_length, compute_dtype(precision), recompute, kernels)
    if config.train.compile:
        model.compile_layers()
    return model


@contextlib.contextmanager
def _run_directory(config: RunConfig, world: World) -> Iterator[int]:
    """Hold the run's directory: locked by rank 0, seen by all, its status true however the block ends.

    Yields the attempt's number, from 1.
    """
    directory, lock, problem = Path(config.run.directory), None, ""
    if world.rank == 0:
        try:
            lock = lock_run(directory)
        except RunError as error:
            problem = str(error)
    problem = world.gather(problem)[0]
    if problem:
        raise RunError(problem)
    check_shared(directory, world.rank, world.gather)
    attempt = int(read_status(directory).get("attempt", 0)) + 1
    world.barrier()  # all have read the old status before rank 0 writes the new one
    try:
        if world.rank == 0:
            write_status(directory, "running", attempt=attempt)
        yield attempt
    except BaseException as error:
        if world.rank == 0:
            write_status(directory, "failed", attempt=attempt, reason=f"{type(error).__name__}: {error}")
        raise
    finally:
        if lock is not None:
            lock.release()


def _check_directory(config: RunConfig, directory: Path, reader: CheckpointReader | None, tell: Tell) -> None:
    """Refuse a directory that belongs to another run."""
    if reader is not None:
        check_same_run(reader.run(), config, reader.folder, tell)
        return
    saved = directory / RUN_FILE
    if saved.is_file():
        name = read_yaml(saved)[0].get("run", {}).get("name")
        if name != config.run.name:
            raise RunError(
                f"{directory}: belongs to the run '{name}', not to '{config.run.name}': set another run.directory"
            )
        tell(f"{directory} holds no checkpoint yet: starting over")


def _training_batches(config: RunConfig, manifest: Manifest, world: World) -> TrainingBatches:
    return TrainingBatches(
        Path(config.data.directory or ""),
        manifest,
        config.data,
        seed=config.run.seed,
        global_batch_sequences=config.train.global_batch_sequences,
        micro_batch_sequences=config.train.micro_batch_sequences,
        rank=world.rank,
        num_ranks=world.size,
    )


def _start_or_resume(
    engine: Engine,
    reader: CheckpointReader | None,
    config: RunConfig,
    manifest: Manifest,
    batches: TrainingBatches,
    tell: Tell,
) -> Progress:
    """Give the engine its state, and find out where the run stands."""
    data_sha256 = sha256_of_file(Path(config.data.directory or "") / DATA_MANIFEST)
    if reader is None:
        load_state(engine, _first_state(config, engine.world, tell))
        return Progress(data_sha256=data_sha256)
    progress = restore(engine, reader)
    if progress.data_sha256 != data_sha256:
        raise DataError(
            f"data.directory {config.data.directory}: is not the data that {reader.folder} was trained on "
            "(the manifests differ): bring that back, or start a new run with model.init_from"
        )
    _check_delivery(progress, batches, engine.world)
    tell(f"resuming {reader.folder}: step {progress.step:,}, {progress.tokens:,} tokens")
    return progress


def _first_state(config: RunConfig, world: World, tell: Tell) -> StateReader:
    """What a new run starts from: the initial values, or the weights named by model.init_from."""
    shapes = parameter_shapes(config.model, config.context_length)
    if config.model.init_from is None:
        return InitialValues(config.model, shapes, config.run.seed)
    source = Path(config.model.init_from)
    if not source.is_dir():
        raise CheckpointError(f"model.init_from {source}: no such folder")
    reader: CheckpointReader | HuggingFaceReader
    if (source / "config.json").is_file():
        reader = HuggingFaceReader(source)
    else:
        reader = find_weights(source, world, tell)
    found = {name: tuple(reader.shape(name)) for name in reader.names()}
    wrong = differences_in_function(reader.model_config, config.model)
    wrong += [
        f"{name}: {found.get(name, 'absent')} there, {shapes.get(name, 'absent')} here"
        for name in sorted(found.keys() | shapes.keys())
        if found.get(name) != shapes.get(name)
    ]
    if wrong:
        more = f"\n- and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(f"model.init_from {source}: it is another model:\n- " + "\n- ".join(wrong[:8]) + more)
    tell(f"starting from the weights of {source}")
    return WeightsOnly(reader)


def _check_delivery(progress: Progress, batches: TrainingBatches, world: World) -> None:
    """Have the last step's samples delivered again: they must be the ones that were trained on."""
    if progress.step == 0:
        return
    own = batches.fingerprint(progress.step - 1)
    if fingerprint.from_halves(*world.sum(fingerprint.halves(own))) != progress.last_step_fingerprint:
        raise DataError(
            f"the loaders deliver other samples for step {progress.step} than those trained on: a shard's content or the "
            "sources' weights have changed; `dsllm prepare CONFIG` tells more"
        )


def _validation(config: RunConfig, manifest: Manifest, world: World) -> Callable[[Engine], Mapping[str, float]]:
    """The held-out loss as the loop asks for it."""
    if not any(source.validation for source in manifest.sources):
        return lambda engine: {}
    held_out = ValidationBatches(
        Path(config.data.directory or ""),
        manifest,
        sequence_length=config.data.sequence_length,
        micro_batch_sequences=config.train.micro_batch_sequences,
        rank=world.rank,
        num_ranks=world.size,
        max_sequences=config.train.validation_sequences or None,
        document_mask=config.data.document_mask,
    )

    def validate(engine: Engine) -> Mapping[str, float]:
        engine.deepspeed.eval()
        try:
            result = validation_loss(engine.deepspeed, held_out, world.device, world.sum)
        finally:
            engine.deepspeed.train()
        measured = {"validation_loss": result.loss}
        if result.bits_per_byte is not None:
            measured["validation_bits_per_byte"] = result.bits_per_byte
        return measured

    return validate


def _open_metrics(
    config: RunConfig, engine: Engine, manifest: Manifest, progress: Progress, attempt: int, tell: Tell
) -> Metrics:
    """The run's records, opened on rank 0 only; the peak is measured on every rank at the same time."""
    world, directory = engine.world, Path(config.run.directory)
    peak, origin = peak_flops(world.device, engine.precision, config.log.peak_tflops)
    total_peak = world.sum([peak])[0]
    speed = Speed(
        flops_per_token=counts.flops_per_token(config.model, config.data.sequence_length),
        peak_flops=total_peak,
        peak_origin=origin,
    )
    metrics = Metrics(directory, config, speed, attempt, tell)
    if world.rank == 0:
        write_atomically(directory / RUN_FILE, write_yaml(run_to_dict(config)))
        write_atomically(directory / DEEPSPEED_FILE, json.dumps(engine.deepspeed.config, indent=2) + "\n")
        data = Path(config.data.directory or "")
        shutil.copytree(data / manifest.tokenizer.directory, directory / "tokenizer", dirs_exist_ok=True)
        if (data / "data_card.json").is_file():
            shutil.copyfile(data / "data_card.json", directory / "data_card.json")
        metrics.open(progress.step)
    return metrics


def _introduce(config: RunConfig, engine: Engine, cores: Cores, speed: Speed, tell: Tell) -> None:
    """Say what is about to run."""
    world, count = engine.world, counts.parameter_count(config.model, config.context_length)
    accumulation = config.train.global_batch_sequences // (config.train.micro_batch_sequences * world.size)
    tell(
        f"{config.run.name}: {short(count.total)} parameters, {world.size} ranks on {world.device.type} "
        f"(started by {world.ranks.launcher}; {torch.get_num_threads()} threads and {cores}), "
        f"ZeRO stage {engine.stage}, {engine.precision}"
    )
    tell(
        f"{short(config.tokens_per_step)} tokens a step ({accumulation} micro-batches of "
        f"{config.train.micro_batch_sequences} x {config.data.sequence_length} on each rank), {config.num_steps} steps; "
        f"MFU against {speed.peak_flops / 1e12:.3g} TFLOP/s ({speed.peak_origin})"
    )


def _conclude(config: RunConfig, progress: Progress, stopped_by: str, world: World, tell: Tell) -> int:
    """The last words of an attempt, and its exit code."""
    directory = Path(config.run.directory)
    finished = progress.step >= config.num_steps
    if world.rank == 0:
        state = "finished" if finished else "interrupted"
        draw_loss_curve(directory)
        write_status(
            directory,
            state,
            attempt=int(read_status(directory).get("attempt", 0)),
            step=progress.step,
            tokens=progress.tokens,
        )
    if finished:
        tell(f"trained {progress.tokens:,} tokens; metrics, loss curve (loss.png) and checkpoints are in {directory}")
        return 0
    tell(f"{stopped_by}: saved at step {progress.step}; the same command goes on from there")
    return EXIT_INTERRUPTED


def _versions() -> dict[str, str]:
    return {"dsllm": __version__} | {name: version(name) for name in ("torch", "deepspeed", "safetensors")}
