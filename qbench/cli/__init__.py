"""The command line: arguments come in, a command runs, and an exit code goes out. Read `main` first, then `command_line`.

    main           picks the command by the first word
    arguments      what `report`, `bench` and `runs` accept
    commands       which configuration and keys `run`, `plan` and `quantize` accept
    command_line   checks a command line with key=value, and starts Hydra
    overrides      parses and checks a single key=value
    compose        composes the configuration as plain data
    config_files   the folders conf/ and experiments/, and the comments in them
    format_group   the choices of +format=, made of the registered formats
    format_list    --formats: the table of formats
    format_names   names of formats, without PyTorch
    help_page      the page of --help
    completion     the tab key
    console        standard error
    run            one run or a sweep
    jobs           a run in a process of its own, and what came of it
    time_limit     ends a run that takes too long
    sweep          the progress of a sweep, and its final table
    quantize, plan, bench, report, runs   the other commands
    api            `qbench.run`, the same in Python

Nothing heavy is imported before the arguments are checked.
"""

from qbench.system.import_hooks import COMMANDS

__all__ = ["COMMANDS"]
