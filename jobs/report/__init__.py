"""Pages and pictures for people: the report of a run, the codebook, drawn images."""
