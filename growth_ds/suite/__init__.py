"""`growth-ds compare`: growth methods against training from scratch, on one text and with one evaluation.

`runs` turns a suite into runs, `measure` reads from their folders what each took to reach the from-scratch loss,
`compare` runs what is missing, and `page` and `tables` show it.
"""
