"""What must never break, tried widely and counted: `make torture`.

`tests/` pins each behaviour once; here thousands of cases are generated, and what becomes of each
is counted. The counts are in `docs/reliability.md`, which `python -m torture.render` fills.
"""
