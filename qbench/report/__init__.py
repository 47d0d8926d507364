"""Reports for people: sentences, tables and figures, all computed from result.json.

In go one finished run or many. Out comes a page, a table in the terminal or a card of adapters. Start with run/answer.py
for one run, and with comparison/page.py for many. These two packages do not import each other.

    run/         one run on one page
    comparison/  many runs compared, on a page with tables and charts

    wording.py       numbers and names in words
    task_wording.py  scores on tasks in words
    table.py         the one table that all pages show
    figures.py       colors and style of all figures
    defaults.py      fine-tune keys that older results lack
"""
