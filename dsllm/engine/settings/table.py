"""Every key of the DeepSpeed JSON, one row each: all that DeepSpeed 0.19 reads, and what it removed but users still write."""

from dsllm.engine.settings.key import (
    LARGE,
    SHARDED,
    SMALL,
    Covered,
    Device,
    Dtype,
    Factor,
    Key,
    NotCovered,
    Object,
    Positive,
    Stage,
    Switch,
    Text,
    Untouched,
    Whole,
    block,
    of_run,
    refused,
)

STAGE = "zero_optimization.stage"
OFFLOAD_OPTIMIZER = "zero_optimization.offload_optimizer"
OFFLOAD_PARAM = "zero_optimization.offload_param"
AIO = "aio"

FP8 = "fp8 is refused until a GPU run has proven its numbers; use train.precision bf16"
NOT_PROVEN = "its numbers are not proven here"
OWN_CHECKPOINTS = "dsllm writes checkpoints of its own, atomic and with checksums, that load under any layout"
OWN_METRICS = "dsllm writes metrics.jsonl and TensorBoard files (log.tensorboard)"
OWN_DATA_ORDER = "the run decides the order of the data"
OWN_CPU_ADAM = "it needs DeepSpeed's own CPU Adam, and dsllm trains with torch's AdamW"
CUDA_KERNELS_ONLY = "GPUs only"

ON_OFF = Covered(values=(True, False))
OFF_ON = Covered(values=(False, True))
ELEMENTS = Covered(values=(SMALL, LARGE), others=(SMALL, LARGE))
ELEMENTS_OR_0 = Covered(values=(0, SMALL, LARGE), others=(SMALL, LARGE))
DTYPES = Covered(values=("fp32", "bf16", "fp16"))
PRINTS, MEASURES = Untouched("prints"), Untouched("measures")
PINNED = Untouched("in which memory of the host the copy is")
NOT_SWAPPED = (
    "the model here is too small to be swapped (DeepSpeed swaps from 1 MiB on), and the operator must be built first; "
    "tests/engine/test_nvme.py compares it with offload to the CPU"
)

RUN = (
    of_run("train_batch_size", "train.global_batch_sequences"),
    of_run("train_micro_batch_size_per_gpu", "train.micro_batch_sequences"),
    of_run("gradient_accumulation_steps", "global batch / (micro-batch x data-parallel ranks)"),
    of_run("gradient_clipping", "train.gradient_clipping"),
    Key(
        "optimizer",
        "run",
        decided_by="train.optimizer",
        kinds=("AdamW", "Adam"),  # DeepSpeed's Adam decays as AdamW does
        fields={
            "params.lr": "learning_rate",
            "params.betas": "beta1 and beta2",
            "params.eps": "epsilon",
            "params.weight_decay": "weight_decay",
        },
    ),
    Key(
        "scheduler",
        "run",
        decided_by="train.schedule",
        fields={"params.warmup_num_steps": "warmup_steps", "params.total_num_steps": "shape"},
    ),
    *block(
        of_run("bf16", "train.precision"),
        of_run("enabled", "train.precision"),
        refused("check_grad_overflow", "without it a non-finite gradient ruins the weights", off=(True,)),
        refused("immediate_grad_update", NOT_PROVEN),
        refused("bf16_master_weights_and_grads", "bf16 masters lose small updates"),
        refused("bf16_optimizer_states", "bf16 moments lose small gradients"),
    ),
    of_run("bfloat16", "train.precision", off=(False,)),
    *block(
        of_run("fp16", "train.precision"),
        of_run("enabled", "train.precision"),
        of_run("loss_scale", "train.loss_scale.static"),
        of_run("initial_scale_power", "train.loss_scale.initial_power"),
        of_run("loss_scale_window", "train.loss_scale.window_steps"),
        of_run("hysteresis", "train.loss_scale.hysteresis"),
        of_run("min_loss_scale", "train.loss_scale.minimum"),
        refused("auto_cast", "it casts the inputs, and a language model's inputs are token numbers"),
        refused("consecutive_hysteresis", NOT_PROVEN),
        refused("fp16_master_weights_and_grads", "fp16 masters lose small updates"),
    ),
    of_run("torch_autocast", "train.precision", off=(False,)),
    of_run("activation_checkpointing", "train.activation_checkpointing"),
    of_run("compile", "train.compile", off=(False,)),
    of_run("vocabulary_size", "model.vocab_size"),
    of_run("tensor_parallel", "parallel.tensor", off=(False,)),
    of_run("pipeline", "parallel.pipeline", off=(False,)),
    of_run(
        "sequence_parallel_size",
        "parallel.sequence",
        off=(1,),
        reason="by this key alone, ZeRO 0-2 would not synchronise the sequence ranks",
    ),
    of_run("expert_parallel", "parallel.expert", off=(False,)),
    of_run("use_data_before_expert_parallelism", "parallel.expert", off=(False,)),
)

JSON = (
    *block(
        Key("data_types", "json"),
        Key("grad_accum_dtype", "json", Dtype, parity=DTYPES, refuses=("fp8",), reason=FP8),  # default: final_config
        refused("param_dtype", "train.precision decides the type of the parameters", off=()),
        refused("buffer_dtype", "the model's buffers keep the type that it gives them", off=()),
        refused("keep_in_fp32_modules", "the model keeps in fp32 what needs it", off=()),
    ),
    Key("communication_data_type", "json", Dtype, parity=DTYPES, refuses=("fp8",), reason=FP8),  # default: final_config
    Key("prescale_gradients", "json", Switch, parity=OFF_ON),
    Key("gradient_predivide_factor", "json", Factor, parity=Covered(values=(1.0, 2.0), others=(2.0,))),
    Key("steps_per_print", "json", Positive, 10**9, parity=PRINTS),
    Key("wall_clock_breakdown", "json", Switch, parity=MEASURES),
    Key("memory_breakdown", "json", Switch, parity=MEASURES),
    Key("dump_state", "json", Switch, parity=PRINTS),
    Key("comms_logger", "json", Object, parity=MEASURES),
    Key("flops_profiler", "json", Object, parity=MEASURES),
    Key("log_level", "json", Text, parity=PRINTS),
    Key("disable_python_gc", "json", Switch, parity=Untouched("when Python frees what is no longer used")),
    Key(
        "zero_allow_untested_optimizer", "json", Switch,
        parity=Untouched("the optimizer is torch's AdamW, which DeepSpeed counts as tested"),
    ),
    Key(
        "zero_force_ds_cpu_optimizer", "json", Switch,  # final_config writes false with offload_optimizer
        parity=Untouched("true is refused; false keeps torch's AdamW, as in every row"),
        refuses=(True,),
        reason="it requires DeepSpeed's own CPU Adam, which compiles for minutes; torch's fused AdamW steps on the CPU as "
        "fast, and is the one that is proven here",
    ),
    *block(
        Key(AIO, "json", stages=(3,), parity=NotCovered("how NVMe is read and written; as offload to NVMe")),
        Key("block_size", "json", Positive, 1_048_576, nvme_only=True),
        Key("queue_depth", "json", Positive, 8, nvme_only=True),
        Key("intra_op_parallelism", "json", Positive, 1, nvme_only=True),
        Key("single_submit", "json", Switch, False, nvme_only=True),
        Key("overlap_events", "json", Switch, True, nvme_only=True),
        Key(
            "use_gds", "json", Switch, False, nvme_only=True,
            refuses=(True,), reason="GPUDirect Storage is not proven here",
        ),
    ),
)  # fmt: skip

REFUSED = (
    refused("amp", "Apex AMP was removed from DeepSpeed 0.19; use train.precision"),
    refused("autotuning", "it starts runs of its own"),
    refused("checkpoint", OWN_CHECKPOINTS),
    refused("comet", OWN_METRICS),
    refused("compression_training", "removed from DeepSpeed 0.19"),
    refused("csv_monitor", OWN_METRICS),
    refused("curriculum_learning", f"removed from DeepSpeed 0.19; {OWN_DATA_ORDER}"),
    refused("data_efficiency", OWN_DATA_ORDER),
    refused("dataloader_drop_last", OWN_DATA_ORDER),
    refused("datastates_ckpt", OWN_CHECKPOINTS),
    refused("disable_allgather", "DeepSpeed reads it and does nothing with it"),
    refused("eigenvalue", "removed from DeepSpeed 0.19"),
    refused("elasticity", "removed from DeepSpeed 0.19; a dsllm run resumes on any number of ranks as it is"),
    refused("fp8", FP8),
    refused(
        "gradient_allreduce_op",
        "the sum would scale gradients with the number of ranks; dsllm averages",
        off=("mean", False),
    ),
    refused("graph_harvesting", "removed from DeepSpeed 0.19"),
    refused("hybrid_engine", "it serves inference"),
    refused("load_universal_checkpoint", OWN_CHECKPOINTS),
    refused(
        "managed_gradient_accumulation",
        "DeepSpeed's counter of micro-batches decides when dsllm's step updates the weights",
        off=(True,),
    ),
    refused("nebula", f"removed from DeepSpeed 0.19; {OWN_CHECKPOINTS}"),
    refused("progressive_layer_drop", "removed from DeepSpeed 0.19"),
    refused("quantize_training", "removed from DeepSpeed 0.19"),
    refused(
        "seq_parallel_communication_data_type",
        "communication_data_type is the type of all that ranks exchange",
        off=("fp32",),
    ),
    refused("sparse_attention", "removed from DeepSpeed 0.19"),
    refused("sparse_gradients", "removed from DeepSpeed 0.19; the gradients of the embeddings are dense"),
    refused("tensorboard", "use log.tensorboard"),
    refused("timers", "dsllm measures the time of each step (log.breakdown)"),
    refused("wandb", OWN_METRICS),
    refused("weight_quantization", "it serves inference"),
    refused("zenflow", f"it steps behind the gradients; {OWN_CPU_ADAM}"),
)

OFFLOAD = (
    *block(
        Key("offload_optimizer", "json", stages=SHARDED, off=(False,)),
        Key(
            "device", "json", Device, "none",
            parity=Covered(values=("none", "cpu"), name="offload_optimizer", outside={"nvme": NOT_SWAPPED}),
        ),
        Key("pin_memory", "json", Switch, True, parity=PINNED),
        Key("nvme_path", "json", Text, nvme_only=True),
        Key("buffer_count", "json", Positive, nvme_only=True),  # default: offload.py, as many as AdamW needs
        Key("pipeline_read", "json", Switch, False, nvme_only=True),
        Key("pipeline_write", "json", Switch, False, nvme_only=True),
        refused("ratio", f"{OWN_CPU_ADAM}, where the device keeps a part of the states: leave it at 1.0", off=(1.0,)),
        refused("fast_init", "it shortens the first write of values that dsllm replaces right afterwards"),
        refused("super_offload", f"it steps in processes of its own; {OWN_CPU_ADAM}"),
        refused("cpuadam_cores_perc", "it belongs to super_offload, which is refused", off=()),
    ),
    *block(
        Key("offload_param", "json", stages=(3,), off=(False,)),
        Key(
            "device", "json", Device, "none",
            parity=Covered(values=("none", "cpu"), name="offload_param", outside={"nvme": NOT_SWAPPED}),
        ),
        Key("pin_memory", "json", Switch, True, parity=PINNED),
        Key("nvme_path", "json", Text, nvme_only=True),
        Key("buffer_count", "json", Positive, 5, nvme_only=True),
        Key("buffer_size", "json", Positive, nvme_only=True),  # default: offload.py, a rank's share of a parameter
        Key("max_in_cpu", "json", Whole, 1_000_000_000, nvme_only=True),
    ),
)  # fmt: skip

ZERO = block(
    Key("zero_optimization", "json"),
    Key("stage", "json", Stage, 0),  # a part of every row's place in the parity table
    Key("reduce_bucket_size", "json", Positive, 50_000_000, SHARDED, ELEMENTS),
    Key("allgather_bucket_size", "json", Whole, 50_000_000, SHARDED, ELEMENTS),
    Key("allgather_partitions", "json", Switch, True, SHARDED, ON_OFF),
    Key("reduce_scatter", "json", Switch, True, SHARDED, OFF_ON),  # final_config: false on CPU at stages 1 and 2
    Key("overlap_comm", "json", Switch, False, SHARDED, OFF_ON),
    Key("contiguous_gradients", "json", Switch, True, SHARDED, ON_OFF),
    Key("sub_group_size", "json", Whole, 1_000_000_000, (3,), ELEMENTS),
    Key("use_multi_rank_bucket_allreduce", "json", Switch, True, SHARDED, ON_OFF),
    Key("ignore_unused_parameters", "json", Switch, True, SHARDED, ON_OFF),
    Key("stage3_prefetch_bucket_size", "json", Whole, 50_000_000, (3,), ELEMENTS_OR_0),
    Key("stage3_param_persistence_threshold", "json", Whole, 100_000, (3,), ELEMENTS_OR_0),
    Key("stage3_model_persistence_threshold", "json", Whole, 2**63 - 1, (3,), ELEMENTS),
    Key("stage3_max_live_parameters", "json", Whole, 1_000_000_000, (3,), ELEMENTS_OR_0),
    Key("stage3_max_reuse_distance", "json", Whole, 1_000_000_000, (3,), ELEMENTS_OR_0),
    Key(
        "stage3_gather_16bit_weights_on_model_save", "json", Switch, False, (3,),
        Untouched("for a saver of DeepSpeed's that dsllm does not use"),
    ),
    Key(
        "memory_efficient_linear", "json", Switch, False, SHARDED, Untouched("true is refused; false in every row"),
        refuses=(True,),
        reason="it replaces torch.nn.functional.linear in the process, and rounds twice where there is a bias",
    ),
    # ZeRO++ (Wang et al. 2023). "auto" is all ranks of a host; absent is 1
    Key("zero_hpz_partition_size", "json", Positive, 1, (3,), Covered(values=(1, 2), others=(2,))),
    Key(
        "zero_quantized_weights", "json", Switch, False, (3,),
        NotCovered(f"rounds weights to 8 bits on purpose; {CUDA_KERNELS_ONLY}"),
    ),
    Key(
        "zero_quantized_gradients", "json", Switch, False, (3,),
        NotCovered(f"rounds gradients to 4 bits on purpose; {CUDA_KERNELS_ONLY}, and on several hosts"),
    ),
    *OFFLOAD,
    refused("round_robin_gradients", "it trains right, but other tools then read wrong weights out of the engine"),
    refused("check_grad_overflow", "without it a non-finite gradient ruins the weights", off=(True,)),
    refused("compute_grad_norm", "dsllm reports the gradient norm at every step", off=(True,)),
    refused("load_from_fp32_weights", "dsllm loads the weights", off=(True,)),
    refused("pipeline_loading_checkpoint", "dsllm loads the weights"),
    refused("elastic_checkpoint", OWN_CHECKPOINTS),
    refused("save_muon_momentum_buffer_in_memory", "the optimizer is AdamW"),
    refused("zero_quantized_nontrainable_weights", "pretraining freezes no weight"),
    refused("parameter_alignment", f"it pads the flat partitions; {NOT_PROVEN}"),
    refused("leaf_module", f"no module of the model needs it; {NOT_PROVEN}"),
    refused("override_module_apply", f"it changes how modules are initialized; {NOT_PROVEN}", off=(True,)),
    refused("stage3_module_granularity_threshold", f"it fetches several modules as one; {NOT_PROVEN}", off=(0,)),
    refused("stage3_use_all_reduce_for_fetch_params", NOT_PROVEN),
    refused("stage3_allgather_sequential", NOT_PROVEN),
    refused("enable_sanity_checks", "it is for DeepSpeed's developers"),
    refused("log_trace_cache_warnings", "it is for DeepSpeed's developers"),
    refused("legacy_stage1", "an old implementation that DeepSpeed removed"),
    refused("zenflow", f"it steps behind the gradients; {OWN_CPU_ADAM}"),
    refused("mics_shard_size", "MiCS was removed from DeepSpeed 0.19", off=(False, -1)),
    refused("mics_hierarchical_params_gather", "MiCS was removed from DeepSpeed 0.19"),
    refused("zeropp_loco_param", "LoCo was removed from DeepSpeed 0.19"),
    refused("cpu_offload", "removed from DeepSpeed; use offload_optimizer"),
    refused("cpu_offload_param", "removed from DeepSpeed; use offload_param"),
    refused("cpu_offload_params", "removed from DeepSpeed; use offload_param"),
    refused("cpu_offload_use_pin_memory", "removed from DeepSpeed; use offload_optimizer.pin_memory"),
    refused("stage3_gather_fp16_weights_on_model_save", "the old name of stage3_gather_16bit_weights_on_model_save"),
)  # fmt: skip

TABLE: dict[str, Key] = {key.path: key for key in (*RUN, *JSON, *ZERO, *REFUSED)}
"""By path. The parity table names its rows in this order."""

BLOCKS = frozenset(key.block for key in TABLE.values())
"""Paths of the objects whose keys are in the table; the empty path is the JSON itself."""


def keys_in(outer: str) -> dict[str, Key]:
    """The keys of one object, by their own names."""
    return {key.name: key for key in TABLE.values() if key.block == outer}
