"""What a person reads: sentences, tables and figures, all derived from result.json.

A finished run comes in, or many; a page, a table in the terminal or a card of adapters goes out. Start with run/answer.py
for one run, and with comparison/page.py for many. The two rooms do not import each other.

    run/         one run on one page
    comparison/  many runs compared, on a page with tables and charts

    wording.py       numbers and names in words
    task_wording.py  scores on tasks in words
    table.py         the one table that all pages show
    figures.py       colors and style of all figures
    defaults.py      fine-tune keys that older results lack
"""
