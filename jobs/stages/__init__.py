"""The stages behind `run_pipeline` and `reproduce_table`.

`stage` says what one stage is, `runner` runs it here, and `submission` on a cluster. `pipeline` is the graph
from images to a report. Of the paper's tables, `paper_tables` holds the rows, `rows` finds the stages that
measure one, `naming` their folders; `tables` plans and runs, and `results` prints ours beside the paper's.
"""
