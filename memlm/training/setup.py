"""What has to be right before a run starts."""

import dataclasses
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from memlm.config import RunConfig, TrainConfig
from memlm.data import PackedDataset, load_tokenizer
from memlm.data.config import HubSource
from memlm.data.hub import hub_documents
from memlm.data.shard_manifest import tokenizer_hash
from memlm.errors import UserError
from memlm.gloo import hold_gloo
from memlm.memory import ValueTable
from memlm.memory.exchange import all_gather_reads
from memlm.memory.sharding import MEMORY, shard_values, tables_apart
from memlm.models import (
    AttachConfig,
    InsertConfig,
    MemLMConfig,
    MemLMForCausalLM,
    attach_memory,
    load_memory,
)
from memlm.models.activations import compile_blocks, set_activations, set_blockwise
from memlm.models.insert import freeze_base, insert
from memlm.models.retrofit import INSERT, retrofit_config
from memlm.training import zero2
from memlm.training.base_model import (
    check_tokenizer,
    check_vocabulary,
    load_base,
    load_checkpoint,
    load_own,
)
from memlm.training.checkpoint import check_architecture
from memlm.training.fully_sharded import main_has_weights, prepare_sharded, send_from_main
from memlm.training.logs import check_trackers
from memlm.training.loss import RowLoss
from memlm.training.row_optimizer import RowOptimizer
from memlm.training.sharded import has_parts

REPLICATE = "replicate"  # the dimension of a mesh whose processes hold the same part of a table
_CPU_HINT = "on a CPU: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ..."


def build_accelerator(config: RunConfig) -> Accelerator:
    """The processes and devices of a run.

    Raises:
        UserError: for a tracker that is missing, or when not all processes that the launcher was
            asked for take part, or when they cannot share the rows of a step, or for the first
            version of FSDP, or what does not work under DeepSpeed.
    """
    check_trackers(config.train.trackers)
    if zero2.is_asked():
        zero2.check(config.train, int(os.environ.get("WORLD_SIZE", "1")))
    with zero2.unknown_to_accelerate():
        accelerator = Accelerator(
            mixed_precision=config.train.mixed_precision,
            log_with=config.train.trackers or None,
            project_dir=config.output_dir,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    hold_gloo()
    check_processes(accelerator.num_processes, config.train)
    _check_sharding(accelerator)
    if accelerator.is_fsdp2:
        _keep_states_in_fp32(accelerator)
    return accelerator


def check_processes(started: int, options: TrainConfig) -> None:
    """Raise UserError unless all processes asked for take part and can share the rows of a step.

    Args:
        started: the processes that take part.
        options: what they train.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if started != asked:
        raise UserError(f"asked for {asked} processes but {started} take part; {_CPU_HINT}")
    # `accelerate launch --cpu --num_processes 2` announces an address but starts one process.
    launcher = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
    if started == 1 and launcher and "WORLD_SIZE" not in os.environ:
        raise UserError(f"asked for several processes but only one was started; {_CPU_HINT}")
    check_shares(started, options)


def check_shares(processes: int, options: TrainConfig) -> None:
    """Raise UserError unless so many processes can share the rows of a step and the tables."""
    if processes % options.memory_parallel:
        raise UserError(
            f"train.memory_parallel: {processes} processes cannot be divided into groups of "
            f"{options.memory_parallel}"
        )
    together = options.sequence_parallel
    if processes % together:
        raise UserError(
            f"train.sequence_parallel: {processes} processes cannot be divided into groups of "
            f"{together}"
        )
    groups = processes // together
    named = f"{groups} processes" if together == 1 else f"{groups} groups of {together} processes"
    for stage in options.stages():
        rows = options.tokens_per_step // stage.length
        if rows % groups:
            raise UserError(
                f"train.tokens_per_step: {rows} rows of {stage.length} tokens cannot be shared "
                f"by {named}"
            )


def _check_sharding(accelerator: Accelerator) -> None:
    """Refuse the first FSDP, whose shards are no DTensors; say so where FSDP is left out."""
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded and not accelerator.is_fsdp2:
        raise UserError(
            "fsdp_version: 1 is not supported; launch with fsdp_version: 2, as in "
            "configs/accelerate/fsdp2.yaml"
        )
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if sharded and accelerator.state.fsdp_plugin.activation_checkpointing:
        raise UserError(
            "fsdp_activation_checkpointing is not supported; leave it out of the launch config and "
            "use train.activations"
        )
    if asked and not sharded and accelerator.is_main_process:
        print(
            "warning: FSDP was asked for, but accelerate does not shard in "
            f"{accelerator.num_processes} process(es) on {accelerator.device.type}: every process "
            "holds the whole model",
            file=sys.stderr,
            flush=True,
        )


def _keep_states_in_fp32(accelerator: Accelerator) -> None:
    """FSDP2 would cast the inputs of every block, the memory states among them."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy,
            reduce_dtype=torch.float32,
            output_dtype=None,
            cast_forward_inputs=False,
        )


def open_datasets(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[PackedDataset, PackedDataset | None]:
    """The training rows, and the held-out rows (in the last stage's form) if any are wanted.

    Raises:
        UserError: for data that do not fit.
    """
    data, options = config.data, config.train
    if data.carry and not options.carry_state:
        raise UserError("data.carry: rows that continue documents need train.carry_state: true")
    for source in data.parsed_sources():
        if isinstance(source, HubSource) and source.streaming:
            # Else nothing of it were read before the first step.
            next(hub_documents(dataclasses.replace(source, shuffle_buffer=0), data.seed))
    first, last = options.stages()[0], options.stages()[-1]
    training = PackedDataset(
        dataclasses.replace(data, carry=options.carry_state),
        tokenizer,
        "train",
        first.length,
        lanes=options.tokens_per_step // first.length,
    )
    if not options.evaluation_rows:
        return training, None
    apart = dataclasses.replace(data, carry=False)
    held_out = PackedDataset(apart, tokenizer, "validation", last.length, store=training.store)
    return training, held_out.with_length(last.length, last.digits)


def starts_empty(accelerator: Accelerator, source: Path | None) -> bool:
    """Whether this process's model is built on the meta device.

    Under FSDP2 it gets its weights when it is sharded, from the main process, or from the parts of
    a checkpoint.
    """
    in_parts = source is not None and has_parts(source)
    return accelerator.is_fsdp2 and (in_parts or not accelerator.is_main_process)


def build_inputs(
    config: RunConfig, source: Path | None, empty: bool = False
) -> tuple[PreTrainedTokenizerBase, PackedDataset, PackedDataset | None, PreTrainedModel]:
    """The tokenizer, the training rows, the held-out rows if any are wanted, and the model.

    What can be wrong is found in the order of what it costs to find: no text is read for a model
    that does not fit, and no model is built for texts that do not.

    Args:
        config: the run.
        source: the checkpoint to go on from; None = it is new.
        empty: the model has no weights yet (see `build_model`).

    Raises:
        UserError: for anything that does not fit.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_model(config, tokenizer, source)
    if source is not None:
        saved = load_tokenizer(str(source))
        if tokenizer_hash(saved) != tokenizer_hash(tokenizer):
            raise UserError(
                f"data.tokenizer: {config.data.tokenizer!r} is not the tokenizer that {source} was "
                "trained with; resume with that one"
            )
    training, held_out = open_datasets(config, tokenizer)
    return tokenizer, training, held_out, build_model(config, tokenizer, source, empty)


def check_model(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, source: Path | None
) -> MemLMConfig | AttachConfig:
    """The config of the model that is trained, or of the memory that is attached to one.

    Sizes of the vocabulary and special tokens are the tokenizer's where the config has none, or the
    pretrained model's.

    Raises:
        UserError: for a wrong model section, a tokenizer that is not the pretrained model's, or a
            checkpoint of another architecture.
    """
    section = config.model
    if "attach" in section and config.train.sequence_parallel > 1:
        raise UserError(
            "train.sequence_parallel: the layers of a pretrained model need whole rows; leave it "
            "at 1, or use model.insert instead of model.attach"
        )
    if "attach" in section:
        wanted = AttachConfig.from_mapping(section["attach"], "model.attach")
    elif "pretrained" in section:
        wanted = retrofit_config(section["pretrained"], _insert_config(config))
        given = config.data.tokenizer
        check_tokenizer(section["pretrained"], wanted.vocab_size, tokenizer, given)
    else:
        given = MemLMConfig.from_mapping({"vocab_size": len(tokenizer)} | section)
        if given.vocab_size < len(tokenizer):
            raise UserError(
                f"model.vocab_size: {given.vocab_size} is smaller than the tokenizer's "
                f"{len(tokenizer)}"
            )
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        defaults = {name: getattr(tokenizer, name) for name in names}
        defaults["vocab_size"] = given.vocab_size
        wanted = MemLMConfig.from_mapping(defaults | section)
    if source is not None:
        check_architecture(source, wanted)
    return wanted


def _insert_config(config: RunConfig) -> InsertConfig | None:
    if "insert" not in config.model:
        return None
    return InsertConfig.from_mapping(config.model["insert"], INSERT)


def build_model(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    source: Path | None,
    empty: bool = False,
) -> PreTrainedModel:
    """The model with new weights, those of a pretrained model, or those of a checkpoint.

    What is added to a pretrained model is in float32, as the model is loaded.

    Args:
        config: the run.
        tokenizer: of the data.
        source: the checkpoint to go on from; None = it is new.
        empty: on the meta device, without weights; not for a memory that is attached to a
            pretrained model, which every process loads.

    Raises:
        UserError: as `check_model`; for a pretrained model that cannot be loaded, or knows fewer
            tokens; and for a checkpoint without all the weights.
    """
    model_config = check_model(config, tokenizer, source)
    inserted = _insert_config(config)
    if isinstance(model_config, AttachConfig):
        model = _build_attached(config, model_config, tokenizer, source)
    elif empty:
        with torch.device("meta"):
            model = MemLMForCausalLM(model_config)
    elif source is not None and not has_parts(source):
        model = load_checkpoint(source)
    elif source is None and "pretrained" in config.model:
        model = load_own(config.model["pretrained"])
        torch.manual_seed(config.train.seed)
        if inserted is not None:
            insert(model, inserted, INSERT)
    else:  # parts are read once the model is sharded
        torch.manual_seed(config.train.seed)
        model = MemLMForCausalLM(model_config)
    if inserted is not None and inserted.freeze_base:
        freeze_base(model, inserted)
    set_activations(model, config.train.activations)
    set_blockwise(model, config.train.blockwise_tokens)
    if config.train.compile:
        compile_blocks(model)
    return model


def _build_attached(
    config: RunConfig,
    attach_config: AttachConfig,
    tokenizer: PreTrainedTokenizerBase,
    source: Path | None,
) -> PreTrainedModel:
    model = load_base(config.model["pretrained"])
    rows = model.get_input_embeddings().weight.shape[0]
    check_vocabulary(config.model["pretrained"], rows, tokenizer, config.data.tokenizer)
    if source is not None:
        return load_memory(model, source)
    torch.manual_seed(config.train.seed)
    return attach_memory(model, attach_config)


def share_tables(accelerator: Accelerator, model: PreTrainedModel, options: TrainConfig) -> None:
    """Divide the value tables among groups of `memory_parallel` processes.

    Raises:
        UserError: for a model without tables, or tables that cannot be divided so.
    """
    if options.memory_parallel == 1:
        return
    tables = {name: table for name, table in model.named_modules() if isinstance(table, ValueTable)}
    sends = accelerator.is_fsdp2 and main_has_weights(accelerator, model)
    whole = {name: table.weight.detach() for name, table in tables.items() if sends}
    shape = (accelerator.num_processes // options.memory_parallel, options.memory_parallel)
    mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=(REPLICATE, MEMORY))
    shard_values(model, mesh, options.memory_shard)
    if sends:
        parts = {name: table.weight for name, table in tables.items()}
        send_from_main(parts, whole, accelerator.device)


def prepare(
    accelerator: Accelerator, row_loss: RowLoss, optimizers: list[torch.optim.Optimizer]
) -> list[Any]:
    """The loss module, wrapped for the accelerator's processes, and the optimizers.

    Tables that are updated by rows stay out of what DDP, FSDP2 and ZeRO-2 average and shard; their
    optimizers come last. The others come back without accelerate's wrapper, which is there to scale
    fp16 losses.
    """
    rows = [one for one in optimizers if isinstance(one, RowOptimizer)]
    others = [one for one in optimizers if not isinstance(one, RowOptimizer)]
    if accelerator.ddp_handler is not None:
        # A memory's parameters have no gradient in a step whose rows never reach them.
        accelerator.ddp_handler.find_unused_parameters = bool(row_loss.model.memories())
    if accelerator.is_fsdp2:
        prepare_sharded(accelerator, row_loss, optimizers)
    elif zero2.is_asked():
        (adamw,) = others
        with tables_apart(row_loss, accelerator.device):
            row_loss, *others = zero2.prepare_engine(accelerator, row_loss, adamw)
    else:
        with warnings.catch_warnings(), tables_apart(row_loss, accelerator.device):
            # The name that replaces it in torch 2.13 does not exist in torch 2.11.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            row_loss, *wrapped = accelerator.prepare(row_loss, *others)
        others = [optimizer.optimizer for optimizer in wrapped]
    if accelerator.num_processes > 1:
        _exchange_reads(rows, accelerator.num_processes)
    return [row_loss, *others, *rows]


def _exchange_reads(optimizers: list[RowOptimizer], processes: int) -> None:
    """Let optimizers of rows bring together the reads of all processes with the same part."""
    for optimizer in optimizers:
        optimizer.processes = processes
        weight, group = optimizer.tables[0].weight, dist.group.WORLD
        if isinstance(weight, DTensor):
            group = weight.device_mesh.get_group(REPLICATE)
        if dist.get_world_size(group) > 1:
            optimizer.exchange = partial(all_gather_reads, group=group)
