"""The data of the kit: DeepPCB as published, and a generator of boards in the same layout."""
