"""What `ipn bench engine` times: the engine against its rivals, side by side in one run.

`table.py` has the rows, and one module measures one kind of them; `timing.py` runs things in turn.
"""
