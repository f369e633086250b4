"""Several processes that train one model: work of one for all, common failure, gathered weights.

They are started by `torchrun` or `accelerate launch` and see the same files. Accelerate spreads the model over them
(FSDP2, DeepSpeed, or a copy in each).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from accelerate import PartialState, init_empty_weights
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from polar.core.errors import InputError

log = logging.getLogger(__name__)

Sharding = Literal["none", "fsdp", "deepspeed"]
T = TypeVar("T")

MAX_WAIT = timedelta(hours=12)
"""Longest wait of a process for the others: the main one encodes a whole corpus meanwhile."""


def join_processes() -> PartialState:
    """Return this process among those of the run; the first call connects them."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=MAX_WAIT)


def largest(number: int) -> int:
    """Return the largest number of all processes; all of them call this together."""
    state = PartialState()
    if state.num_processes == 1:
        return number
    found = torch.tensor(number, device=state.device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found)


@contextmanager
def fail_together() -> Iterator[None]:
    """Raise an error of this block on one process in all of them.

    All processes come to the end of the block, and nothing in it waits for another process.

    Raises:
        InputError: whichever process found the fault.
    """
    error = None
    try:
        yield
    except InputError as found:
        error = found
    if largest(error is not None):
        raise next(found for found in gather_object([error]) if found is not None)


@contextmanager
def alone() -> Iterator[None]:
    """Log an error of this block in the process where it happens, which ends; the launcher ends the others.

    They are in the middle of the model, where they exchange weights and cannot be asked.

    Raises:
        InputError: as in the block.
    """
    try:
        yield
    except InputError as error:
        if not PartialState().is_main_process:  # its command line reports only common errors
            log.error("process %d: %s", PartialState().process_index, error)
        raise


def from_main(work: Callable[[], T]) -> T:
    """Return the result of work on the main process, on every process; only the main process does it."""
    found: list[Any] = [None]
    with fail_together():
        if PartialState().is_main_process:
            found = [work()]
    given: T = broadcast_object_list(found)[0]
    return given


def sharding(fsdp: bool = False) -> Sharding:
    """Return the sharding of the model, by our own setting or by that of `accelerate launch`.

    Raises:
        InputError: it is to be sharded, but accelerate would not do so.
    """

    def is_on(name: str) -> bool:
        return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"

    if is_on("DEEPSPEED"):
        return "deepspeed"
    if not (fsdp or is_on("FSDP")):
        return "none"
    if not fsdp and os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError("FSDP of version 1 is not supported; set fsdp_version: 2 in the configuration of accelerate")
    if PartialState().distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise InputError(
            "fsdp needs a process for every GPU; start with torchrun --nproc-per-node GPUS -m polar.cli.main"
        )
    return "fsdp"


def reduce_in_float32(trainer: Trainer) -> None:
    """Make FSDP2 with bfloat16 add up the gradients of all processes in float32, and keep losses in float32."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            plugin.mixed_precision_policy.param_dtype, torch.float32, cast_forward_inputs=False
        )


def gathered(trainer: Trainer, model: PreTrainedModel) -> PreTrainedModel:
    """Return a model that was sharded in training, whole on the CPU of the main process, as it is on the others.

    Args:
        trainer: After training; all processes call this.
        model: The reward model in the trainer's discriminator.
    """
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return model
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return model
    unset_hf_deepspeed_config()  # or ZeRO-3 would shard the new one as well
    prefix = "model."  # in `Discriminator`
    with init_empty_weights(include_buffers=False):
        whole = type(model)(model.config)
    whole.load_state_dict(
        {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}, assign=True
    )
    return whole
