"""What qbench needs from Python and the operating system: files, locks, messages, interrupts, imports.

It knows nothing of models or results. Every other room uses it. Start with `files`.

    files          write files atomically, lock folders
    messages       keep the warnings of libraries off the terminal; make foreign texts printable
    interrupts     Ctrl-C while libraries are imported
    extras         the command that installs a missing package
    import_hooks   what happens when a library, a command or an old name of a module is imported
    moved          old module names, and where their content is now
    version        the version of qbench
"""
