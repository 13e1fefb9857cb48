"""`lori-sft`, which is `lori sft`: train an adapter."""

import argparse
import copy
import os
import re
import sys
import tempfile
import warnings
from contextlib import ExitStack
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from ..inputs.intervals import INTERVALS, check_range
from ..recipes.find import (
    find_recipe,
    foreign_code,
    is_baseline,
    is_merge_recipe,
    is_shipped,
    list_recipes,
    nearest,
    read_recipe,
    validate_recipe,
)
from .completion import sft_completion_parser
from .errors import bad_input
from .terminal import printable, show, show_logs_as_text
from .version import version_lines

_EXAMPLE = """
several processes: --accelerate_config single | ddp | fsdp2 | fsdp2_multinode | zero2 | zero3 | FILE, and
--num_processes N; with --dry-run it says what is sharded and what each device holds

--help-all lists all of TRL's options; --version and --print-completion SHELL are as of `lori`

example:
  lori-sft --recipe code_lori_s.yaml --output_dir code-lori-s --per_device_train_batch_size 8
  lori-sft --accelerate_config ddp --num_processes 8 --recipe code_lori_s.yaml --output_dir code-lori-s
"""
# TRL's fields that `--help` shows besides those that shipped recipes set.
_ALSO_SHOWN = {"help", "load_in_4bit", "max_steps", "push_to_hub", "hub_model_id", "resume_from_checkpoint", "seed"}
# Options of `accelerate launch` that differ from run to run, and so stand beside a launch file.
_LAUNCH_OPTIONS = (
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "mixed_precision",
)


def sft(arguments: list[str] | None = None) -> int:
    """Run `lori-sft`. Returns the exit code: 0; 2 for a wrong call; a failed run raises."""
    arguments = sys.argv[1:] if arguments is None else arguments
    show_logs_as_text()
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL and transformers about each other's names
    if "--version" in arguments:
        show(version_lines())
        return 0
    if any(argument.startswith("--print-completion") for argument in arguments):
        sft_completion_parser().parse_args(arguments)
    if {"--help-all", "--help_all"} & set(arguments):
        sft_parser(help_all=True).print_help()
        return 0
    if "--accelerate_config" in arguments:
        return _launch(arguments)
    with ExitStack() as held:
        return _run(arguments, held)


def _run(arguments: list[str], held: ExitStack) -> int:
    """Run a call that trains, or looks at what would be trained; `held` keeps the output for this process alone."""
    with bad_input("lori-sft"):
        parser = sft_parser()
        script, args, model_args, recipe = _parse(parser, arguments)
        if script.dry_run:
            _dry_run(script, args, model_args)
            return 0
        if script.preview is not None:
            _preview(script, args, model_args)
            return 0
        trainer = _build_trainer(script, args, model_args, held)
    trainer.recipe = recipe
    resume = args.resume_from_checkpoint
    with bad_input("lori-sft", (ValueError, FileNotFoundError)):
        output = trainer.train(True if str(resume).lower() == "true" else resume)
    trainer.save_model()
    metrics = output.metrics
    if trainer.eval_dataset is not None:
        evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        metrics |= trainer.evaluate()
        metrics["initial_eval_loss"] = [*evaluations, metrics["eval_loss"]][0]
    trainer.save_metrics("all", metrics, combined=False)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    if trainer.is_world_process_zero():
        _print_outcome(trainer, metrics)
    trainer.accelerator.end_training()
    return 0


def _launch(arguments: list[str]) -> int:
    """Start `lori-sft` on several processes, or say what each of them would hold."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    from ..training.launch import Engine, find_launch_file

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--accelerate_config")
    for name in _LAUNCH_OPTIONS:
        finder.add_argument(f"--{name}")
    options, rest = finder.parse_known_args(arguments)
    with bad_input("lori-sft"):
        file = find_launch_file(options.accelerate_config)
        if {"--dry-run", "--dry_run"} & set(rest):
            devices = None if options.num_processes is None else int(options.num_processes)
            script, args, model_args, _ = _parse(sft_parser(), rest)
            _dry_run(script, args, model_args, Engine.from_launch_file(file, devices))
            return 0
    launch = ["--config_file", str(file)]
    for name in _LAUNCH_OPTIONS:
        if getattr(options, name) is not None:
            launch += [f"--{name}", getattr(options, name)]
    launch_command(launch_command_parser().parse_args([*launch, "--module", "lori_trl.cli", "sft", *rest]))
    return 0


def sft_parser(*, help_all: bool = False):
    """Make the parser of `lori-sft`, of which `--help` shows what matters, or all."""
    from trl import ModelConfig, TrlParser

    from ..recipes.data import LoriScriptArguments
    from ..training.config import LoriSFTConfig

    class Parser(TrlParser):
        def error(self, message: str):  # argparse would print pages of usage first
            raise ValueError(message)

        def format_help(self) -> str:
            formatter = self._get_formatter()
            formatter.add_text(f"usage: {self.prog} [--recipe RECIPE] [--FIELD VALUE ...]")
            formatter.add_text(self.description)
            for title, actions in _help_groups(self._actions, help_all).items():
                formatter.start_section(title)
                formatter.add_arguments(actions)
                formatter.end_section()
            formatter.add_text(self.epilog)
            return formatter.format_help()

    parser = Parser(
        (LoriScriptArguments, LoriSFTConfig, ModelConfig),
        prog="lori-sft",
        allow_abbrev=False,
        description="Train a LoRI adapter: calibrate, select the mask, adapt.",
        epilog=_EXAMPLE,
        formatter_class=_HelpFormatter,
    )
    parser.set_defaults(use_peft=True, lora_target_modules="all-linear")
    return parser


def _help_groups(actions: list[argparse.Action], help_all: bool) -> dict[str, list[argparse.Action]]:
    """
    Group the options for `--help`: LoRI's own first, as `LoriArguments` documents them, TRL's hundreds last.

    Of TRL's, those are shown that a shipped recipe sets, or all.
    """
    from trl import ModelConfig

    from ..recipes.data import LoriScriptArguments
    from ..training.config import LoriArguments

    sections = re.split(r"> Parameters that control (.+)\n", LoriArguments.__doc__ or "")[1:]
    groups = {
        f"LoRI: {title}": set(re.findall(r"^        (\w+) \(`", body, re.MULTILINE))
        for title, body in zip(sections[::2], sections[1::2], strict=True)
    }
    groups["the data and the run"] = {"help", *_names(LoriScriptArguments), "output_dir"}
    groups["the base model and the adapter (TRL's ModelConfig)"] = _names(ModelConfig)
    groups["training (TRL's SFTConfig)"] = {action.dest for action in actions}.difference(*groups.values())
    if not help_all:
        recipes = [file for file in list_recipes() if not is_merge_recipe(file) and not is_baseline(file)]
        shown = _ALSO_SHOWN.union(*map(read_recipe, recipes))
        for title in [title for title in groups if "TRL's" in title]:
            groups[title] &= shown
    return {title: [action for action in actions if action.dest in names] for title, names in groups.items()}


def _names(config: type) -> set[str]:
    return {each.name for each in fields(config)}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Leave out the second spelling of every option, with dashes."""
        shown = copy.copy(action)
        shown.option_strings = [option for option in action.option_strings if "-" not in option.lstrip("-")]
        return super()._format_action_invocation(shown)


def make_configs(parser, recipe: dict[str, Any], arguments: list[str]) -> list[Any]:
    """
    Make the configurations of a recipe and a command line, which goes over it; they check themselves.

    Raises:
        `ValueError`: one of them, or argparse, refuses a value.
    """
    parser.set_defaults_with_config(**recipe)
    try:
        *configs, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except Exception as error:  # transformers raises this and that on values it does not foresee
        raise ValueError(
            f"{str(error).rstrip('.')}. `lori-sft --help-all` lists what is allowed. Correct the call or the recipe."
        ) from error
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise ValueError(
            f"`{unknown[0]}` is no option{nearest(unknown[0], known)}. `lori-sft --help-all` lists all. Correct it."
        )
    _, args, *_ = configs
    if not isinstance(args.model_init_kwargs, dict | None):
        raise ValueError(
            f"`model_init_kwargs={args.model_init_kwargs}` is text, and a mapping is needed. On the command line that "
            'is JSON, e.g. `--model_init_kwargs \'{"attn_implementation": "sdpa"}\'`. Correct the call or the recipe.'
        )
    return configs


def warn_of_foreign_code(file: Path, recipe: dict[str, Any]) -> None:
    """Say aloud what of a recipe that is not a shipped one runs code from elsewhere."""
    for reason in [] if is_shipped(file) else foreign_code(recipe):
        show(f"{file}: {reason}. Go on only if you trust the recipe.", error=True)


def _parse(parser, arguments: list[str]) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Parse recipe and command line. Returns the three configurations and the recipe as it is run."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe", "--config")  # TRL's name for it
    options, arguments = finder.parse_known_args(arguments)
    recipe = {}
    if options.recipe is not None:
        file = find_recipe(options.recipe)
        if is_baseline(file):
            raise ValueError(
                f"`--recipe {options.recipe}` is a baseline for TRL's own trainer: it sets `use_peft`. `lori-sft` "
                f"trains LoRI adapters alone. Run it with `trl sft --config {file}`, or take `use_peft` out."
            )
        recipe = validate_recipe(file, parser)
        warn_of_foreign_code(file, recipe)
        os.environ |= {name: str(value) for name, value in recipe.pop("env", {}).items()}
    configs = make_configs(parser, recipe, arguments)
    script, args, model_args = configs
    if model_args.model_name_or_path is None:
        raise ValueError(
            "`model_name_or_path` is missing. It names the base model, on the Hub or in a folder. Pass e.g. "
            "`--model_name_or_path meta-llama/Meta-Llama-3-8B`, or a `--recipe` that does."
        )
    for config in (script, model_args):
        for name in vars(config).keys() & INTERVALS.keys():
            check_range(name, getattr(config, name), INTERVALS[name])
    if not model_args.use_peft:
        raise ValueError("`use_peft=False` is no LoRI. A LoRI adapter is PEFT's. Leave `use_peft` out.")
    given = {
        argument.lstrip("-").partition("=")[0].replace("-", "_") for argument in arguments if argument[:2] == "--"
    }
    for config in configs:
        set_here = {key: value for key, value in vars(config).items() if key in given}
        recipe |= {key: value.value if isinstance(value, Enum) else value for key, value in set_here.items()}
    for one, other in (("dataset_path", "dataset_name"), ("dataset_name", "dataset_path")):
        if one in given and other not in given:  # one's own data in place of the recipe's
            setattr(script, other, None)
            recipe.pop(other, None)
    for secret_or_ours in ("hub_token", "dry_run", "overwrite", "use_peft"):
        recipe.pop(secret_or_ours, None)
    script.recipe = str(file) if options.recipe is not None else None
    return script, args, model_args, recipe


def _dry_run(script, args, model_args, engine=None) -> None:
    from peft import PeftConfig
    from transformers import AutoConfig
    from trl import get_peft_config

    from ..recipes.base_configs import KNOWN_CONFIGS
    from ..recipes.data import look_at_training_data
    from ..training.counting import count_parameters

    peft_config = get_peft_config(model_args)
    if script.adapter_name_or_path is not None:
        peft_config = PeftConfig.from_pretrained(script.adapter_name_or_path)
    config = KNOWN_CONFIGS.get(model_args.model_name_or_path) or AutoConfig.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
    )
    counts = count_parameters(config, peft_config, args.sparsity)
    base_bytes = _bytes_of_base(model_args)
    if engine is None:
        show(counts.table(), counts.memory_table(base_bytes))
    else:
        show(counts.table(), engine.table(counts, base_bytes, args.sparse_backend))
    row = look_at_training_data(script, args.dataset_text_field)
    name = script.dataset_path or script.dataset_name
    if row is None:
        show(f"data: {name} was not looked at, for the Hub cannot be reached")
    else:
        show(f"data: {name}, rows of {', '.join(row)}")
    _settle_task_name(script, args)
    show(f"task: {args.task_name}")


def _preview(script, args, model_args) -> None:
    from rich.text import Text

    from ..training.preview import preview_rows

    data, tokenizer = _load_data(script, args, model_args)
    rows = data[script.dataset_train_split]
    for number, row in enumerate(preview_rows(rows, args, tokenizer, script.preview)):
        text = Text()
        for piece, bears_loss in row.pieces:
            piece = printable(piece)
            text.append(f"⟦{piece}⟧" if bears_loss else piece, style="bold green" if bears_loss else "dim")
        show(f"row {number}: {row.num_tokens:,} tokens, {row.num_with_loss:,} bear loss: those in ⟦⟧", text, "")


def _load_data(script, args, model_args):
    """Load the rows and the tokenizer, and check that it takes them all. Returns both."""
    from ..recipes.data import load_training_data
    from ..training.tokenizer_checks import check_tokenizer, tokenizer_as_trained

    data = load_training_data(script, args.dataset_text_field, evaluated=_is_evaluated(args))
    tokenizer = _load_tokenizer(script, args, model_args)
    as_trained = tokenizer_as_trained(tokenizer, args)
    for split, rows in data.items():
        source = f"{script.dataset_path or script.dataset_name}, split {split}"
        check_tokenizer(rows, as_trained, source, text_field=args.dataset_text_field)
    return data, tokenizer


def _is_evaluated(args) -> bool:
    return args.eval_strategy != "no" or args.eval_on_start


def _settle_task_name(script, args) -> None:
    """
    Name the task after the data where nobody named it.

    Raises:
        `ValueError`: the adapter that is continued has a task of that name: it is another's, as a rule.
    """
    from ..adapter.folder import open_adapter
    from ..recipes.data import default_task_name

    if args.task_name is not None:
        return
    args.task_name = default_task_name(script)
    if script.adapter_name_or_path is None:
        return
    with open_adapter(script.adapter_name_or_path, allow_modified=script.allow_modified) as adapter:
        if args.task_name in adapter.tasks:
            raise ValueError(
                f"`task_name` is not given, and the name that the data give, {args.task_name!r}, is that of a task of "
                f"`{script.adapter_name_or_path}`. A task has a name of its own, which decides its mask. Pass "
                f"`--task_name` with another one, or `--task_name {args.task_name}` to go on with that task."
            )


def _load_tokenizer(script, args, model_args):
    """Load the tokenizer of an adapter that is continued, if it brings one, else the base model's."""
    from transformers import AutoTokenizer

    from ..adapter.folder import open_adapter
    from ..adapter.load import load_tokenizer

    if script.adapter_name_or_path is not None:
        with open_adapter(script.adapter_name_or_path, allow_modified=script.allow_modified) as adapter:
            if (own := load_tokenizer(adapter.tokenizer)) is not None:
                return own
    return AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
    )


def _bytes_of_base(model_args) -> float:
    if model_args.load_in_4bit:
        return 0.56  # NF4: half a byte, and a float32 scale every 64 entries
    if model_args.load_in_8bit:
        return 1.0
    return {"bfloat16": 2.0, "float16": 2.0}.get(model_args.dtype, 4.0)


def _build_trainer(script, args, model_args, held):
    from trl import get_peft_config, get_quantization_config

    from ..adapter.load import load_lori_adapter
    from ..adapter.write import check_output
    from ..inputs.files import sole_writer
    from ..training.base_model import load_base_model
    from ..training.sft_trainer import LoriSFTTrainer

    inputs = (model_args.model_name_or_path, script.adapter_name_or_path, args.mask_name_or_path)
    resumed = args.resume_from_checkpoint is not None
    check_output(args.output_dir, filter(None, inputs), overwrite=script.overwrite or resumed)
    _settle_task_name(script, args)
    data, tokenizer = _load_data(script, args, model_args)
    _check_writable(args.output_dir)
    if os.environ.get("RANK", "0") == "0":
        held.enter_context(sole_writer(Path(args.output_dir)))
    model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
        **(args.model_init_kwargs or {}),
    }
    args.model_init_kwargs = None
    model = load_base_model(model_args.model_name_or_path, **model_init_kwargs)
    peft_config = get_peft_config(model_args)
    if script.adapter_name_or_path is not None:
        model = load_lori_adapter(
            model, script.adapter_name_or_path, is_trainable=True, allow_modified=script.allow_modified
        )
        peft_config = None
    return LoriSFTTrainer(
        model,
        args,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if _is_evaluated(args) else None,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def _check_writable(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(
            f"`output_dir={folder}` cannot be written: {error.strerror}. A folder is needed in which files can be "
            "made. Pass another `--output_dir`."
        ) from error


def _print_outcome(trainer, metrics: dict[str, float]) -> None:
    from rich.table import Table

    masks, counts = trainer.masks, trainer.record.counts
    table = Table(show_header=False, title=f"{trainer.record.variant} adapter {trainer.task_name!r}")
    table.add_row("plain LoRA would train", f"{counts.lora:,}")
    table.add_row("LoRI trained", f"{counts.selected:,} ({100 * counts.selected / counts.lora:.2f} % of LoRA)")
    table.add_row("density", f"{masks.num_selected:,} / {masks.numel:,} = {masks.density:.8f}")
    if "eval_loss" in metrics:
        table.add_row("held-out loss, first evaluation", f"{metrics['initial_eval_loss']:.4f}")
        table.add_row("held-out loss, at the end", f"{metrics['eval_loss']:.4f}")
    table.add_row("saved to", trainer.args.output_dir)
    show(table)
