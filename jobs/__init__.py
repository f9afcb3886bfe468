"""trailvec's Spark stages: one file tells one stage; `pipeline.py` lists them in the order in which they run."""
