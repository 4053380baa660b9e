"""Evaluation: scores with intervals, the control that cannot ask, and pictures of the attention.

`scoring` says when an answer is right, `evaluate` runs a model over examples, `shuffled` takes the
request away from it, `pictures` keeps each picture's features, `heatmap` draws where it looked.
`statistics` has intervals and paired tests, `against` holds one model against another,
`predictions` writes answers to a file and reads them again.
"""

from __future__ import annotations

__all__: list[str] = []
