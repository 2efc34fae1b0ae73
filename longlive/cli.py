"""The command line: `python -m longlive COMMAND …`, see `COMMANDS` below.

Mistakes of the user end in one line on stderr and exit code 2, a training run that broke in one line and 1, Ctrl-C in
130; anything else is a bug and keeps its traceback. A training run that was asked to stop, by SIGTERM or by Ctrl-C, has
saved and ends with 0. Heavy modules are imported by the command that needs them, so that `--help` is quick.
"""

import argparse
import errno
import io
import logging
import os
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import longlive
from longlive.config import PATH_RULE, ROOT, InferenceConfig, Section, check_used, config_keys, load_config
from longlive.distributed import is_main, world_size
from longlive.errors import OUT_OF_MEMORY, InputError, is_out_of_memory

USER_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
TRAINING_OUT_OF_MEMORY = (
    "out of memory; try batch_size=1, activation_checkpointing=full, teacher_precision=fp8, low_memory=true, "
    "adapter.type=lora, or more GPUs"
)


class BrokenRunError(Exception):
    """A run that cannot go on, though nothing in its settings is wrong: one line and exit code 1."""


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are InputErrors."""

    def __init__(self, name: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=f"python -m longlive {name}".strip(),
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help lists what is accepted)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code; `--help` raises SystemExit."""
    return exit_code(lambda: _dispatch(sys.argv[1:] if argv is None else argv))


def exit_code(command: Callable[[], None]) -> int:
    """Run `command`; 0, or what its failure means, told in one line on stderr. Unexpected errors propagate."""
    try:
        try:
            command()
        finally:
            _flush_stdout()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what is complete is kept: videos, clips and training go on from there\n")
        return 130
    except BrokenRunError as error:
        return _fail(str(error), 1)
    except InputError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno not in USER_ERRNOS:
            raise
        return _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return _fail(OUT_OF_MEMORY)
    return 0


def _fail(message: str, code: int = 2) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return code


def as_one_of_many(command: Callable[[], None]) -> None:
    """Run the command of a process that works with others; where it fails, end the process at once.

    A normal exit would wait for threads that wait for the other processes. When one process fails, whatever started
    them (torchrun, scripts/launch.sh) ends the others. So each waits a moment before it speaks: the main process in
    case it failed only because another did, the others longer, since where all fail alike the main one speaks for all.
    """

    def patient() -> None:
        try:
            command()
        except (Exception, KeyboardInterrupt):
            time.sleep(0.5 if is_main() else 2)
            raise

    try:
        code = exit_code(patient)
    except Exception:
        traceback.print_exc()
        code = 1
    if code:
        sys.stderr.flush()
        os._exit(code)


def _flush_stdout() -> None:
    """A reader that left early (`--help | head`) is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(argv: Sequence[str]) -> None:
    commands = "\n".join(f"  {name:12} {command.__doc__}" for name, command in COMMANDS.items())
    parser = _Parser("", longlive.__doc__ or "", f"commands (each has its own --help):\n{commands}")
    parser.add_argument("--version", action="version", version=f"longlive {longlive.__version__}")
    parser.add_argument("command", choices=COMMANDS, help="what to do, see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own arguments")
    args = parser.parse_args(argv or ["--help"])
    _start_logging()
    COMMANDS[args.command](args.arguments)


def _start_logging() -> None:
    """Messages go to stderr as they are; only the main process tells of progress, every process of trouble."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("longlive").setLevel(logging.INFO if is_main() else logging.WARNING)


def _inference(argv: Sequence[str]) -> None:
    """make one video for each prompt of a text file"""
    _generate("inference", argv, "longlive_inference.yaml")


def _interactive(argv: Sequence[str]) -> None:
    """make videos whose prompt changes as they run"""
    _generate("interactive", argv, "longlive_interactive_inference.yaml")


def _train(argv: Sequence[str]) -> None:
    """train a generator: stage by stage, resuming where it stopped"""
    if world_size() > 1:
        as_one_of_many(lambda: _run_train(argv))
    else:
        _run_train(argv)


def _run_train(argv: Sequence[str]) -> None:
    from longlive.train_config import TrainConfig, load_train_config

    parser = _Parser("train", f"{_train.__doc__}.", _describe_keys(TrainConfig))
    config = load_train_config(*_config_arguments(parser, argv, "longlive_train_init.yaml"))

    from longlive.train import run_training
    from longlive.training.trainer import NonFiniteError

    try:
        if not run_training(config):
            logging.getLogger("longlive").info("stopped as asked; the same command goes on from the last checkpoint")
    except NonFiniteError as error:
        raise BrokenRunError(str(error)) from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(TRAINING_OUT_OF_MEMORY) from error


def _clips(argv: Sequence[str]) -> None:
    """make clips to train on: videos encoded, or samples of a teacher with their ODE states"""
    from longlive.clips_config import ClipsConfig

    parser = _Parser("clips", f"{_clips.__doc__}.", _describe_keys(ClipsConfig))
    config, _ = load_config(ClipsConfig, *_config_arguments(parser, argv, "longlive_clips.yaml"))

    from longlive.make_clips import make_clips

    make_clips(config)


def _evaluate(argv: Sequence[str]) -> None:
    """measure what a model makes of a suite of prompts, or compare such results"""
    from longlive.eval.evaluate_config import EvaluateConfig

    parser = _Parser("evaluate", f"{_evaluate.__doc__}.", _describe_keys(EvaluateConfig))
    parser.add_argument("--suite", choices=("shapes",), default="shapes", help="what is made and how it is judged")
    parser.add_argument("--seed", metavar="N", help="short for seed=N")
    parser.add_argument("--json", metavar="FILE", type=Path, help="the figures")
    parser.add_argument("--compare", metavar="NAME=FILE", nargs="+", help="results to compare, instead of measuring")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path(), help="folder of the comparison (default: .)")
    args = _parse_settings(parser, argv, "shapes_evaluate.yaml")
    if args.compare:
        if args.json or args.seed or args.overrides:
            raise InputError("evaluate --compare measures nothing: it takes --out alone")
        from longlive.eval.report import compare

        logging.getLogger("longlive").info("%s\n%s", *compare(args.compare, args.out))
        return
    if args.json is None:
        raise InputError("evaluate needs --json FILE, where the figures go, or --compare NAME=FILE …")
    seed = [] if args.seed is None else [f"seed={args.seed}"]
    config, explicit = load_config(EvaluateConfig, args.config_path, [*args.overrides, *seed])

    from longlive.eval.shapes import run_shapes

    run_shapes(config, explicit, args.json)


def _serve(argv: Sequence[str]) -> None:
    """serve a page on which prompts are typed while the video plays"""
    from longlive.web.serve_config import UNUSED, ServeConfig

    parser = _Parser("serve", f"{_serve.__doc__}.", _describe_keys(ServeConfig))
    config, explicit = load_config(ServeConfig, *_config_arguments(parser, argv, "longlive_inference.yaml"))
    check_used(explicit, UNUSED, "to serve: prompts and seeds come from the viewers")

    from longlive.web.server import serve

    serve(config, explicit)


def _live(argv: Sequence[str]) -> None:
    """the same in a terminal: every line typed is the next prompt, a video file grows"""
    from longlive.web.serve_config import UNUSED

    parser = _Parser("live", f"{_live.__doc__}.", _describe_keys(InferenceConfig))
    config, explicit = load_config(InferenceConfig, *_config_arguments(parser, argv, "longlive_inference.yaml"))
    check_used(explicit, UNUSED - {"seed", "start_from", "output_folder"}, "to live: prompts are lines that are typed")

    from longlive.web.terminal import live

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # what is no text
    live(config, explicit, sys.stdin)


def _export(argv: Sequence[str]) -> None:
    """write the weights of a training run's newest checkpoint for inference"""
    parser = _Parser("export", f"{_export.__doc__}.", "")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run")
    parser.add_argument("--checkpoint", metavar="DIR", type=Path, help="another of its checkpoints")
    args = parser.parse_args(argv)

    from longlive.train import export_folder

    export_folder(args.run, args.checkpoint)


def _plot(argv: Sequence[str]) -> None:
    """draw the curves of training runs to a picture"""
    parser = _Parser("plot", f"{_plot.__doc__}.", "")
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folder of a run; several are compared")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the picture, .png, .pdf or .svg (default: in RUN)")
    args = parser.parse_args(argv)

    from longlive.training.plot import plot

    logging.getLogger("longlive").info("%s", plot(args.runs, args.out))


def _convert(argv: Sequence[str]) -> None:
    """convert weights between formats and merge a LoRA into them"""
    from longlive.weights import convert

    parser = _Parser("convert", f"{_convert.__doc__}.", "")
    convert.add_arguments(parser)
    convert.run(parser.parse_args(argv))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "inference": _inference,
    "interactive": _interactive,
    "train": _train,
    "clips": _clips,
    "evaluate": _evaluate,
    "serve": _serve,
    "live": _live,
    "export": _export,
    "plot": _plot,
    "convert": _convert,
}


def _generate(name: str, argv: Sequence[str], default_config: str) -> None:
    parser = _Parser(name, f"{COMMANDS[name].__doc__}.", _describe_keys(InferenceConfig))
    config, explicit = load_config(InferenceConfig, *_config_arguments(parser, argv, default_config))

    from longlive.build import run_inference

    run_inference(config, explicit)


def _config_arguments(parser: _Parser, argv: Sequence[str], default_config: str) -> tuple[Path, list[str]]:
    """The configuration file and the overrides that a command line gives."""
    args = _parse_settings(parser, argv, default_config)
    return args.config_path, args.overrides


def _parse_settings(parser: _Parser, argv: Sequence[str], default_config: str) -> argparse.Namespace:
    """Parse a command line of `config_path`, `overrides` and what the parser knows already."""
    parser.add_argument(
        "--config_path",
        "--config-path",
        type=Path,
        default=ROOT / "configs" / default_config,
        metavar="FILE",
        help=f"YAML file of settings (default: configs/{default_config} of the repository)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        raise InputError(f"unknown option {unknown[0]}: settings are written key=value, for example seed=3")
    return args


def _describe_keys(schema: type[Section]) -> str:
    """The help text of every configuration key, with the rule for paths."""
    lines = [textwrap.fill(PATH_RULE, 100), "", "keys, with type and default (a configuration file may say otherwise):"]
    for key in config_keys(schema).values():
        accepts = f" ({key.rule.accepts})" if key.rule else ""
        lines.append(f"  {key.name}  {key.type_name}, {key.default_text}")
        lines += textwrap.wrap(key.help + accepts, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
