"""`tuneyard import`: a job file out of one of axolotl or LLaMA-Factory, with a list of what had no counterpart."""
