"""Compares many runs. In go results, out comes a page with tables and charts.

Runs that differ only in their seed are one configuration. Configurations measured on the same model, text and device form
a setting, and are compared within it. Each claim is a paired test on the same windows of text.

    page.py                reads the results, writes the page; start here
    grouping.py            puts runs into configurations and settings, and tests them against 16 bit
    configurations.py      Configuration and Setting, which all modules below use
    differences.py         the paired test, and its correction for many tests
    config_keys.py         which config keys differ between runs, and their names
    selection.py           the frontier, the best, pairs that differ in one key

    findings.py            the findings in sentences, and how to read them
    fine_tune_findings.py  those about fine-tunes
    main_table.py          a row for each configuration
    extra_tables.py        tables of methods, of initializations, of merged adapters
    links.py               links to the results behind a row

    methods.py             fine-tuning methods, each at its best learning rate; QLoRA's claim
    adapters.py            how LoRA was initialized, and what packing or merging the adapters costs
    tasks.py               scores on tasks

    charts/                the figures
"""
