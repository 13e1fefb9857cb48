"""The verbs that train an adapter: `lori sft`, which is `lori-sft`, and those of TRL's other trainers."""

import os
import sys
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .completion import training_completion_parser
from .errors import bad_input, take_debug
from .launching import engine_of, launch, take_launch_options
from .options import with_underscores
from .sequence import run_sequence, take_sequence
from .terminal import printable, show, show_logs_as_text
from .training_options import is_evaluated, parse, sft_help, training_parser
from .training_verbs import SFT, TrainingVerb
from .version import version_lines


def sft(arguments: list[str] | None = None) -> int:
    """Run `lori-sft`. Returns the exit code: 0; 2 for a wrong call; a failed run raises."""
    return run_training(SFT, sys.argv[1:] if arguments is None else arguments)


def run_training(verb: TrainingVerb, arguments: list[str]) -> int:
    """
    Run a verb that trains.

    Args:
        verb ([`TrainingVerb`]): the verb.
        arguments (`list[str]`): what follows it on the command line.

    Returns:
        `int`: the exit code: 0; 2 for a wrong call; a failed run raises.
    """
    arguments, debug = take_debug(with_underscores(arguments))
    show_logs_as_text()
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL and transformers about each other's names
    if "--version" in arguments:
        show(version_lines())
        return 0
    if any(argument.startswith("--print_completion") for argument in arguments):
        training_completion_parser(verb).parse_args(arguments)
    if "--help_all" in arguments:
        training_parser(verb, help_all=True).print_help()
        return 0
    if {"--help", "-h"} & set(arguments):
        show(sft_help() if verb is SFT else training_parser(verb).format_help())
        return 0
    sequence, of_stages = take_sequence(arguments)
    if verb is SFT and sequence is not None:
        with bad_input(verb.program, debug=debug):
            return run_sequence(sequence, of_stages, lambda call: run_training(SFT, [*call, *["--debug"] * debug]))
    with bad_input(verb.program, debug=debug):
        rest, options = take_launch_options(arguments)
        if options and not {"--dry_run", "--preview"} & {word.partition("=")[0] for word in rest}:
            launch(verb, options, [*rest, *["--debug"] * debug])
            return 0
    with ExitStack() as held:
        return _run(verb, rest, options, held, debug)


def _run(verb: TrainingVerb, arguments: list[str], launched: dict[str, Any], held: ExitStack, debug: bool) -> int:
    """
    Run a call that trains, or looks at what would be trained.

    Args:
        verb ([`TrainingVerb`]): the verb.
        arguments (`list[str]`): without those of `accelerate launch`.
        launched (`dict[str, Any]`): these, for a dry run.
        held (`ExitStack`): keeps the output for this process alone.
        debug (`bool`): whether an error is told by its traceback.
    """
    with bad_input(verb.program, debug=debug):
        script, args, model_args, recipe = parse(training_parser(verb), arguments)
        if script.dry_run:
            _dry_run(verb, script, args, model_args, engine_of(launched))
            return 0
        if script.preview is not None:
            _preview(verb, script, args, model_args)
            return 0
        trainer = _build_trainer(verb, script, args, model_args, held)
    trainer.recipe = recipe
    resume = args.resume_from_checkpoint
    with bad_input(verb.program, (ValueError, FileNotFoundError), debug=debug):
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


def _dry_run(verb, script, args, model_args, engine=None) -> None:
    from peft import PeftConfig
    from transformers import AutoConfig, Trainer
    from trl import get_peft_config

    from ..adapter.masks import LoriMasks
    from ..adapter.vllm_limits import describe_rank
    from ..recipes.base_configs import KNOWN_CONFIGS
    from ..recipes.data import look_at_training_data
    from ..training.counting import count_parameters, optimizer_steps
    from ..training.growth import grown_config
    from ..training.parallel_engines import Engine
    from ..training.sparse_backend import choose_backend
    from ..training.training_rows import loss_on_all_turns

    if verb.generates:
        _reward_functions(script)
    engine = engine or Engine("one device", 1)
    peft_config = get_peft_config(model_args)
    if script.adapter_name_or_path is not None:
        peft_config = PeftConfig.from_pretrained(script.adapter_name_or_path)
        _check_task_type(verb, peft_config.task_type, script.adapter_name_or_path)
        if args.grow is not None:
            peft_config.r, peft_config.lora_alpha = grown_config(peft_config, args.grow)
            show(f"the adapter is grown to {describe_rank(peft_config.r)}")
    config = KNOWN_CONFIGS.get(model_args.model_name_or_path) or AutoConfig.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
    )
    masks = None
    if args.mask_name_or_path:
        masks = LoriMasks.from_pretrained(args.mask_name_or_path, revision=args.mask_revision)
    counts = count_parameters(
        config,
        peft_config,
        args.sparsity,
        args.mask_granularity,
        selected=None if masks is None else masks.num_selected,
        calibrated=masks is None and args.calibration_method != "random",
        columns=args.grow,
    )
    optimizer = Trainer.get_optimizer_cls_and_kwargs(args)
    density = counts.selected / counts.lora_B
    backend, why = choose_backend(args, engine, density, calibrate=counts.calibrated, optimizer=optimizer)
    show(counts.table(), engine.table(counts, _bytes_of_base(model_args), backend))
    show(f"sparse_backend: {backend} ({why})")
    row, num_rows = look_at_training_data(script, verb.text_field(args), kind=verb.row_kind)
    name = script.dataset_path or script.dataset_name
    if row is None:
        show(f"data: {name} was not looked at, for the Hub cannot be reached")
    else:
        show(
            f"data: {name}, {'' if num_rows is None else f'{num_rows:,} '}rows of {', '.join(row)}",
            *filter(None, [loss_on_all_turns(row, args) if verb is SFT else None]),
        )
    batch, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    at_once = f"{batch} x {engine.devices} devices x {accumulated} accumulated"
    show(f"{'answers' if verb.generates else 'rows'} a step: {batch * engine.devices * accumulated} = {at_once}")
    if verb.generates:
        show(f"answers to a prompt: {args.num_generations}")
        num_rows = None if num_rows is None else num_rows * args.num_generations
    phases = {"calibration": args.for_calibration()} if counts.calibrated else {}
    for phase, phase_args in (phases | {"adaptation": args}).items():
        fraction = args.calibration_fraction if phase == "calibration" else 1
        steps = optimizer_steps(phase_args, num_rows, engine.devices, fraction)
        of_packs = verb is SFT and args.packing and phase_args.max_steps <= 0
        known = "not known before the rows are counted" if steps is None else f"{steps:,}"
        show(f"steps of the {phase}: {known}{' at most, for rows are packed' if of_packs and steps else ''}")
    _settle_task_name(script, args)
    show(f"task: {args.task_name}")


def _preview(verb, script, args, model_args) -> None:
    from rich.text import Text

    from ..training.preview import preview_rows

    if verb is not SFT:
        raise ValueError(
            f"`preview={script.preview}` with `{verb.program}`: it shows which tokens of a row bear loss in "
            "supervised training, and is of `lori sft` alone. Leave it out; `--dry_run` looks at the rows."
        )
    data, tokenizer = _load_data(verb, script, args, model_args)
    rows = data[script.dataset_train_split]
    for number, row in enumerate(preview_rows(rows, args, tokenizer, script.preview)):
        text = Text()
        for piece, bears_loss in row.pieces:
            piece = printable(piece)
            text.append(f"⟦{piece}⟧" if bears_loss else piece, style="bold green" if bears_loss else "dim")
        show(f"row {number}: {row.num_tokens:,} tokens, {row.num_with_loss:,} bear loss: those in ⟦⟧", text, "")


def _load_data(verb, script, args, model_args):
    """Load the rows and the tokenizer, and check that it takes them all. Returns both."""
    from ..recipes.data import load_training_data
    from ..training.tokenizer_checks import check_tokenizer, tokenizer_as_trained
    from ..training.training_rows import loss_on_all_turns

    kind, text_field = verb.row_kind, verb.text_field(args)
    data = load_training_data(script, text_field, kind=kind, evaluated=is_evaluated(args))
    tokenizer = _load_tokenizer(script, args, model_args)
    as_trained = tokenizer_as_trained(tokenizer, args)
    for split, rows in data.items():
        source = f"{script.dataset_path or script.dataset_name}, split {split}"
        columns = None if kind is None else kind.columns(next(iter(rows)))
        check_tokenizer(rows, as_trained, source, text_field=text_field, columns=columns)
    if verb is SFT and (told := loss_on_all_turns(next(iter(data[script.dataset_train_split])), args)):
        show(told)
    return data, tokenizer


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


def _reward_functions(script) -> list[Any]:
    """
    Find what rewards answers. A reward model is not loaded yet.

    Raises:
        `ValueError`: nothing does, or there is no such function.
    """
    from ..training.reward_functions import find_reward_functions

    if not script.reward_funcs and script.reward_model_name_or_path is None:
        raise ValueError(
            "`reward_funcs` and `reward_model_name_or_path` are both missing. Answers are learnt from by their "
            "rewards. Pass `--reward_funcs my_rewards.is_short` for the function `is_short` of `my_rewards.py`, or "
            "`--reward_model_name_or_path` with a reward model."
        )
    return find_reward_functions(script.reward_funcs or [])


def _check_task_type(verb: TrainingVerb, task_type: str | None, name: str) -> None:
    """
    Check that an adapter that is continued is one of the model that the verb trains: with a head, or without.

    Raises:
        `ValueError`: it is not.
    """
    if (task_type == "SEQ_CLS") != (verb.task_type == "SEQ_CLS"):
        raise ValueError(
            f"`adapter_name_or_path={name}` has `task_type={task_type!r}`, and `{verb.program}` trains "
            f"{verb.task_type}: a reward model has a head for its score, and a language model one for tokens. "
            "Continue an adapter of the same kind; or write the adapter into its base with `lori merge --into-base`, "
            "and pass that as `--model_name_or_path`."
        )


def _build_trainer(verb, script, args, model_args, held):
    from transformers import set_seed
    from trl import get_peft_config, get_quantization_config

    from ..adapter.folder import open_adapter
    from ..adapter.load import load_lori_adapter
    from ..adapter.vocabulary import make_room
    from ..adapter.write import check_output
    from ..inputs.files import sole_writer
    from ..training.base_model import load_base_model
    from ..training.hub_pushes import ready_repository

    inputs = (model_args.model_name_or_path, script.adapter_name_or_path, args.mask_name_or_path)
    resumed = args.resume_from_checkpoint is not None
    check_output(args.output_dir, filter(None, inputs), overwrite=script.overwrite or resumed)
    _settle_task_name(script, args)
    data, tokenizer = _load_data(verb, script, args, model_args)
    if script.adapter_name_or_path is not None:
        with open_adapter(script.adapter_name_or_path, allow_modified=script.allow_modified) as adapter:
            _check_task_type(verb, adapter.config.get("task_type"), script.adapter_name_or_path)
    of_verb = {"reward_funcs": _reward_functions(script)} if verb.generates else {}
    _check_writable(args.output_dir)
    if os.environ.get("RANK", "0") == "0":
        held.enter_context(sole_writer(Path(args.output_dir)))
        if args.push_to_hub:
            ready_repository(args)
    model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
        **(args.model_init_kwargs or {}),
    }
    args.model_init_kwargs = None
    if verb.task_type == "SEQ_CLS":
        from transformers import AutoModelForSequenceClassification

        set_seed(args.seed)  # the head is drawn, as TRL draws it
        model_init_kwargs |= {"architecture": AutoModelForSequenceClassification, "num_labels": 1}
    model = load_base_model(model_args.model_name_or_path, **model_init_kwargs)
    peft_config = get_peft_config(model_args)
    if script.adapter_name_or_path is not None:
        with open_adapter(script.adapter_name_or_path, allow_modified=script.allow_modified) as adapter:
            make_room(model, adapter)
        model = load_lori_adapter(
            model, script.adapter_name_or_path, is_trainable=True, allow_modified=script.allow_modified
        )
        peft_config = None
    if verb.generates and script.reward_model_name_or_path is not None:
        from ..training.reward_functions import load_reward_model

        reward_model = load_reward_model(script.reward_model_name_or_path, dtype=model_args.dtype)
        of_verb["reward_funcs"] = [reward_model, *of_verb["reward_funcs"]]
    return verb.trainer_class(
        model,
        args=args,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if is_evaluated(args) else None,
        processing_class=tokenizer,
        peft_config=peft_config,
        **of_verb,
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

    from ..adapter.vllm_limits import describe_rank

    masks, counts = trainer.masks, trainer.record.counts
    table = Table(show_header=False, title=f"{trainer.record.variant} adapter {trainer.task_name!r}")
    table.add_row("plain LoRA would train", f"{counts.lora:,}")
    table.add_row("LoRI trained", f"{counts.selected:,} ({100 * counts.selected / counts.lora:.2f} % of LoRA)")
    if trainer.projection.blocks:
        table.add_row("grown to", describe_rank(masks[next(iter(masks))].shape[1]))
    table.add_row("density", f"{masks.num_selected:,} / {masks.numel:,} = {masks.density:.8f}")
    if "eval_loss" in metrics:
        table.add_row("held-out loss, first evaluation", f"{metrics['initial_eval_loss']:.4f}")
        table.add_row("held-out loss, at the end", f"{metrics['eval_loss']:.4f}")
    table.add_row("saved to", trainer.args.output_dir)
    show(table)
