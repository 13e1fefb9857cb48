"""Every name of PEFT, TRL, transformers and torch that they do not promise to keep, and what stands on it."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
from transformers import Trainer
from trl import SFTTrainer

from lori_trl import LoriSFTTrainer, LoriTrainerMixin
from lori_trl.method.sparse import SparseLora
from lori_trl.training.hub_pushes import HubPushes
from lori_trl.training.saving import AdapterSaves

PACKAGE = Path(__file__).parents[1] / "lori_trl"
LIBRARIES = ("accelerate", "peft", "torch", "transformers", "trl")
# Module, name, the parameters that we pass or take ("" where it is no function), and what of ours needs it.
NAMES = [
    (
        "peft.tuners.lora.variants",
        "_register_frozen_peft_weight",
        "module adapter_name weight_name",
        "A and B stay frozen",
    ),
    ("peft.tuners.lora.layer", "LoraVariant.forward", "module active_adapter x result", "sparse.SparseLora"),
    ("peft.tuners.lora.layer", "LoraVariant.init", "module adapter_name", "sparse.SparseLora"),
    ("peft.tuners.lora.layer", "LoraVariant.merge_safe", "module active_adapter orig_weight", "sparse.SparseLora"),
    ("peft.tuners.lora.layer", "LoraVariant.merge_unsafe", "module active_adapter orig_weight", "sparse.SparseLora"),
    ("peft.tuners.lora.layer", "LoraVariant.unmerge", "module active_adapter orig_weight", "sparse.SparseLora"),
    ("peft.tuners.lora.layer", "ParamWrapper", "", "layers.lora_layers refuses fused experts"),
    ("peft.utils.merge_utils", "dare_linear", "task_tensors weights density", "merging by dare"),
    ("peft.utils.merge_utils", "magnitude_prune", "task_tensors weights density", "merging by magnitude"),
    ("peft.utils.merge_utils", "task_arithmetic", "task_tensors weights", "merging by linear_peft"),
    ("peft.utils.merge_utils", "ties", "task_tensors weights density", "merging by ties"),
    ("peft.utils.other", "AuxiliaryTrainingWrapper", "", "dense: what is trained besides B"),
    ("peft.utils.other", "TrainableTokensWrapper", "", "dense: what is trained besides B"),
    (
        "peft.utils.other",
        "get_pattern_key",
        "pattern_keys key_to_match",
        "adapter.folder: rank_pattern, alpha_pattern",
    ),
    ("torch.nn", "Module._backward_hooks", "", "sparse: whether a base layer has hooks"),
    ("torch.nn", "Module._backward_pre_hooks", "", "sparse: whether a base layer has hooks"),
    ("torch.nn", "Module._forward_hooks", "", "sparse: whether a base layer has hooks"),
    ("torch.nn", "Module._forward_pre_hooks", "", "sparse: whether a base layer has hooks"),
    ("torch.nn.modules.module", "_has_any_global_hook", "", "sparse: whether a base layer has hooks"),
    (
        "torch.nn.parallel",
        "DistributedDataParallel._set_params_and_buffers_to_ignore_for_model",
        "module params_and_buffers_to_ignore",
        "sparse: DDP sends no masks",
    ),
    ("transformers", "Trainer._finish_current_push", "", "hub.while_training: one commit after the other"),
    ("transformers", "Trainer._load_best_model", "", "the best checkpoint's B, with A frozen"),
    ("transformers", "Trainer._load_from_checkpoint", "resume_from_checkpoint model", "resuming, with A frozen"),
    ("transformers", "Trainer._load_optimizer_and_scheduler", "checkpoint", "resuming with the same optimizer"),
    ("transformers", "Trainer._prepare_for_training", "", "masks on FSDP2's shards"),
    ("transformers", "Trainer._push_from_checkpoint", "checkpoint_folder", "hub.while_training: whole commits"),
    ("transformers", "Trainer._run_epoch", "", "a phase that has all its steps takes no further one"),
    ("transformers", "Trainer._save", "output_dir state_dict", "the adapter's folder"),
    ("transformers", "Trainer._save_optimizer_and_scheduler", "output_dir", "an engine's checkpoint has the values"),
    ("transformers", "Trainer.get_decay_parameter_names", "model", "no weight decay on B"),
    ("transformers", "ProgressCallback.training_bar", "", "the phase on the progress bar"),
    ("transformers.pytorch_utils", "Conv1D", "", "layers.lora_layers takes GPT-2's linear layers"),
    ("transformers.trainer", "TRAINER_STATE_NAME", "", "checkpoints"),
    ("transformers.utils", "PushInProgress", "", "hub.while_training"),
    (
        "trl",
        "SFTTrainer._prepare_dataset",
        "dataset processing_class args packing formatting_func dataset_name",
        "truncation_mode='keep_prompt_end'",
    ),
    ("trl", "SFTTrainer._tag_names", "", "the card's tags"),
    ("trl", "SFTTrainer._tokenizer", "", "truncation_mode='keep_prompt_end'"),
    ("trl", "SFTTrainer.create_model_card", "", "LoRI's card in place of TRL's"),
    ("trl.scripts.sft", "make_parser", "prog", "lori recipes validate, of baselines"),
    ("trl.trainer.utils", "create_model_from_path", "", "base_model.load_base_model"),
]
# Attributes that an instance sets: they stand in the class's source alone.
SET_LATER = {
    "training_bar",
    "_tokenizer",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks",
}


@pytest.mark.parametrize(("module", "name", "parameters", "needs_it"), NAMES, ids=[".".join(row[:2]) for row in NAMES])
def test_a_name_is_there_and_takes_what_we_pass(module, name, parameters, needs_it):
    owner = importlib.import_module(module)
    *classes, last = name.split(".")
    for each in classes:
        owner = getattr(owner, each)
    broken = f"`{module}.{name}` is not what it was; it is needed for: {needs_it}"
    if last in SET_LATER:
        assert f"self.{last}" in inspect.getsource(owner) or f'"{last}"' in inspect.getsource(owner), broken
        return
    assert hasattr(owner, last), broken
    if parameters:
        assert set(parameters.split()) <= inspect.signature(getattr(owner, last)).parameters.keys(), broken


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_every_private_name_is_in_the_table():
    """What is imported, what is overridden, and what is called through `super()` or a library's class."""
    listed = {name.rpartition(".")[2] for _, name, _, _ in NAMES}
    used = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
                used |= {alias.name for alias in node.names if private(alias.name)}
            elif isinstance(node, ast.Attribute) and private(node.attr) and "cli" not in file.parts:
                called = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super"
                used |= {node.attr} if called else set()
    for ours in (LoriSFTTrainer, LoriTrainerMixin, AdapterSaves, HubPushes):
        used |= {
            name for name in vars(ours) if private(name) and (hasattr(SFTTrainer, name) or hasattr(Trainer, name))
        }
    used |= {name for name in vars(SparseLora) if not name.startswith("_") and hasattr(SparseLora.__base__, name)}
    used -= {"_abc_impl"}
    assert used <= listed
    assert "_prepare_dataset" in used and "_register_frozen_peft_weight" in used and "unmerge" in used
