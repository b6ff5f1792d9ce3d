"""The `tfkern` program: models, benchmarks, validation, what is on or off on this machine.

Each file holds one command, except that `bench.py` holds all sweeps over lengths, which differ only
in their sizes, and `peers.py` both commands that time other ways to run a model. `options.py` has
the options that several commands share, `output.py` the printing.
"""

from typing import Any

from tfkern_program import failed, say

# Packages that only some installations have, and the extra that brings each.
_EXTRAS = {
    **dict.fromkeys(("typer", "rich", "matplotlib", "tokenizers"), "cli"),
    **dict.fromkeys(("datatrove", "ftfy", "mwparserfromhell", "orjson", "py3langid"), "data"),
    **dict.fromkeys(("regex", "xxhash", "yaml", "zstandard"), "data"),
    "grain": "data",
    "sacrebleu": "train",
    "ray": "ray",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status, as `tfkern_program.main`, in this process."""
    try:
        return _run(arguments)
    except ImportError as error:  # of the program, or later of a command
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            return failed(error)
        return say(f"{package} is not installed: pip install tfkern[{_EXTRAS[package]}]", 2)
    except Exception as error:
        return failed(error)


def _run(arguments: list[str] | None) -> int:
    app = _app()
    import typer

    usage_error: Any = typer.BadParameter.__base__  # typer shows its errors in boxes
    try:
        return app(arguments, prog_name="tfkern", standalone_mode=False) or 0
    except usage_error as error:
        return say(error.format_message() or "no command was given", 2)
    except typer.Exit as error:
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return say("interrupted", 130)
    except (ValueError, NotImplementedError) as error:
        return say(str(error), 2)


def _app():
    """The commands. They are built on demand, since typer comes with the extra `cli`."""
    import matplotlib  # noqa: F401  fails now rather than when a long run draws its chart
    import typer

    from tfkern.cli import (
        attention_map,
        bench,
        bench_train,
        convert,
        doctor,
        patched,
        peers,
        plan,
        prepare,
        sample,
        suite,
        train,
        validate,
    )

    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        help="Measures and checks fused transformer kernels, shows which of them run here, and "
        "runs the models on top of them.",
    )
    bench.app.command("suite")(suite.command)
    bench.app.command("patched")(patched.command)
    bench.app.command("train")(bench_train.command)
    bench.app.command("infer")(peers.infer)
    bench.app.command("generate")(peers.generate)
    app.add_typer(bench.app, name="bench")
    app.command("doctor")(doctor.command)
    app.command("validate")(validate.command)
    app.command("sample")(sample.command)
    app.command("attention-map")(attention_map.command)
    app.command("convert")(convert.command)
    app.command("prepare")(prepare.command)
    app.command("train")(train.command)
    app.command("plan")(plan.command)
    return app
