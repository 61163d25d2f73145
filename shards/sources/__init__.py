"""Where images come from, frozen.

A folder, WebDataset tars or Parquet files become one listing; its rows give every sample its id, and the
listing is stored with the dataset, so that a later change of the source is noticed.
"""
