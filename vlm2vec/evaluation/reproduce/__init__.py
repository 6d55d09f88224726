"""Numbers that others can make again: what a score was made with, published rows, and why two scores differ (docs/evaluation.md).

record      what a score file says of its run: settings, model, data, versions
compare     what differs between two records, in words
rows        published rows and own score files, with the settings that they were made with
expected    within what two scores of one task may differ by chance
causes      which known cause fits a larger difference
verdict     a run beside a row: per task, and in all
"""
