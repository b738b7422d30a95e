"""The command line: the app, its commands, and what stopped one told in a line.

What a command takes and does is in commands/. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import errno
import gc
import io
import math
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer
from typer.exceptions import TyperException

from softlabels.commands import (
    augment,
    card,
    combine,
    dump,
    evaluate,
    export,
    imports,
    info,
    plan,
    predict,
    prune,
    report,
    run,
    sign,
    sweep,
    train_student,
    train_teacher,
    train_together,
    verify,
)
from softlabels.commands.pull import PULL_EXAMPLES, pull_command
from softlabels.commands.push import PUSH_EXAMPLES, push_command
from softlabels.commands.show import say
from softlabels.errors import SoftlabelsError

app = typer.Typer(
    name="softlabels",
    help="Knowledge distillation from precomputed teachers: run the teacher once, train students from its cache.",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        import softlabels

        typer.echo(f"softlabels {softlabels.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


# -------------------------------------------------------------------------------------------------------- commands
# `softlabels --help` lists them in this order.

app.command("demo", epilog=run.DEMO_EXAMPLES)(run.demo)
app.command("run", epilog=run.RUN_EXAMPLES)(run.run_command)
app.command("train-teacher", epilog=train_teacher.EXAMPLES)(train_teacher.train_teacher_command)
app.command("dump", epilog=dump.EXAMPLES)(dump.dump_command)
app.command("augment", epilog=augment.EXAMPLES)(augment.augment_command)
app.command("plan", epilog=plan.EXAMPLES)(plan.plan_command)
app.command("import", epilog=imports.EXAMPLES)(imports.import_command)
app.command("combine", epilog=combine.EXAMPLES)(combine.combine_command)
app.command("info", epilog=info.EXAMPLES)(info.info)
app.command("card", epilog=card.EXAMPLES)(card.card)
app.command("sign", epilog=sign.EXAMPLES)(sign.sign)
app.command("verify", epilog=verify.EXAMPLES)(verify.verify)
app.command("train-student", epilog=train_student.EXAMPLES)(train_student.train_student_command)
app.command("prune", epilog=prune.EXAMPLES)(prune.prune_command)
app.command("export", epilog=export.EXAMPLES)(export.export_command)
app.command("train-joint", epilog=train_together.JOINT_EXAMPLES)(train_together.train_joint_command)
app.command("train-multitask", epilog=train_together.MULTITASK_EXAMPLES)(train_together.train_multitask_command)
app.command("evaluate", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command("report", epilog=report.EXAMPLES)(report.report)
app.command("sweep", epilog=sweep.EXAMPLES)(sweep.sweep)
app.command("predict", epilog=predict.EXAMPLES)(predict.predict_command)
app.command("push", epilog=PUSH_EXAMPLES)(push_command)
app.command("pull", epilog=PULL_EXAMPLES)(pull_command)


def _a_line_each(examples: str) -> str:
    """The examples of a command below one another, unbroken, so that they can be copied."""
    head, _, rest = examples.partition(":")
    first = f"{head}:  "
    return f"\b\n{first}" + f"\n{' ' * len(first)}".join(rest.strip().split("   |   "))  # \b: not to be wrapped


for _command in app.registered_commands:
    _command.epilog = _a_line_each(_command.epilog or "")


# ---------------------------------------------------------------------------------------------------------- errors


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code.

    0 done; 2 wrong usage or input; 130 Ctrl-C; 1 a fault of softlabels itself, or a cache that is not what its
    teacher says (verify --live).
    """
    # torch's threads wait for each other by spinning, which on a machine that does anything else beside is ten times
    # slower than sleeping; on an idle one it gains little. Read when torch is loaded; the user's own setting wins.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in given
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that can't show a sign is no reason to stop
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _OnInterrupt())
    code = 130
    try:
        code = _guarded([word for word in given if word != "--debug"], debug=debug)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:  # too late to be told
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to stop: it would only garble the end
    gc.freeze()  # nor to collect: Python would search torch's objects for most of a second
    sys.exit(code)


class _OnInterrupt:
    """What a Ctrl-C does. One pressed again at once is the same one: it would only hurt the tidying up."""

    def __init__(self) -> None:
        self.last = -math.inf

    def __call__(self, number: int, frame: FrameType | None) -> None:
        before, self.last = self.last, time.monotonic()
        if self.last - before > 1:
            raise KeyboardInterrupt


_RESUMED = ("train-student", "train-joint", "train-multitask")  # the commands that go on only if told to


def _guarded(arguments: list[str], *, debug: bool) -> int:
    """The exit code of a command line; whatever stopped it is told on stderr."""
    try:
        command = typer.main.get_command(app)
        # not app(arguments): that answers a Ctrl-C and a closed pipe itself, in its own ways
        with command.make_context("softlabels", list(arguments)) as context:
            command.invoke(context)
        if sys.stdout is not None:  # closed by whoever started this process
            sys.stdout.flush()
        return 0
    except typer.Exit as leaving:
        return leaving.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if _is_interrupt(error):
            again = "again with --resume" if arguments[:1] and arguments[0] in _RESUMED else "again"
            say(f"\nstopped. What was committed is kept: give the same command {again} to go on")
            return 130
        if debug and not isinstance(error, TyperException):
            raise
        fault = _user_fault(error)
        if fault is None:
            say(f"error: {type(error).__name__}: {error}\nThis is a fault of softlabels itself; --debug shows where")
            return 1
        say(f"error: {fault}")
        return 2


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether a Ctrl-C is at the bottom of it: what it cut short may have failed on its way out."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt | typer.Abort):
            return True
        error = error.__cause__ or error.__context__
    return False


def _user_fault(error: BaseException) -> str | None:
    """What the user did or met, in words; None where softlabels itself is at fault."""
    if isinstance(error, TyperException):  # wrong usage
        path = getattr(getattr(error, "ctx", None), "command_path", "softlabels")
        return f"{error.format_message()}\n`{path} --help` shows what it takes"
    if isinstance(error, SoftlabelsError):
        return str(error)
    if isinstance(error, OSError):
        return _system_fault(error)
    told = re.search(r"\(os error (\d+)\)$", str(error))  # how Rust's libraries tell what the system said
    return _system_fault(OSError(int(told[1]), os.strerror(int(told[1])))) if told else None


def _system_fault(error: OSError) -> str:
    place = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{place}. What was committed is kept: make room and give the same command again"
    if error.errno == errno.EFBIG:
        return "a file became larger than is allowed here (ulimit -f). What was committed is kept"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write or read{place}: choose another folder"
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"a file is where a folder is needed{place}: choose another name"
    if error.errno == errno.EISDIR:
        return f"a folder is where a file is needed{place}: choose another name"
    return f"{error.strerror or error}{place}"


if __name__ == "__main__":
    main()
