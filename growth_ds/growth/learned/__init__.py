"""Growth operators that are learned on data: LiGO (arXiv 2303.00980) and Mango (arXiv 2310.10699).

    operator.py   what an operator is: tables of the small model in, tables of the grown model out
    ligo.py       width matrices [I; M] with ties, and a depth mix of its own for each module type
    mango.py      one full map of all layer matrices, as a ring of four cores
    plan.py       the plan of such a growth, and one line for every growth that they cannot be

They are plain torch modules: what trains them (`growth_ds.learning`) is not this room's business.
"""
