"""What FSDP2 and DeepSpeed can't do with LoRI: refused before training, with what to do instead."""

from collections.abc import Mapping

from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor

from ..method.sharding import engine_dtype
from .config import LoriArguments


def check_engine(
    accelerator: Accelerator,
    model: PeftModel,
    args: LoriArguments,
    *,
    calibrate: bool,
    initial_weights: Mapping[str, Tensor],
) -> None:
    """
    Refuse, before training, what the engine of a run can't do.

    Args:
        accelerator (`Accelerator`): knows the engine.
        model (`PeftModel`): what is trained.
        args ([`LoriArguments`]): the run's arguments.
        calibrate (`bool`): whether both phases are ahead.
        initial_weights (`Mapping[str, Tensor]`): module path -> B before training.

    Raises:
        `ValueError`: with what to do instead.
    """
    if accelerator.parallelism_config is not None:
        _check_mesh(accelerator.parallelism_config)
    if accelerator.distributed_type == DistributedType.FSDP:
        _check_fsdp(accelerator.state, packed_later=calibrate and args.sparse_backend == "packed")
        _check_head(model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _check_zero(accelerator.state, args, calibrate)
        _check_rounding(accelerator, initial_weights)


def _check_mesh(config: ParallelismConfig) -> None:
    if config.total_size > config.dp_shard_size:
        raise ValueError(
            "The launch file's `parallelism_config` splits the devices in more ways than one. Allowed is sharding "
            "over all of them, `parallelism_config_dp_shard_size`. Take the others out."
        )


def _check_fsdp(state: AcceleratorState, packed_later: bool) -> None:
    if state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(
            "`fsdp_version: 1` flattens a layer's parameters into one, frozen and trained ones together. Allowed is "
            "2. Pass `--accelerate_config fsdp2`, or set `fsdp_version: 2` in your launch file."
        )
    if state.fsdp_plugin.activation_checkpointing:
        raise ValueError(
            "`fsdp_activation_checkpointing: true` in the launch file would wrap the layers anew in each phase. "
            "Allowed is false. Set it so, and `activation_checkpointing=True` in the trainer's arguments."
        )
    if packed_later:
        raise ValueError(
            "`sparse_backend='packed'` without masks: FSDP2 shards the parameters that are there when training "
            "begins, and packed values come to be after the calibration. Allowed with FSDP2 is 'hook'. Pass "
            "`sparse_backend='hook'`, or the masks of an earlier calibration as `mask_name_or_path`."
        )


def _check_head(model: PeftModel) -> None:
    head = model.get_output_embeddings()
    if head is not None and any(weight.requires_grad for weight in head.parameters()):
        raise ValueError(
            "The output embeddings are trained, by `modules_to_save` or `trainable_token_indices`. TRL 1.16 reads "
            "their weight whole, and under FSDP2 nothing adds up its gradient over the devices. Allowed there are "
            "other modules. Pass an adapter without them, or use DDP or DeepSpeed."
        )


def _check_zero(state: AcceleratorState, args: LoriArguments, calibrate: bool) -> None:
    if state.deepspeed_plugin.zero_stage == 3 and args.sparse_backend == "packed":
        raise ValueError(
            "`sparse_backend='packed'` reads B outside of its own module, where ZeRO-3 keeps it partitioned. Allowed "
            "with ZeRO-3 is 'hook'. Pass `sparse_backend='hook'`, or use FSDP2 or ZeRO-2."
        )
    if calibrate and args.calibration_method == "gradient":
        raise ValueError(
            "`calibration_method='gradient'` looks at the gradients of every matrix, and DeepSpeed hands its "
            "optimizer flat parts of them. Allowed with DeepSpeed are 'train' and 'random'. Pass one of these, or use "
            "FSDP2."
        )


def _check_rounding(accelerator: Accelerator, initial_weights: Mapping[str, Tensor]) -> None:
    dtype = engine_dtype(accelerator)
    if any((B.to(dtype) != B).any() for B in initial_weights.values()):
        raise ValueError(
            f"DeepSpeed would round the adapter to {dtype}, and with it the entries of earlier tasks. Allowed is an "
            "adapter that is in this type already, or training in float32. Use FSDP2, which leaves the adapter in "
            "float32, or pass `--mixed_precision no`."
        )
