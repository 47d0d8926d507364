"""Shows one run. In goes a result; out comes report.md, the output in the terminal or the card of the adapters.

Start with answer.py, the findings of a run in sentences.

    answer.py    the findings
    tables.py    the scores as tables
    figures.py   the figures
    page.py      report.md, which puts the three together
    terminal.py  the same in the terminal, without figures
    card.py      README.md in the folder of the adapters
"""
